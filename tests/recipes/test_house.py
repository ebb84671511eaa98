"""The plan of the house: who may import whom, where heavy packages may be named, how long files and functions are."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "vgr").rglob("*.py"))
BASE = {"types", "seeding"}
COMMANDS = {"command", "train", "trainer", "planner", "sample", "bench", "prepare", "export", "compare"}
LIBRARY = {"geometry", "nn", "models", "diffusion", "distillation", "parallel", "metrics", "data"}
MAY_IMPORT = {
    "types": set(),
    "seeding": set(),
    "geometry": BASE,
    "nn": BASE | {"geometry"},
    "models": BASE | {"geometry", "nn"},
    "diffusion": BASE,
    "distillation": BASE | {"diffusion"},
    "parallel": {"types"},
    "metrics": BASE | {"geometry"},
    "data": BASE | {"geometry", "metrics"},
    "training": BASE | LIBRARY,
    "report": BASE | LIBRARY,
}
# Packages that only some rooms may name at all.
ONLY_IN = {
    "pytorch_lightning": {"training", "data/modules", *COMMANDS},
    "hydra": COMMANDS,
    "wandb": {"training/tracking", "report/mirror", "report/wandb_runs", "report/wandb_report"},
    "wandb_workspaces": {"report/wandb_report"},
    "vizdoom": {"data/doom"},
    "deepspeed": {"training/zero"},
    "pycolmap": {"geometry/mapping", "geometry/reconstruct"},
    "torch.distributed": {"parallel", "training", "metrics"},
}


def _room(path: Path) -> str:
    return path.relative_to(ROOT / "vgr").parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module in ("vgr", "torch")
            found |= {f"{node.module}.{alias.name}" if whole else node.module for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    room = _room(path)
    allowed = MAY_IMPORT.get(room)
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "vgr" and len(parts) > 1 and allowed is not None:
            assert parts[1] == room or parts[1] in allowed, f"{room} must not import {name}"
        where = str(path.relative_to(ROOT / "vgr").with_suffix(""))
        for package, places in ONLY_IN.items():
            if f"{name}.".startswith(f"{package}."):
                assert room in places or where in places, f"{where} must not import {package}"
        if room == "parallel":
            assert parts[0] in {"vgr", "torch", *sys.stdlib_module_names}, f"parallel must not import {name}"


def test_models_do_not_import_each_other():
    for path in (ROOT / "vgr" / "models").glob("*.py"):
        others = {n for n in _imports(path) if n.startswith("vgr.models.") and not n.endswith("weights")}
        assert not others, f"{path.name} imports {others}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 80, f"{node.name} is too long"


def test_settings_stay_few():
    folders = ("conf", "experiments", "benchmarks/protocols")
    assert sum(len(list((ROOT / f).rglob("*.yaml"))) for f in folders) <= 60


def test_nothing_unpickles_or_runs_a_shell():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert not name.startswith("pickle."), path
            assert keywords.get("shell") != "True" and name != "os.system", path
            assert keywords.get("allow_pickle") != "True", path
            if name == "torch.load":
                assert path.name == "weights.py" and keywords.get("weights_only") == "True", path
            if name in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle") == "False", path

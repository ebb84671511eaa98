"""The one Hydra wrapper of all commands: where settings are found, and how errors reach the user.

A command is `def main() -> None: command.run("train", body)`; conf/<name>.yaml starts its defaults list
with `- common`. Nothing heavy is imported here: `--help` must answer at once, so bodies import what they use.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import hydra
import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Item = TypeVar("Item")
_FULL = "HYDRA_FULL_ERROR"
_USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException, yaml.YAMLError, FloatingPointError)


def root() -> Path:
    """The folder holding conf/, experiments/ and benchmarks/: the checkout, or vgr/_files in a wheel."""
    package = Path(__file__).resolve().parent
    return package.parent if (package.parent / "conf").is_dir() else package / "_files"


class ExperimentsSource(FileConfigSource):
    """The root folder as a config source that shows only experiments/ (a checkout holds much else), with arms."""

    @staticmethod
    def scheme() -> str:
        return "vgr"

    def is_group(self, config_path: str) -> bool:
        return config_path.split("/")[0] in ("", "experiments") and super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        if not config_path.startswith("experiments/"):
            return False
        return super().is_config(config_path) or self._arm(config_path) is not None

    def load_config(self, config_path: str) -> ConfigResult:
        from vgr import studies

        if (preset := self._arm(config_path)) is None:
            return super().load_config(config_path)
        told = (self.provider, self.full_path(), studies.config(preset))
        return ConfigResult(*told, header={"package": "_global_"})

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        from vgr import studies

        listed, group = super().list(config_path, results_filter), config_path.strip("/").removeprefix("experiments/")
        if group in studies.names() and results_filter is not ObjectType.GROUP:
            listed += (name.partition("/")[2] for name in studies.presets() if name.startswith(f"{group}/"))
        return sorted(listed)

    @staticmethod
    def _arm(config_path: str) -> str | None:
        """The preset of a path, if it is an arm of a study."""
        from vgr import studies

        preset = config_path.removeprefix("experiments/").removesuffix(".yaml")
        return None if studies.find(preset) is None else preset


class ExperimentsPath(SearchPathPlugin):
    """Adds the presets of experiments/ to Hydra's search path, after conf/."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("vgr-experiments", f"vgr://{root()}")


def setup() -> None:
    """Register the presets' folder with Hydra; harmless when repeated. For tests that compose configs."""
    Plugins.instance().register(ExperimentsSource)
    Plugins.instance().register(ExperimentsPath)


class SweepError(Exception):
    """A job of a sweep has failed and said so; the other jobs go on. code: its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run(config_name: str, body: Callable[[DictConfig], None]) -> None:
    """Parse the command line, compose conf/<config_name>.yaml and call body(cfg).

    A user's mistake (ValueError, OSError, anything Hydra or OmegaConf refuses) ends as one line on stderr
    and exit code 2, a diverged run (FloatingPointError) with code 3; a traceback only if HYDRA_FULL_ERROR=1.
    A sweep (-m) tells the errors of a job, goes on with the next and ends with the least code of those that failed.
    """
    full, codes = os.environ.get(_FULL) == "1", []

    def told(error: Exception, job: str = "") -> int:
        """Say what is wrong; the exit code. Raises what is no user's mistake."""
        while isinstance(error, InstantiationException) and error.__cause__ is not None:
            error = error.__cause__
        if full or not isinstance(error, _USER_ERRORS):
            raise error
        print(f"vgr-{config_name}: error: {job}{explain(error, config_name)}", file=sys.stderr, flush=True)
        return 3 if isinstance(error, FloatingPointError) else 2

    def guarded(call: Callable[[], object]) -> None:
        try:
            call()
        except SweepError as error:
            sys.exit(min([error.code, *codes]))
        except Exception as error:
            sys.exit(told(error))
        finally:
            if not full:
                os.environ.pop(_FULL, None)

    def swept(call: Callable[[], object]) -> None:
        code = 0
        try:
            call()
        except Exception as error:
            try:
                code = told(error, f"{' '.join(HydraConfig.get().overrides.task)}: ")
            except Exception:
                traceback.print_exc()
                code = 1
        if code:  # raised here, it does not keep the networks of the job
            codes.append(code)
            raise SweepError(code)

    def job(cfg: DictConfig) -> None:
        # Guarded here too: an error that leaves a job makes Hydra print lines of its own.
        sweep = HydraConfig.get().mode is RunMode.MULTIRUN
        (swept if sweep else guarded)(lambda: (check_keys(cfg, config_name), body(cfg)))

    setup()
    os.environ[_FULL] = "1"  # makes Hydra raise instead of printing and exiting
    guarded(hydra.main(config_path=str(root() / "conf"), config_name=config_name, version_base="1.3")(job))


# Settings that decide how a run is carried out, not what comes out of it (micro_batch, backends: up to rounding).
NOT_RESULTS = (
    "trainer", "fsdp", "compile", "logger", "wandb", "plan", "profile", "watchdog_s", "every", "bench", "keep", "runs",
    "resume", "hydra", "data.workers", "data.micro_batch", "model.attention_backend", "model.scan_backend",
)  # fmt: skip


def changes_results(key: str) -> bool:
    """False for settings and groups of NOT_RESULTS and whatever lies below them."""
    return not any(key == name or key.startswith((f"{name}.", f"{name}@", f"{name}/")) for name in NOT_RESULTS)


def run_folder(runs: str, experiment: str | None, overrides: Iterable[str], seed: int) -> Path:
    """runs/<experiment>[--<overrides that change results>]/seed<k>; a command always finds its own folder."""
    told = []
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~").split("@")[0]
        if key == "size":
            experiment = f"{experiment or 'default'}_{value}"
        elif changes_results(key) and key not in ("seed", "experiments"):
            told.append((key, value))
    # No "=" or ",": the folder's name can be given as a value, checkpoint=..., without quotes.
    full = "+".join(f"{key}-{value}" for key, value in sorted(told))
    clean = re.sub(r"[^\w.+-]", "_", full)
    if clean != full or full.count("+") >= len(told) > 0 or len(clean) > 100:
        clean = f"{clean[:80]}-{hashlib.sha256(repr(sorted(told)).encode()).hexdigest()[:8]}"
    name = experiment or "default"
    return Path(runs) / (f"{name}--{clean}" if told else name) / f"seed{seed}"


def explain(error: BaseException, config_name: str) -> str:
    """One line saying what is wrong and, for misspelt keys and presets, what was probably meant."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.partition("/")
        options = sorted({*(error.options or []), *(presets() if group == "experiments" else [])})
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
        hint = f"did you mean {group}={near[0]}? " if near else ""
        return f"{group}={name} does not exist; {hint}Choices of {group}: {', '.join(options) or 'none'}"
    misspelt = re.search(r"Could not override '([^'@]+)", text) or re.search(r"Key '([^']+)' is not in", text)
    if misspelt:
        valid = flat(OmegaConf.to_container(compose(config_name)))
        return f"no setting called `{misspelt[1]}`{suggestion(misspelt[1], valid)}"
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, HydraException) and error.__cause__ is not None:
        text = f"{text}: {error.__cause__}"
    return " ".join((text or type(error).__name__).split())


def suggestion(name: str, valid: Iterable[str], otherwise: str = "; --help lists all") -> str:
    """`; did you mean ...?` by spelling; the last part of a dotted key counts on its own too. Never the name itself,
    which another preset may have."""
    valid = sorted(set(valid) - {name})
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.7)
    if not near:
        last = {key.rsplit(".", 1)[-1]: key for key in valid}
        near = [last[k] for k in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1, cutoff=0.7)]
    return f"; did you mean `{near[0]}`?" if near else otherwise


def presets() -> list[str]:
    """Names of the shipped presets, e.g. world_model/tiny, and of the arms of studies."""
    from vgr import studies

    base = root() / "experiments"
    return sorted([*(p.relative_to(base).with_suffix("").as_posix() for p in base.rglob("*.yaml")), *studies.presets()])


def preset_header(name: str) -> dict[str, str]:
    """What a shipped preset says of itself: Question, Paper, Hardware, Hours, Needs; Memory where it was measured."""
    from vgr import studies

    if studies.find(name) is not None:
        return studies.header(name)
    text = (root() / "experiments" / f"{name}.yaml").read_text(encoding="utf-8")
    return dict(re.findall(r"^# (\w+): *(.+)$", text, re.MULTILINE))


def compose(config_name: str, overrides: Iterable[str] = ()) -> DictConfig:
    """The composed config, whatever the command line says (lists of presets, tests, valid keys)."""
    setup()
    GlobalHydra.instance().clear()  # else it refuses inside a job; Hydra's own run no longer needs it there
    with hydra.initialize_config_dir(str(root() / "conf"), version_base="1.3"):
        return hydra.compose(config_name, list(overrides))


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """All nodes of a nested dict, inner ones too, by dotted key."""
    found = {}
    for key, value in node.items():
        found[f"{prefix}{key}"] = value
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
    return found


def check_keys(cfg: DictConfig, config_name: str) -> None:
    """Refuse top-level keys that a preset adds and conf/<config_name>.yaml lacks (Hydra lets them pass)."""
    base = compose(config_name)
    for key in cfg:
        if key not in base:
            raise ValueError(f"no setting called `{key}`{suggestion(str(key), map(str, base))}")


def check_targets(cfg: Any, path: str = "") -> None:
    """Compare every section that has a `_target_` with its constructor, before anything is built.

    Raises ValueError naming the key that the constructor does not take, or the argument it misses.
    """
    if not isinstance(cfg, DictConfig):
        return
    for key in cfg:
        check_targets(cfg[key], f"{path}.{key}" if path else str(key))
    if not cfg.get("_target_"):
        return
    parameters = inspect.signature(hydra.utils.get_object(cfg._target_)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in cfg:
        if key not in parameters and key not in ("_target_", "_partial_", "_convert_"):
            hint = suggestion(str(key), parameters, f"; it takes {', '.join(parameters)}")
            raise ValueError(f"{path}: {cfg._target_} takes no `{key}`{hint}")


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """A bar with time left, or a plain line every tenth if stderr is no terminal; yields done(n).

    The first call may say how many stood already.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=label, smoothing=0.1, dynamic_ncols=True) as bar:
            yield lambda n: bar.update(n) and None
        return
    start, counts = time.monotonic(), [0]

    def done(n: int) -> None:
        counts.append(min(counts[-1] + n, total))
        first, before, count = counts[1], *counts[-2:]
        if 10 * count // total > 10 * before // total:
            spent = time.monotonic() - start
            left = f", {spent * (total - count) / (count - first):.0f} s left" if count > first else ""
            print(f"{label}: {count}/{total}, {spent:.0f} s{left}", file=sys.stderr, flush=True)

    yield done


def tracked(items: Sequence[Item], label: str) -> Iterator[Item]:
    """The items one after another, each counted by `progress` when the next is asked for."""
    with progress(len(items), label) as done:
        for item in items:
            yield item
            done(1)

"""FSDP2, hybrid sharding and clips shared by ranks: 20 steps of every kind of training are those of one rank."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from omegaconf import OmegaConf

from vgr.train import build, read_initial
from vgr.training import checkpoints

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from small_training import PRESET, environment, metrics, train  # noqa: E402
from test_causal_stages import HEAD, _preset, make_causal_project  # noqa: E402

ONE = "one/mini/seed1"
AGAIN = PRESET.replace("text_width: 16}", "text_width: 16, activation_checkpointing: true}")
FORCING = (
    AGAIN.replace("defaults:\n", "defaults:\n  - override /training: self_forcing\n").replace(
        "max_samples: 160, warmup_samples: 16, ", "max_samples: 48, critic_steps: 2, chunk: 2, "
    )
    + f"student_times: [1.0, 0.75, 0.0]\ninit_from: {ONE}\nteacher: {ONE}\n"
)
# No judge: it sees whole clips. Segments: a state that grows over updates.
SEGMENTS = _preset("student").replace("runs/base", "one/base").replace(f"adversarial: 0.01, {HEAD}, ", "")
ADAPTERS = PRESET + f"init_from: {ONE}\nlora: {{rank: 2, targets: [qkv]}}\n"
PRESETS = {"base": _preset("base"), "forcing": FORCING, "segments": SEGMENTS, "adapters": ADAPTERS}
FSDP = ("trainer.strategy=fsdp", "trainer.accelerator=cpu")
LAYOUTS = {
    "fsdp": (2, ("trainer.devices=2",)),
    "context": (2, ("trainer.devices=2", "fsdp.context=2")),
    "hybrid": (4, ("trainer.devices=4", "fsdp.replicas=2", "fsdp.context=2")),
    "ddp": (2, ("trainer.devices=2", "trainer.strategy=ddp")),
    "compiled": (2, ("trainer.devices=2", "compile=true")),
}
# All trainings of a layout in one process a rank: to import torch takes longer than they do.
PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
from small_training import train
for line in sys.stdin.read().splitlines():
    done = train(os.getcwd(), *line.split())
    if done.returncode:
        sys.exit(f"{line}: {done.stderr[-3000:]}")
sys.stderr.flush()
os._exit(0)  # Gloo's threads may still drop tensors of Python's
"""


def launch(folder: Path, ranks: int, lines: list[str]) -> None:
    """vgr-train with each line's arguments, one after another, on so many ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    started = []
    for rank in range(ranks):
        own = {**os.environ, **environment(), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
        arguments = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1] / "integration")]
        started.append(
            subprocess.Popen(arguments, cwd=folder, env=own, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    for process in started:
        process.stdin.write("\n".join(lines))
        process.stdin.close()
    told = [process.stderr.read() for process in started]
    assert not any(process.wait(timeout=300) for process in started), "\n".join(told)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_causal_project(tmp_path_factory.mktemp("layouts"), PRESETS)
    for name in ("mini", *PRESETS):
        done = train(folder, "runs=one", f"experiments={name}", "every.sample=40")
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


def _alike(one, many):
    """Losses, norms and validation to rounding; ratios of a micro-batch's spread depend on its size."""
    assert [x.keys() for x in one] == [x.keys() for x in many]
    for a, b in zip(one, many):
        told = {k: v for k, v in a.items() if not k.endswith("_ratio")}
        assert told == pytest.approx({k: b[k] for k in told}, rel=2e-3, abs=2e-4)


SOME = {"fsdp": ("mini", "forcing"), "context": ("base", "forcing")}
ALL = ("mini", *PRESETS)
SLOW = {x: ALL for x in LAYOUTS} | {"compiled": ("mini", "adapters")}
CASES = [*SOME.items(), *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW.items())]


@pytest.mark.parametrize(("layout", "names"), CASES)
def test_every_layout_takes_the_steps_of_one_rank(folder, layout, names):
    ranks, own = LAYOUTS[layout]
    sharing = 2 if any("context" in x for x in own) else 1
    runs = f"{layout}_{len(names)}"
    lines = [
        " ".join((f"experiments={name}", f"runs={runs}", "every.sample=40", *FSDP, *own,
                  f"data.micro_batch={8 * sharing // ranks if name == 'segments' else 2}"))
        for name in names
    ]  # fmt: skip
    launch(folder, ranks, lines)
    for name in names:
        one, many = folder / f"one/{name}/seed1", folder / f"{runs}/{name}/seed1"
        _alike(metrics(one), metrics(many))
        assert [p.name for p in (many / "samples").iterdir()] == [p.name for p in (one / "samples").iterdir()]
        single, split = (checkpoints.read_weights(checkpoints.latest(r / "checkpoints")) for r in (one, many))
        # Adam turns the rounding of a gradient near zero into a part of a step (3e-3).
        assert single.keys() == split.keys() and all((single[k] - split[k]).abs().max() < 3e-4 for k in single), name


@pytest.mark.parametrize("name", ["forcing", "segments", "adapters"])
def test_no_rank_makes_the_whole_of_split_networks_that_have_weights(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    cfg = OmegaConf.load(f"one/{name}/seed1/config.yaml")
    if name == "segments":
        cfg = OmegaConf.merge(cfg, OmegaConf.create(f"training: {{adversarial: 0.01, {HEAD}}}"))
    alone = build(cfg, read_initial(cfg, None))[0].state_dict()
    cfg.trainer.strategy = "fsdp"
    with mock.patch.object(checkpoints, "read_weights", side_effect=AssertionError("weights were read")):
        module, *_ = build(cfg, read_initial(cfg, None))
    made = {name for name, x in module.state_dict().items() if not x.is_meta}
    assert made and all(x.startswith(("text.", "ema.text.", "teacher.text.", "judge.")) or ".lora_" in x for x in made)
    assert all(torch.equal(module.state_dict()[x], alone[x]) for x in made)  # drawn alike, whatever was not
    filled = {f"{network}.{own}": x for network, tensors in module.initial.items() for own, x in tensors.items()}
    assert filled.keys() | made == alone.keys() and all(torch.equal(x, alone[own]) for own, x in filled.items())


def test_weights_of_a_split_model_must_fit_it(folder, monkeypatch):
    monkeypatch.chdir(folder)
    cfg = OmegaConf.load("one/forcing/seed1/config.yaml")
    cfg.trainer.strategy = "fsdp"
    initial = {k: v for k, v in read_initial(cfg, None).items() if k != "model.final_table"}
    with pytest.raises(ValueError, match=r"weights do not fit the model in 1 tensors \(final_table\)"):
        build(cfg, initial)
    begun, *_ = build(OmegaConf.merge(cfg, {"init_from": None}))
    assert not any(x.is_meta for x in begun.model.parameters())  # of nothing stored every rank makes it


@pytest.mark.slow
def test_saved_on_two_split_ranks_a_run_goes_on_on_one_and_on_four(folder):
    start = "experiments=mini data.micro_batch=2 every.save=80 trainer.accelerator=cpu"
    launch(folder, 2, [f"runs=moved trainer.strategy=fsdp trainer.devices=2 {start}"])
    run = folder / "moved/mini/seed1"
    end = checkpoints.weights_hash(checkpoints.latest(run / "checkpoints"), "weights")
    whole = checkpoints.read_weights(checkpoints.latest(run / "checkpoints"))
    for ranks in (1, 4, 2):
        (run / "checkpoints/latest").write_text("step_00000010\n")
        if ranks == 1:
            assert train(folder, "runs=moved", *start.split()).returncode == 0
        else:
            launch(folder, ranks, [f"runs=moved trainer.strategy=fsdp trainer.devices={ranks} {start}"])
        again = checkpoints.read_weights(checkpoints.latest(run / "checkpoints"))
        assert all((whole[k] - again[k]).abs().max() < 1e-4 for k in whole)
        assert metrics(run)[-1]["samples_seen"] == 160
    assert checkpoints.weights_hash(checkpoints.latest(run / "checkpoints"), "weights") == end  # as before, bit by bit


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("trainer.devices=2", "fsdp.replicas=3"), "fsdp.replicas=3, fsdp.context=1: 2 ranks"),
        (("trainer.devices=4", "fsdp.context=3"), "fsdp.replicas=1, fsdp.context=3: 4 ranks"),
        (("trainer.devices=2", "every.bench=8"), "every.bench=8: ranks of a split model measure together"),
        (("trainer.devices=8",), "training.global_batch=8 is not a multiple of data.micro_batch=4 x 8 devices"),
    ],
)
def test_layouts_that_cannot_be_are_refused_before_ranks_start(folder, arguments, told):
    done = train(folder, "runs=refused", *FSDP, *arguments)
    assert done.returncode == 2 and told in done.stderr

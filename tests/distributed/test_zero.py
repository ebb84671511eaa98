"""DeepSpeed's ZeRO-2 and ZeRO-3: the steps of one device, files that any strategy goes on from, and what is refused."""

import importlib.util
import math

import pytest
from omegaconf import OmegaConf

from tests.distributed import test_layouts
from tests.distributed.test_layouts import _preset, launch, make_causal_project, metrics, train
from vgr import command, planner
from vgr.train import build, read_initial
from vgr.training import checkpoints, zero

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is an extra: pip install 'vgr[deepspeed]'"
)
PRESETS = {
    "base": _preset("base"),
    "again": test_layouts.AGAIN,
    "jump": _preset("jump").replace("runs/base", "one/base"),
    "adapters": test_layouts.ADAPTERS,
    "forcing": test_layouts.FORCING,
}
# Largest difference of weights. Adam turns the rounding of a gradient near zero into a part of a step (3e-3): a jump's
# losses are below 1e-4 from the start.
BOUND = {"jump": 2e-3}


def arguments(stage: str, runs: str, *told: str) -> str:
    own = (f"runs={runs}", f"trainer.strategy={stage}", "trainer.devices=2", "data.micro_batch=2")
    return " ".join((*own, "trainer.accelerator=cpu", *told))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_causal_project(tmp_path_factory.mktemp("zero"), PRESETS)


def one_device(folder, name: str):
    """The run of a preset on one device, made once."""
    run = folder / f"one/{name}/seed1"
    if not run.exists():
        for needed in {"jump": ("base",), "adapters": ("mini",)}.get(name, ()):
            one_device(folder, needed)
        done = train(folder, "runs=one", f"experiments={name}", "every.sample=40")
        assert done.returncode == 0, done.stderr[-2000:]
    return run


def parts(run):
    checkpoint = checkpoints.latest(run / "checkpoints")
    return {part: checkpoints.read_weights(checkpoint, part) for part in ("weights", "ema", "optimizer")}


def assert_alike(one, many, bound=1e-5):
    """Losses, norms and validation to 1e-3 of themselves, which 20 steps make of fp32's 1e-7; weights to `bound`."""
    for a, b in zip(metrics(one), metrics(many), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    single, split = parts(one), parts(many)
    for part in single:
        assert single[part].keys() == split[part].keys()
    for part in ("weights", "ema"):
        assert max(float((x - split[part][k]).abs().max()) for k, x in single[part].items()) < bound


CASES = [
    ("zero2", ("base",)),
    ("zero3", ("base",)),
    pytest.param("zero2", ("mini", "again", "jump", "adapters"), marks=pytest.mark.slow),
    pytest.param("zero3", ("mini", "again", "jump"), marks=pytest.mark.slow),
]


@needs_deepspeed
@pytest.mark.parametrize(("stage", "names"), CASES)
def test_two_ranks_take_the_steps_of_one_device(folder, stage, names):
    ones = [one_device(folder, name) for name in names]
    launch(folder, 2, [arguments(stage, stage, f"experiments={name}", "every.sample=40") for name in names])
    for name, one in zip(names, ones):
        many = folder / f"{stage}/{name}/seed1"
        assert_alike(one, many, BOUND.get(name, 1e-5))
        assert [p.name for p in (many / "samples").iterdir()] == [p.name for p in (one / "samples").iterdir()]
        files = checkpoints.latest(many / "checkpoints")
        assert all(len(list((files / part).iterdir())) == 2 for part in ("weights", "ema", "optimizer"))
        first = [[x["train/loss"] for x in metrics(run)[:3]] for run in (one, many)]
        assert first[0] == pytest.approx(first[1], rel=1e-6)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_run_goes_on_in_the_same_bits_and_under_other_strategies(folder, stage):
    """Set back to its middle, as a kill would leave it; then from there on by others, and from theirs on by ZeRO."""
    one, run = one_device(folder, "mini"), folder / f"{stage}_again/mini/seed1"

    def go_on(*lines: str, ranks: int = 2) -> None:
        (run / "checkpoints/latest").write_text("step_00000010\n")
        if ranks == 1:
            assert train(folder, *lines).returncode == 0
        else:
            launch(folder, ranks, list(lines))

    own = arguments(stage, f"{stage}_again", "every.save=80")
    launch(folder, 2, [own])
    end = {part: checkpoints.weights_hash(checkpoints.latest(run / "checkpoints"), part) for part in parts(run)}
    go_on(own)
    assert end == {part: checkpoints.weights_hash(checkpoints.latest(run / "checkpoints"), part) for part in end}
    go_on(f"runs={stage}_again", "every.save=80", ranks=1)
    assert_alike(one, run)
    other = {"zero2": "fsdp", "zero3": "zero2"}[stage]
    go_on(arguments(other, f"{stage}_again", "every.save=80"))
    assert_alike(one, run)
    (folder / f"{stage}_from/mini").mkdir(parents=True)
    launch(folder, 2, [arguments("fsdp", f"{stage}_from", "every.save=80")])
    (folder / f"{stage}_from/mini/seed1/checkpoints/latest").write_text("step_00000010\n")
    launch(folder, 2, [arguments(stage, f"{stage}_from", "every.save=80")])
    assert_alike(one, folder / f"{stage}_from/mini/seed1")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_poisoned_sample_stops_all_ranks_before_its_step(tmp_path, stage):
    folder = make_causal_project(tmp_path, {}, poison={17})
    with pytest.raises(AssertionError, match="vgr-train: error: training stopped at step"):
        launch(folder, 2, [arguments(stage, "runs", "every.save=8")])
    good = checkpoints.latest(folder / "runs/mini/seed1/checkpoints")
    assert good is not None and all(x.isfinite().all() for x in checkpoints.read_weights(good, "weights").values())


def test_no_rank_makes_the_whole_of_a_model_that_zero3_splits(folder, monkeypatch):
    one_device(folder, "mini")
    monkeypatch.chdir(folder)
    cfg = OmegaConf.load("one/mini/seed1/config.yaml")
    cfg.trainer.strategy, cfg.init_from = "zero3", "one/mini/seed1"
    module, *_ = build(cfg, read_initial(cfg, None))
    assert all(x.is_meta for x in (*module.model.parameters(), *module.ema["model"].parameters())) and module.initial


@pytest.mark.parametrize(
    ("told", "error"),
    [
        (("trainer.strategy=zero2", "experiments=forcing"), "self-forcing has two: use fsdp"),
        (("trainer.strategy=zero2", "fsdp.replicas=2"), "fsdp.replicas=2, fsdp.context=1 are for"),
        (("trainer.strategy=zero3", "experiments=adapters"), "lora.rank=2: zero3 splits networks that are trained"),
        (("trainer.strategy=zero3", "compile=true"), "compile=true: "),
        (("trainer.strategy=zero3", "trainer.devices=2", "every.bench=8"), "every.bench=8: ranks of a split model"),
        (("trainer.strategy=zero1",), "choose auto, ddp, fsdp, zero2 or zero3"),
    ],
)
def test_what_zero_cannot_do_is_refused_by_name_before_anything_is_read(folder, told, error):
    done = train(folder, "runs=refused", "shards=nowhere", "trainer.accelerator=cpu", *told)
    assert done.returncode == 2 and error in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_missing_deepspeed_is_told_with_its_remedy_before_data_is_read(folder, monkeypatch):
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    done = train(folder, "runs=refused", "shards=nowhere", "trainer.accelerator=cpu", "trainer.strategy=zero2")
    assert done.returncode == 2 and "pip install 'vgr[deepspeed]'" in done.stderr, done.stderr


def test_the_planner_deals_what_each_stage_splits():
    cfg = command.compose("train", ["experiments=world_model/tiny", "data.frames=5", "model.width=64"])
    module = planner.module_of(cfg)
    trainer = {"devices": 4, "num_nodes": 2, "accumulate_grad_batches": 1, "replicas": 1, "context": 1}
    whole = planner.held(module, planner.Layout())
    for stage, split in (("zero2", {"gradients", "moments"}), ("zero3", set(whole))):
        dealt = planner.layout({**trainer, "strategy": stage})
        assert dealt == planner.Layout(8, 8, kind=stage)
        held = planner.held(module, dealt)
        assert all(math.isclose(held[k], whole[k] / (8 if k in split else 1)) for k in whole)
        assert held["stepped copy"] == whole["gradients"] / 8 and ("gathered block" in held) == (stage == "zero3")

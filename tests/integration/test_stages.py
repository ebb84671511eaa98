"""The chain of stages on a really tiny problem: each from the last one's file, resumable, sampled by its own method."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from small_training import PRESET, make_project, metrics, train

from vgr.training import checkpoints

TIMES = [1.0, 0.75, 0.0]
STAGES = {
    "causal": "training: {chunk: 2}\ninit_from: runs/mini/seed1\nsampling: {method: chunk_flow, steps: 2}\n",
    "ode": "training: {chunk: 2}\ninit_from: runs/causal/seed1\n"
    "sampling: {method: stream, sigmas: [1.0, 0.75, 0.0]}\n",
    "forcing": "training: {critic_steps: 2, chunk: 2, adversarial: 0.01, judge: {_target_: vgr.models.critic.Judge, "
    "width: 32, layers: [0, 1], inner: 16, heads: 2}}\ninit_from: runs/ode/seed1\nteacher: runs/mini/seed1\n"
    "sampling: {method: stream, sigmas: [1.0, 0.75, 0.0]}\n",
}


def _preset(stage: str) -> str:
    text = PRESET.split("sampling:")[0].replace("max_samples: 160", "max_samples: 48").replace("save: 24", "save: 16")
    kind = {"ode": "ode", "forcing": "self_forcing"}.get(stage)
    if kind:
        text = text.replace("defaults:\n", f"defaults:\n  - override /training: {kind}\n")
        text = text.replace("warmup_samples: 16, ", "")
    body = STAGES[stage]
    if "training:" in body:  # one section a file
        own = body.split("training: {")[1].split("}\n")[0]
        text, body = text.replace("training: {", f"training: {{{own}, "), body.replace(f"training: {{{own}}}\n", "")
    if kind == "ode":
        text = text.replace("data: {", "data: {train: paths/train, ")
    return text + "student_times: [1.0, 0.75, 0.0]\n" + body


def _copy_with(run, new, **changes):
    """A copy of a run that says something else of itself in generator.json."""
    shutil.copytree(run, new)
    record = checkpoints.latest(new / "checkpoints") / "generator.json"
    manifest, was = record.parent / "manifest.json", hashlib.sha256(record.read_bytes()).hexdigest()
    record.write_text(json.dumps({**json.loads(record.read_text()), **changes}))
    manifest.write_text(manifest.read_text().replace(was, hashlib.sha256(record.read_bytes()).hexdigest()))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    from vgr.training.teacher_paths import TeacherPaths

    folder = make_project(tmp_path_factory.mktemp("stages"))
    for stage in STAGES:
        (folder / "own/experiments" / f"{stage}.yaml").write_text(_preset(stage))
    done = {"mini": train(folder)}
    done["causal"] = train(folder, "experiments=causal")
    _copy_with(folder / "runs/mini/seed1", folder / "runs/codec/seed1", codec_fingerprint="0123456789abcdef")
    _copy_with(folder / "runs/mini/seed1", folder / "runs/other/seed1", size_hw=[64, 64])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        paths = TeacherPaths("runs/mini/seed1", "shards/train", TIMES, 8, 4, 3.0, 1.5)
        assert paths.write(folder / "paths/train", 40, 1, lambda done: None, "cpu") == 40
        assert paths.write(folder / "paths/train", 40, 1, lambda done: None, "cpu") == 0
        with pytest.raises(ValueError, match="is chunk-causal"):
            TeacherPaths("runs/causal/seed1", "shards/train", TIMES, 8, 4, 3.0, 1.5)
    for stage in ("ode", "forcing"):
        done[stage] = train(folder, f"experiments={stage}")
    return folder, done


@pytest.mark.parametrize("stage", ["causal", "ode", "forcing"])
def test_each_stage_trains_from_the_last(chain, stage):
    folder, done = chain
    assert done[stage].returncode == 0, done[stage].stderr[-2000:]
    lines = metrics(folder / f"runs/{stage}/seed1")
    assert all(np.isfinite(x["train/loss"]) for x in lines if "train/loss" in x)
    state = checkpoints.read_state(checkpoints.latest(folder / f"runs/{stage}/seed1/checkpoints"))
    assert state["samples_seen"] == 48
    if stage == "forcing":
        assert len(state["config"]["teacher_sha256"]) == 64
        told = {"student_loss", "motion_ratio", "std_ratio", "critic_gap", "critic_grad_norm", "judge_loss"}
        assert {f"train/{name}" for name in told} <= {key for line in lines for key in line}


@pytest.mark.parametrize("stage", ["ode", "forcing"])
def test_a_stage_resumes_to_the_same_weights(chain, stage):
    """Set back to the first save and run again, it ends in the same bits; two optimizers, critic and judge included."""
    folder, _ = chain
    run = folder / f"runs/{stage}/seed1"
    last = checkpoints.latest(run / "checkpoints")
    parts = ("weights", "ema", "optimizer")
    before, told = {p: checkpoints.weights_hash(last, p) for p in parts}, metrics(run)
    (run / "checkpoints/latest").write_text(sorted(p.name for p in (run / "checkpoints").glob("step_*"))[0])
    assert train(folder, f"experiments={stage}").returncode == 0
    assert checkpoints.latest(run / "checkpoints") == last
    assert {p: checkpoints.weights_hash(last, p) for p in parts} == before
    assert metrics(run) == told


@pytest.mark.parametrize("stage", ["mini", "causal", "ode", "forcing"])
def test_each_stage_samples_by_its_own_method(chain, stage):
    import torch

    from vgr.generator import Generator
    from vgr.types import Cameras

    folder, _ = chain
    generator = Generator.load(folder / f"runs/{stage}/seed1", "cpu")
    cameras = Cameras(torch.eye(4).expand(2, 17, 4, 4), torch.tensor([0.5, 0.6, 0.5, 0.5]).expand(2, 17, 4))
    calls = []
    videos, timings = generator(np.zeros((2, 32, 32, 3), np.uint8), cameras, (("a",), ("b",)), [1, 2], calls.append)
    assert videos.shape == (2, 17, 32, 32, 3) and timings["frames"] == 17
    # 5 latent frames: steps of the whole clip, staggered steps of two chunks, or chunks as they come.
    assert len(calls) == {"mini": 2, "causal": 3}.get(stage, 2)
    if stage in ("ode", "forcing"):
        assert timings["first_frame_s"] < timings["total_s"]


def test_guidance_of_a_student_is_refused_unless_it_samples_as_a_teacher(chain):
    from vgr.generator import Generator

    student = chain[0] / "runs/forcing/seed1"
    with pytest.raises(ValueError, match="guidance=3.0: .* is a few-step student"):
        Generator.load(student, "cpu", guidance=3.0)
    assert Generator.load(student, "cpu", guidance=1.0).sampling["sigmas"] == TIMES
    assert Generator.load(student, "cpu").sampling["guidance"] == 1.0
    assert Generator.load(student, "cpu", steps=4, guidance=3.0).sampling["guidance"] == 3.0
    assert Generator.load(chain[0] / "runs/mini/seed1", "cpu", guidance=3.0).sampling["guidance"] == 3.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["experiments=forcing", "teacher=null"], "give teacher="),
        (["experiments=causal", "teacher=runs/mini/seed1"], "leave teacher=null"),
        (["experiments=ode", "student_times=[1.0,0.5,0.0]"], "holds trajectories at [1.0, 0.75, 0.0]"),
        (["experiments=causal", "data.train=paths/train"], "holds trajectories at"),
        (["experiments=forcing", "student_times=[0.9,0.0]"], "must fall from 1 to 0"),
        (["experiments=causal", "model.width=16"], "surgery=[]"),
        (["experiments=causal", "critic_from=runs/forcing/seed1"], "give both or null"),
        (["experiments=forcing", "critic_from=runs/ode/seed1"], "holds no critic"),
        (["experiments=causal", "surgery=[lens]"], "choose from latents"),
        (["experiments=forcing", "teacher=runs/causal/seed1"], "teacher=runs/causal/seed1 is chunk-causal"),
        (["experiments=forcing", "teacher=runs/codec/seed1"], "teacher=runs/codec/seed1 was trained on latents of Cos"),
        (["experiments=causal", "init_from=runs/codec/seed1"], "init_from=runs/codec/seed1 was trained on latents of"),
    ],
)
def test_mistakes_are_one_line(chain, arguments, message):
    folder, _ = chain
    done = train(folder, *arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_another_teacher_is_another_run(chain):
    folder, _ = chain
    state = checkpoints.latest(folder / "runs/forcing/seed1/checkpoints") / "state.json"
    assert json.loads(state.read_text())["config"]["teacher"] == "runs/mini/seed1"
    done = train(folder, "experiments=forcing", "runs=elsewhere", "teacher=runs/other/seed1")
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_stage_goes_on_with_the_critic_of_another(chain):
    from omegaconf import OmegaConf

    from vgr.train import build, read_initial

    folder, _ = chain
    stored = checkpoints.read_weights(checkpoints.latest(folder / "runs/forcing/seed1/checkpoints"), "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cfg = OmegaConf.load("runs/forcing/seed1/config.yaml")
        cfg.critic_from = "runs/forcing/seed1"
        module, *_ = build(cfg, read_initial(cfg, None))
    held = module.weights()
    for part in ("critic", "judge"):
        names = [name for name in stored if name.startswith(f"{part}.")]
        assert names and all((held[name] == stored[name]).all() for name in names)
    assert any((held[name] != stored[name]).any() for name in stored if name.startswith("model."))

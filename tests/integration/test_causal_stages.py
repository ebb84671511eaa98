"""The causal video model's stages on a really tiny problem: teacher forcing, few-step starts, growing sequences."""

import numpy as np
import pytest
from omegaconf import OmegaConf
from small_training import PRESET, make_project, metrics, train

from vgr import command
from vgr.training import checkpoints

TIMES = [1.0, 0.75, 0.0]
MODEL = """_target_: vgr.models.causal_video.CausalVideo
in_channels: 16
width: 32
heads: 2
layers: 2
ffn_width: 64
text_width: 16
text_length: 16
"""
HEAD = "judge: {_target_: vgr.models.critic.Judge, width: 32, layers: [0, 1], inner: 16, heads: 2}"
STAGES = {
    "base": ("teacher_forcing", "chunk: 2, warmup_samples: 16, objective: {context_noise: 0.1, shared: false}", ""),
    "paths": ("ode", "chunk: 2, packed: true, objective: {history: true, image: false}", ""),
    "jump": ("consistency", "chunk: 2, objective: {steps: 8}", "teacher: runs/base/seed1"),
    "student": (
        "self_forcing",
        "chunk: 2, critic_steps: 2, scores: causal, image: false, segment: 1, overlap: 2, adversarial: 0.01, " + HEAD,
        "teacher: runs/base/seed1",
    ),
}


def _preset(stage: str) -> str:
    kind, training, rest = STAGES[stage]
    text = PRESET.split("model:")[0] + "text:" + PRESET.split("text:")[1]
    text = text.replace("defaults:\n", f"defaults:\n  - override /model: video\n  - override /training: {kind}\n")
    if stage == "paths":
        text = text.replace("data: {", "data: {train: paths/train, ")
    if stage == "student":  # segments do not accumulate
        text = text.replace("micro_batch: 4", "micro_batch: 8")
    own = f"training: {{{training}, global_batch: 8, max_samples: 48, lr: 3.0e-3, ema_half_life: 40}}"
    lines = [own if line.startswith("training:") else line for line in text.splitlines()]
    start = "" if stage == "base" else "init_from: runs/base/seed1\n"
    return "\n".join(lines).replace("save: 24", "save: 16") + f"\nstudent_times: {TIMES}\n{start}{rest}\n"


def make_causal_project(folder, presets: dict[str, str], poison=()):
    """make_project's folder with the small causal model, the shipped preset's consistency training, and `presets`."""
    make_project(folder, poison)
    jump = command.compose("train", ["experiments=causal_video/consistency"]).training
    for name, text in {"model/video": MODEL, "training/consistency": OmegaConf.to_yaml(jump)}.items():
        (folder / "own" / name).parent.mkdir()
        (folder / f"own/{name}.yaml").write_text(text)
    for name, preset in presets.items():
        (folder / f"own/experiments/{name}.yaml").write_text(preset)
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    from vgr.training.teacher_paths import TeacherPaths

    presets = {stage: _preset(stage) for stage in STAGES}
    folder = make_causal_project(tmp_path_factory.mktemp("causal"), presets)
    done = {"base": train(folder, "experiments=base")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        paths = TeacherPaths("runs/base/seed1", "shards/train", TIMES, 8, 4, 3.0, 1.5, chunk=2, image=False)
        assert paths.write(folder / "paths/train", 40, 1, lambda done: None, "cpu") == 40
    for stage in ("paths", "jump", "student"):
        done[stage] = train(folder, f"experiments={stage}")
    return folder, done


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_from_the_base(chain, stage):
    folder, done = chain
    assert done[stage].returncode == 0, done[stage].stderr[-2000:]
    lines = metrics(folder / f"runs/{stage}/seed1")
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]["samples_seen"] == 48 and any("val/loss" in line for line in lines)


def test_self_forcing_in_segments_resumes_to_the_same_weights(chain):
    folder, _ = chain
    run = folder / "runs/student/seed1"
    last = checkpoints.latest(run / "checkpoints")
    parts = ("weights", "ema", "optimizer")
    before, told = {p: checkpoints.weights_hash(last, p) for p in parts}, metrics(run)
    (run / "checkpoints/latest").write_text(sorted(p.name for p in (run / "checkpoints").glob("step_*"))[0])
    assert train(folder, "experiments=student").returncode == 0
    assert {p: checkpoints.weights_hash(last, p) for p in parts} == before and metrics(run) == told


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["experiments=student", "training.chunk=4"], "asked in chunks of 4"),
        (["experiments=student", "training.scores=bidirectional"], "a teacher sees whole clips"),
        (["experiments=student", "data.micro_batch=4", "runs=new"], "updates within a sequence"),
        (["experiments=jump", "critic_from=runs/student/seed1"], "has no critic"),
        (["experiments=jump", "teacher=null"], "needs a teacher"),
        (["experiments=paths", "training.objective.history=false"], "with the true frames behind"),
        (["experiments=paths", "training.packed=false"], "gives the past of each chunk"),
    ],
)
def test_mistakes_are_one_line(chain, arguments, message):
    folder, _ = chain
    done = train(folder, *arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr

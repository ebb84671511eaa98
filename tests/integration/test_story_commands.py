"""The causal video model by its commands: stories to a student, directed shot by shot, exported and read again."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_training import train  # noqa: E402

from vgr import bench, command, export, prepare, sample
from vgr.models.causal_video import CausalVideo
from vgr.models.text import ByteTextEncoder
from vgr.training import budget, checkpoints

FRAMES = 21  # 11 latent frames: a chunk of four, then three, three and one that joins them
SMALL = (
    "model.width=24", "model.heads=2", "model.layers=2", "model.ffn_width=32", "model.in_channels=3",
    "codec.stride=[2,8,8]", "codec.luma=[1]", "codec.chroma=[1]", "codec.latents_mean=null", "codec.latents_std=null",
    "text.width=16", "text.length=16", "text.heads=2", "model.text_width=16", "model.text_length=16",
    "shards=shards", "data.micro_batch=2", "training.global_batch=2",
    "every.log=2", "every.validate=100", "every.save=4", "data.val_clips=2", "trainer.accelerator=cpu",
)  # fmt: skip
STORY = """
- {prompt: Kim in the blue room, seconds: 1.5}
- {prompt: Bo in the red room, seconds: 0.75}
- {prompt: Kim sits down, seconds: 0.75, cut: false}
"""


def run(main, folder, *words):
    """A command in this process: exit code, stdout and stderr."""
    out, err, code, here = io.StringIO(), io.StringIO(), 0, os.getcwd()
    os.chdir(folder)
    try:
        argv = mock.patch.object(sys, "argv", [f"vgr-{main.__module__.split('.')[-1]}", *words])
        with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as exit_:
        code = exit_.code
    finally:
        os.chdir(here)
    return code, out.getvalue(), err.getvalue()


def write_shards(folder, name="shards", clips=(12, 2), **told):
    from hydra.utils import instantiate

    from vgr.data.shards import ShardWriter

    words = ["experiments=causal_video/multi_shot", "size=story_tiny", *SMALL]
    codec = instantiate(command.compose("train", words).codec)
    shots = [{"start": 0, "end": 7, "caption": "Kim"}, {"start": 7, "end": FRAMES, "caption": "Bo"}]
    meta = {"shots": shots, "source": {}, "metric_scale": True, **told}
    c2w, intrinsics = np.tile(np.eye(4), (FRAMES, 1, 1)), np.tile([0.5, 0.5, 0.5, 0.5], (FRAMES, 1))
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val"), clips):
        args = ("CosineCodec", codec.fingerprint, (2, 8, 8), 3, (32, 32), 8.0, "CC0")
        with ShardWriter(folder / name / split, *args) as writer:
            for i in range(count):
                latents = rng.normal(size=(3, 11, 4, 4)).astype(np.float16)
                writer.add(f"{split}{i}", latents, c2w, intrinsics, {**meta, "split": split})


def stage(folder, name, *words, name_of="seed1"):
    done = train(folder, f"experiments=causal_video/{name}", "size=story_tiny", *SMALL, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    return next((folder / "runs/causal_video").glob(f"{name}*/{name_of}"))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The base, multi-shot tuning, paths under true history, ODE initialisation, self-forcing with routed memory."""
    folder = tmp_path_factory.mktemp("causal")
    (folder / "own").mkdir()
    write_shards(folder)
    runs = {"base": stage(folder, "base", "training.max_samples=4", "training.warmup_samples=2")}
    base = f"init_from={runs['base'].relative_to(folder)}"
    runs["multi_shot"] = stage(folder, "multi_shot", base, "training.max_samples=8", "training.warmup_samples=2")
    times = "[1.0,0.947,0.857,0.667,0.0]"
    code, told, err = run(
        prepare.main, folder, "data=ode", "out=paths", "train_clips=6", "source.clips=shards/train",
        f"source.teacher={runs['multi_shot'].relative_to(folder)}", f"source.times={times}", "source.steps=4",
        "source.shift=6.0", "source.guidance=2.0", "source.batch=3", "source.frames=null", "source.chunk=3",
        "source.image=false",
    )  # fmt: skip
    assert code == 0, err
    teacher = runs["multi_shot"].relative_to(folder)
    runs["ode"] = stage(
        folder, "ode", "data.train=paths/train", f"init_from={teacher}", "training.max_samples=4", f"runs={folder}/runs"
    )
    runs["consistency"] = stage(folder, "consistency", f"init_from={teacher}", "training.max_samples=4")
    runs["student"] = stage(
        folder, "self_forcing", f"teacher={teacher}", f"init_from={runs['ode'].relative_to(folder)}",
        "training.max_samples=4", "training.critic_steps=2", "training.judge.layers=[0,1]", "training.judge.inner=8",
        "model.window=1", "model.routed=2",
    )  # fmt: skip
    return folder, runs


def test_every_stage_learns_from_the_one_before(chain):
    _, runs = chain
    weights = {k: checkpoints.read_weights(checkpoints.latest(r / "checkpoints"), "weights") for k, r in runs.items()}
    name = "model.blocks.1.attn.qkv.weight"
    values = [w[name] for w in weights.values()]
    assert all(v.isfinite().all() for v in values) and not any(torch.equal(values[0], v) for v in values[1:])
    rows = [json.loads(line) for line in (runs["student"] / "metrics.jsonl").read_text().splitlines()]
    assert any("train/critic_gap" in row for row in rows)


def test_a_story_is_directed(chain, tmp_path):
    folder, runs = chain
    (folder / "story.yaml").write_text(STORY)
    words = (f"checkpoint={runs['student']}", "shots=story.yaml", "device=cpu")
    made = []
    for name in ("a", "b"):
        code, told, err = run(sample.main, folder, *words, f"out={tmp_path / name}")
        assert code == 0, err
        made.append((tmp_path / name / "video.mp4").read_bytes())
    assert made[0] == made[1]
    record = json.loads((tmp_path / "a/sample.json").read_text())
    assert [shot["frames"] for shot in record["shots"]] == [13, 6, 6]
    assert [shot["cut"] for shot in record["shots"]] == [False, True, False] and len(record["chunk_s"]) == 4
    assert not (tmp_path / "a/live.mp4").exists()


MISTAKES = [
    ("- {prompt: a, seconds: 0.3}", "the nearest that fits is seconds=0.75"),
    ("- {prompt: '', seconds: 0.75}", "has an empty prompt"),
    ("- {prompt: a, seconds: 0.75, cut: true}", "nothing to cut from"),
    ("- {prompt: a, seconds: 0.75, camera: orbit}", "no camera"),
    ("- {prompt: a, second: 0.75}", "must have prompt and seconds"),
    ("prompt: a", "must be a list of shots"),
    ("{story: ' ', shots: [{prompt: a, seconds: 0.75}]}", "must be the caption of the whole"),
    ("- {prompt: '  ', seconds: 0.75}", "has an empty prompt"),
    ("- {prompt: a, seconds: 1.5}\n- {prompt: b, seconds: 0.1}", "shot 2: seconds=0.1"),
    ("- [", "is no YAML"),
    (None, "does not exist"),
]


@pytest.mark.parametrize("text,told", MISTAKES)
def test_stories_that_cannot_be_made(chain, tmp_path, text, told):
    folder, runs = chain
    path = tmp_path / "story.yaml"
    if text is not None:
        path.write_text(text)
    code, _, err = run(sample.main, folder, f"checkpoint={runs['student']}", f"shots={path}", "device=cpu", "out=none")
    assert code == 2 and told in err and err.count("\n") == 1 and not (folder / "none").exists()


def test_memory_is_told_and_refused_before_weights_are_read(chain, tmp_path, monkeypatch):
    folder, runs = chain
    (folder / "long.yaml").write_text("- {prompt: a, seconds: 15}\n")
    words = (f"checkpoint={runs['student']}", "shots=long.yaml", "device=cpu", f"out={tmp_path / 'made'}")
    videos = []
    for place in ("device", "recomputed", "pinned"):
        code, _, err = run(sample.main, folder, *words, f"memory={{place:{place}}}")
        assert code == 0 and "memory of 61 latent frames" in err and ("made again" in err) == (place == "recomputed")
        videos.append((tmp_path / "made/video.mp4").read_bytes())
    assert videos[0] == videos[1] == videos[2]
    monkeypatch.setattr(budget, "available", lambda device: 1e-4)
    with mock.patch.object(checkpoints, "read_weights", side_effect=AssertionError("weights were read")):
        code, _, err = run(sample.main, folder, *words)
        assert code == 2 and "GB asked of cpu, which has 0.0001 GB. Make it shorter" in err and err.count("\n") == 1
        student = [f"teacher={runs['multi_shot']}", f"init_from={runs['ode']}", "model.window=1", "model.routed=2"]
        done = train(folder, "experiments=causal_video/self_forcing", "size=story_tiny", *SMALL, *student, "seed=2")
        assert done.returncode == 2 and "memory of 11 latent frames" in done.stderr and "model.place" in done.stderr
    code, _, err = run(sample.main, folder, *words, "memory={windows:3}")
    assert code == 2 and "takes window, sink" in err and err.count("\n") == 1


def test_a_student_is_benched_on_prompts_without_cuts_beyond_its_trained_length(chain, tmp_path):
    folder, runs = chain
    protocol = json.loads((Path(bench.__file__).parents[1] / "benchmarks/protocols/interactive_v1.json").read_text())
    protocol["sampling"]["seconds"], protocol["drift"]["window_s"] = 6.0, 1.5
    (tmp_path / "small.json").write_text(json.dumps({**protocol, "frames": 145}))
    rows = [{"key": key, "shots": ["Kim", "Kim sits", "Kim runs"]} for key in "ab"]
    (tmp_path / "told.json").write_text(json.dumps({"cuts": False, "prompts": rows}))
    words = (f"checkpoint={runs['student']}", f"protocol={tmp_path / 'small.json'}", "device=cpu")
    code, told, err = run(bench.main, folder, *words, f"requests={tmp_path / 'told.json'}", f"out={tmp_path / 'made'}")
    assert code == 0 and "report.html" in told, err
    found = json.loads((tmp_path / "made/results.json").read_text())
    assert found["made_by"]["frames"] == 49 > FRAMES and found["rows"]["model"]["metrics"]["cuts"]["count"] == 2
    assert found["published"]["table"] == "six prompts, 60 s" and "clip_score" in found["unavailable"]
    (tmp_path / "small.json").write_text(json.dumps({**protocol, "name": "other"}))
    words = (f"checkpoint={runs['base']}", "device=cpu", f"protocol={tmp_path / 'small.json'}")
    code, _, err = run(bench.main, folder, *words, f"requests={tmp_path / 'told.json'}", f"out={tmp_path / 'none'}")
    assert code == 2 and "other asks for 6 s, 49 frames, and" in err and err.count("\n") == 1


def test_a_run_with_a_marker_and_captions_of_the_whole_is_sampled_with_them(chain, tmp_path):
    folder, runs = chain
    words = ("init_from=null", "training.max_samples=2", "sampling.cut_prefix=Cut", "seed=3")
    marked = stage(folder, "multi_shot", *words, name_of="seed3")
    (folder / "told.yaml").write_text(f"story: Rain.\nshots:{STORY}")
    heard = []
    with mock.patch.object(ByteTextEncoder, "tokenize", autospec=True, side_effect=_hear(heard)):
        words = (f"checkpoint={marked}", "shots=told.yaml", "device=cpu", "steps=1", "guidance=1.0")
        code, _, err = run(sample.main, folder, *words, f"out={tmp_path / 'made'}")
    assert code == 0, err
    assert {row[0] for row in heard} - {""} >= {"Rain. Kim in the blue room", "CutRain. Bo in the red room"}
    assert "CutRain. Kim sits down" not in {row[0] for row in heard}  # no cut
    assert json.loads((tmp_path / "made/sample.json").read_text())["story"] == "Rain."
    told = (f"teacher={marked}", f"init_from={marked}", "model.window=1", "seed=3")
    for words, message in (
        (("multi_shot", "init_from=null", "training.cut_prefix=Cut"), "cuts are sampled as they are trained"),
        (("self_forcing", *told), "has sampling.cut_prefix='Cut'"),
        (("self_forcing", *told, "sampling.cut_prefix=Cut", "training.judge.inner=30"), "a multiple of judge.heads=4"),
    ):
        done = train(folder, f"experiments=causal_video/{words[0]}", "size=story_tiny", *SMALL, *words[1:], "seed=4")
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_caption_of_the_whole_that_training_did_not_have_is_warned_of(chain, tmp_path):
    """Or the other way round; not where both are alike."""
    folder, runs = chain
    write_shards(folder, "told", (2, 2), story="Rain.")
    words = ("init_from=null", "shards=told", "training.max_samples=2", "seed=5")
    with_story = stage(folder, "multi_shot", *words, name_of="seed5")
    (folder / "plain.yaml").write_text("- {prompt: a, seconds: 0.75}\n")
    (folder / "whole.yaml").write_text("{story: Rain., shots: [{prompt: a, seconds: 0.75}]}\n")
    expected = {
        (runs["student"], "plain"): "", (with_story, "whole"): "",
        (runs["student"], "whole"): "was trained on captions of shots alone: leave story out of whole.yaml",
        (with_story, "plain"): "was trained with a caption of the whole before each shot's: give a story in plain.yaml",
    }  # fmt: skip
    for (run_dir, name), warning in expected.items():
        words = (f"checkpoint={run_dir}", f"shots={name}.yaml", "device=cpu", "steps=1", f"out={tmp_path / 'made'}")
        code, _, err = run(sample.main, folder, *words, "guidance=1.0")
        told = [line for line in err.splitlines() if "warning" in line]
        assert code == 0 and len(told) == bool(warning) and all(line.endswith(warning) for line in told), err


def test_how_attention_is_computed_is_no_part_of_a_run(chain):
    """A finished run is found again under the other backend, which has nothing to train with on a CPU."""
    folder, runs = chain
    words = ("experiments=causal_video/multi_shot", "size=story_tiny", *SMALL, "model.attention_backend=flex")
    words += ("training.warmup_samples=2", f"init_from={runs['base'].relative_to(folder)}")
    again = train(folder, *words, "training.max_samples=8")
    assert again.returncode == 0 and f"run folder {runs['multi_shot'].relative_to(folder)}," in again.stdout
    done = train(folder, *words, "training.max_samples=8", "seed=7")
    assert done.returncode == 2 and "attention_backend=flex has no backward pass on cpu" in done.stderr
    assert done.stderr.count("\n") == 1


REFUSED = [
    (("multi_shot", "model.heads=5"), "must be an even number, got 24 / 5"),
    (("self_forcing", "model.heads=5"), "must be an even number, got 24 / 5"),
    (("multi_shot", "model.routed=2"), "model.window=null reads all history"),
    (("multi_shot", "model.attention_backend=dense"), "model.attention_backend=dense: choose torch or flex"),
    (("self_forcing", "model.window=1", "training.segment=1", "model.place=recomputed"), "use place=pinned or device"),
]


@pytest.mark.parametrize("words,message", REFUSED)
def test_settings_that_cannot_be_are_refused_before_weights_are_read(chain, words, message):
    folder, runs = chain
    given = [f"init_from={runs['ode']}", *([f"teacher={runs['multi_shot']}"] if words[0] == "self_forcing" else [])]
    with mock.patch.object(checkpoints, "read_weights", side_effect=AssertionError("weights were read")):
        name = f"experiments=causal_video/{words[0]}"
        done = train(folder, name, "size=story_tiny", *SMALL, *given, *words[1:], "seed=6")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def _hear(heard):
    tokenize = ByteTextEncoder.tokenize

    def hearing(self, captions):
        heard.extend(captions)
        return tokenize(self, captions)

    return hearing


@pytest.mark.parametrize("form", ["vgr", "diffusers", "original"])
def test_a_run_is_exported_and_read_again(chain, tmp_path, form):
    folder, runs = chain
    words = (f"checkpoint={runs['multi_shot']}", f"format={form}", f"out={tmp_path / form}")
    code, told, err = run(export.main, folder, *words)
    assert (code, err) == (0, "") and "tensors" in told
    again = CausalVideo.from_pretrained(tmp_path / form, heads=2)
    stored = checkpoints.read_weights(checkpoints.latest(runs["multi_shot"] / "checkpoints"), "ema")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, stored[f"model.{name}"]), name

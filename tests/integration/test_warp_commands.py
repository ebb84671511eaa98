"""The warp adapter by the usual commands: one video becomes windows, adapters, a PEFT folder; mistakes lose nothing."""

import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_training import make_project, train

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).parent))
from test_annotators import depth  # noqa: E402, F401
from test_export import run as export  # noqa: E402
from test_helios_training import SMALL as BASE  # noqa: E402
from test_one_video import make, walk  # noqa: E402
from test_sample import run as sample  # noqa: E402

from vgr.data.annotators import DepthModel  # noqa: E402
from vgr.data.shards import Shards  # noqa: E402
from vgr.data.video import read_video  # noqa: E402
from vgr.nn import lora  # noqa: E402
from vgr.training import checkpoints, rebuild  # noqa: E402

SMALL = [
    "experiments=warp_adapter/tiny", "trainer.accelerator=cpu", *BASE[4:7], "init_from=base", "data.video=clip.mp4",
    "data.source={frames: 17, size_hw: [96, 128], fps: 16, cameras: files, depth: files}", "data.windows=6",
    "data.val_clips=3", "training={chunk: 2, max_samples: 4, warmup_samples: 2}", "lora.rank=4", "lora.alpha=4",
    "every={log: 1, validate: 4, save: 2}",
]  # fmt: skip
# The same on a causal video model, of nothing but settings.
CAUSAL_BASE = [
    "experiments=causal_video/multi_shot", "size=story_tiny", "init_from=null", "trainer.accelerator=cpu", *BASE[4:6],
    "shards=shards", "data.val_clips=8", "model={in_channels: 16, width: 32, heads: 2, layers: 2, ffn_width: 64}",
    "training={chunk: 2, global_batch: 8, max_samples: 48, warmup_samples: 8}", "training.objective.shared=false",
    "+training.objective.first_frame_clean=1.0", "every={log: 8, validate: 48, save: 48}", "runs=causal",
]  # fmt: skip
CAUSAL = [
    *(word for word in SMALL if not word.startswith(("model=", "init_from="))), "init_from=causal/base", "runs=causal",
    "model._target_=vgr.models.causal_video.CausalVideo", "model={in_channels: 16, heads: 2, layers: 2}",
    "+model.width=32", "+model.ffn_width=64", *(f"~model.{k}" for k in ("head_dim", "options", "stage_times")),
    *(f"~model.{k}" for k in ("truncate_times", "spread_stages", "dtype")), "lora.targets=[attn.qkv,attn.proj]",
    "training.objective._target_=vgr.diffusion.objectives.next_chunk", "+training.objective.shift=3.0",
    *(f"~training.objective.{k}" for k in ("ratio", "text", "corruption", "fill")),
    "sampling={method: stream, steps: 4, shift: 3.0}",
]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("warp"))
    done = train(folder, *BASE)
    assert done.returncode == 0, done.stderr
    shutil.move(next((folder / "runs" / "warp_adapter").glob("*/seed1")), folder / "base")
    shutil.rmtree(folder / "runs")
    make(folder)
    done = train(folder, *SMALL)
    assert done.returncode == 0, done.stderr
    return folder


def run_of(project):
    return next((project / "runs" / "warp_adapter").glob("*/seed1/checkpoints/latest")).parents[1]


def test_windows_are_made_once_and_adapters_alone_are_kept(project):
    folders = list((project / "datasets" / "one_video").glob("clip-*"))
    assert len(folders) == 1
    assert [len(Shards(folders[0] / split)) for split in ("train", "val")] == [6, 3]
    kept = checkpoints.read_weights(checkpoints.resolve(run_of(project)), "weights")
    assert kept and all(".lora_" in name for name in kept)
    assert len(kept) == 2 * 4 * 2  # two blocks, four layers of each, two factors
    told = json.loads((run_of(project) / "validation.json").read_text())["summary"]
    assert {"val/loss", "val/loss_frozen", "val/loss_zero_shot", "val/gain_over_zero_shot_low"} <= told.keys()
    again = train(project, *SMALL)
    assert again.returncode == 0 and "train windows: 6/6" in again.stderr
    assert checkpoints.tensors_hash(checkpoints.read_weights(checkpoints.resolve(run_of(project)), "weights")) == (
        checkpoints.tensors_hash(kept))  # fmt: skip


def test_merged_adapters_are_the_adapted_model_and_come_off_again(project):
    checkpoint = checkpoints.resolve(run_of(project))
    merged = rebuild.rebuild(checkpoint)["model"]
    model = rebuild.rebuild(checkpoints.resolve(project / "base"))["model"]
    plain = {name: x.clone() for name, x in model.state_dict().items()}
    lora.add(model, 4, 4, ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"])
    kept = checkpoints.read_weights(checkpoint, "ema")
    model.load_state_dict({k.removeprefix("model."): v for k, v in kept.items()}, strict=False)
    from tests.unit.tiny_helios import conditioning
    from vgr.types import TextStates

    cond = conditioning(1, first=6, frames=2)
    text = TextStates(torch.randn(1, 1, 6, merged.config["text_width"]), cond.text.mask)
    cond = type(cond)(cond.layout, text, stage=0)
    x, t = torch.randn(1, 16, 2, 4, 4), torch.full((1, 2), 0.7)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, cond)[0], merged(x, t, cond)[0], rtol=1e-5, atol=1e-5)
        adapted = model(x, t, cond)[0]
        with lora.without(model):
            off = model(x, t, cond)[0]
    assert not torch.equal(adapted, off)
    assert all(torch.equal(x, plain[name]) for name, x in model.state_dict().items() if ".lora_" not in name)


def test_adapters_leave_in_pefts_form(project):
    done = export(project, f"checkpoint={run_of(project)}", "format=lora", "out=peft")
    assert done[0] == 0, done
    names = load_file(project / "peft" / "adapter_model.safetensors")
    assert "base_model.model.transformer.blocks.0.attn1.to_out.0.lora_A.weight" in names
    assert json.loads((project / "peft" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("words, told", [
    (["data.video=short.mp4"], "fewer than the 17"),
    (["data.video=nowhere.mp4"], "nowhere.mp4"),
    (["data.source.depth=sparse"], "sparse depth comes of the estimate"),
    (["data.source.moving=gone"], "data.source.moving=gone"),
    (["training.rule=middle"], "training.rule=middle"),
    (["lora.targets=[attn9]"], "lora.targets: attn9"),
])  # fmt: skip
def test_mistakes_end_in_one_line(project, words, told):
    short = project / "short"
    short.mkdir(exist_ok=True)
    make(short, frames=9)
    for path in short.iterdir():
        shutil.copy(path, project / path.name.replace("clip", "short"))
    before = sorted((project / "runs").rglob("*"))
    done = train(project, *SMALL, *words)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr.splitlines()[-1], done.stderr
    assert sorted((project / "runs").rglob("*")) == before


def test_a_path_is_followed_through_many_chunks(project, depth):  # noqa: F811
    """Longer than trained, in units of depth, with a network's depth; adapters and the frozen base alike."""
    cv2.imwrite(str(project / "small.png"), read_video(project / "clip.mp4")[0][0, :32, :32])
    words = (f"depth={depth}", "unit=depth", "path=orbit", "distance=1", "angle_deg=15", "seconds=2")
    for name, checkpoint, image in (("own", run_of(project), "clip.mp4"), ("zero-shot", "base", "small.png")):
        code, told = sample(project, f"checkpoint={checkpoint}", f"out={name}", f"first_frame={image}", *words)
        assert code == 0, told
    cameras = np.load(project / "own" / "cameras.npz")
    fps = float(cameras["fps"])
    shapes = [read_video(project / name / "video.mp4")[0].shape for name in ("own", "zero-shot")]
    assert shapes == [(1 + round(2 * fps), 96, 128, 3), (1 + round(2 * 8.0), 32, 32, 3)]
    assert len(cameras["c2w"]) == shapes[0][0]
    metres = DepthModel(depth)(read_video(project / "clip.mp4")[0][:1]).mean()
    way = np.linalg.norm(cameras["c2w"][-1, :3, 3])
    assert way == pytest.approx(2 * np.sin(np.radians(7.5)) * metres, rel=0.2)  # a chord at about the median depth


@pytest.mark.parametrize("words, told", [
    (["path=orbit"], "knows no cameras: give depth="),
    (["path=static", "unit=depth", "first_frame=clip.mp4"], "unit=depth: metres, or depth"),
    (["path=static", "unit=feet", "first_frame=clip.mp4"], "unit=feet: metres, or depth"),
    (["path=orbit", "depth=DEPTH"], "give a first_frame to begin with"),
    (["path=orbit", "depth=nowhere", "first_frame=clip.mp4"], "no local folder with config.json"),
    (["path=orbit", "depth=DEPTH", "first_frame=clip.mp4", "moving=gone"], "moving=gone"),
])  # fmt: skip
def test_what_a_path_lacks_is_told(project, depth, words, told):  # noqa: F811
    words = [word.replace("DEPTH", str(depth)) for word in words]
    code, error = sample(project, f"checkpoint={run_of(project)}", "seconds=1", "out=never", *words)
    assert code == 2 and told in error.splitlines()[-1], error
    assert not (project / "never").exists()


@pytest.fixture(scope="module")
def causal(project):
    """A run on a causal base."""
    done = train(project, *CAUSAL_BASE)
    assert done.returncode == 0, done.stderr
    shutil.move(next((project / "causal" / "causal_video").glob("*/seed1")), project / "causal" / "base")
    done = train(project, *CAUSAL)
    assert done.returncode == 0, done.stderr
    return next((project / "causal" / "warp_adapter").glob("*/seed1"))


@pytest.mark.parametrize("kind", ["helios", "causal"])
def test_the_study_runs_on_such_a_run(project, request, kind, monkeypatch):
    """benchmarks.warp_adapter on one clip: every arm makes a whole video, and the base is the adapter's."""
    from benchmarks import warp_adapter
    from vgr.data.video import Clip

    c2w, shown, maps = walk(17)
    k = np.tile(np.array([0.6, 0.8, 0.5, 0.5]), (17, 1))
    clip = Clip(shown, c2w, k, 16.0, [{"start": 0, "end": 17, "caption": "a room"}], depth=maps)
    run = request.getfixturevalue("causal") if kind == "causal" else run_of(project)
    monkeypatch.chdir(project)
    arms = warp_adapter.Arms(run, "cpu")
    assert set(warp_adapter.ARMS) - set(arms.names) == ({"LoRA, not aligned"} if kind == "causal" else set())
    made = {arm: arms.make(arm, clip, 1) for arm in arms.names}
    assert {x.shape for x in made.values()} == {(17, 96, 128, 3)}
    changed = [("frozen", "zero-shot"), ("LoRA", "LoRA, at all noise"), ("LoRA", "LoRA, not aligned")]
    assert not any(np.array_equal(made[a], made[b]) for a, b in changed if b in made)
    assert all(np.array_equal(x[0], arms.ceiling(clip)[0]) for x in made.values())  # the first frame is given
    seen = warp_adapter.seen_from_first(clip)
    assert seen[0].all() and 0.5 < seen.mean() < 1


def test_the_studys_measures():
    """The true video is where it should be; one that stands still is not, and says by how much it is off."""
    from benchmarks import warp_adapter
    from vgr.data.video import Clip

    c2w, shown, maps = walk(17)
    clip = Clip(shown, c2w, np.tile(np.array([0.6, 0.8, 0.5, 0.5]), (17, 1)), 16.0, [], depth=maps)
    seen = warp_adapter.seen_from_first(clip)
    true, still = (warp_adapter.measure(x, clip, seen) for x in (shown, shown[:1].repeat(17, 0)))
    way, turn = np.linalg.norm(c2w[::4, :3, 3] - c2w[0, :3, 3], axis=1)[1:].mean(), np.degrees(0.01 * 10)
    assert true["psnr_seen_db"] == float("inf") and true["align_trans_m"] < way / 3 and true["align_rot_deg"] < turn / 6
    assert still["align_trans_m"] == pytest.approx(way, 0.02)
    assert still["align_rot_deg"] == pytest.approx(turn, 0.02)
    rows = [{"seen": 1.0, "still": still, "frozen": still}, {"seen": 1.0, "still": still, "frozen": true}]
    told = warp_adapter.summary(rows)["frozen"]
    assert told["against"] == "still" and told["align_trans_m"]["difference"]["value"] < 0

"""The released Helios' folder by the usual commands: adapters of one video on it, then videos along a path."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import train

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).parent))
from test_annotators import depth  # noqa: E402, F401
from test_one_video import FPS, K, walk  # noqa: E402
from test_sample import run as sample  # noqa: E402
from test_umt5 import folder as umt5  # noqa: E402, F401
from tiny_helios import release  # noqa: E402

from vgr import command  # noqa: E402
from vgr.data.shards import Shards  # noqa: E402
from vgr.data.video import read_video, write_video  # noqa: E402
from vgr.generator import Generator  # noqa: E402
from vgr.geometry.formats import write_cameras  # noqa: E402
from vgr.training import checkpoints  # noqa: E402
from vgr.types import Cameras  # noqa: E402

SIZE, FRAMES = (64, 64), 70
SIZES = ["data.source.size_hw=[64,64]", "text.dtype=float32", "text.width=16", "text.length=12"]
SMALL = [
    "experiments=warp_adapter/one_video", "trainer.accelerator=cpu", "base=release", "codec.device=cpu", *SIZES,
    "model={heads: 2, head_dim: 12, layers: 2, text_width: 16, text_length: 12, "
    "options: {ffn_dim: 32, rope_dim: [4, 4, 4]}}",
    "data={video: clip.mp4, windows: 2, val_clips: 2, source: {cameras: files, depth: files, moving: keep}}",
    "lora.rank=4", "lora.alpha=4", "training={max_samples: 2, warmup_samples: 1}",
    "every={log: 1, validate: 2, save: 2}",
]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory, umt5):  # noqa: F811
    folder = tmp_path_factory.mktemp("release")
    release(folder / "release", umt5)
    c2w, shown, maps = walk(FRAMES)
    cut = slice(0, SIZE[0]), slice(0, SIZE[1])
    k = K * np.array([128 / 64, 96 / 64, 128 / 64, 96 / 64])
    write_video(folder / "clip.mp4", shown[:, cut[0], cut[1]], FPS, crf=4)
    cameras = Cameras(torch.from_numpy(c2w)[None], torch.from_numpy(np.tile(k, (FRAMES, 1)))[None])
    write_cameras(folder / "clip.npz", cameras, FPS)
    np.savez(folder / "clip.depth.npz", depth=maps[:, cut[0], cut[1]])
    (folder / "own" / "experiments").mkdir(parents=True)
    done = train(folder, *SMALL)
    assert done.returncode == 0, done.stderr
    return folder


def run_of(project):
    return next((project / "runs" / "warp_adapter").glob("*/seed1"))


def test_windows_are_of_whole_clips_and_adapters_of_the_release_are_trained(project):
    shards = Shards(next((project / "datasets" / "one_video_wan").glob("clip-*")) / "train")
    sample_, codec = shards.read(0), shards.manifest["codec"]
    assert codec["clip"] == 9 and sample_.latents.shape == (16, 18, 8, 8) and len(sample_.c2w) == 66
    latents, visible, still = sample_.warp
    assert latents.shape == (16, 18, 8, 8) and visible.shape == (66, *SIZE) and still.shape == (16, 1, 8, 8)
    assert np.allclose(latents[:, 0], sample_.latents[:, 0], atol=2e-3)  # the first warp begins with the frame itself
    kept = checkpoints.read_weights(checkpoints.resolve(run_of(project)), "weights")
    assert len(kept) == 2 * 4 * 2 and all(".lora_" in name for name in kept)
    assert all(bool(x.any()) for x in kept.values())
    told = json.loads((run_of(project) / "validation.json").read_text())["summary"]
    assert np.isfinite([told[f"val/{name}"] for name in ("loss", "loss_frozen", "loss_zero_shot")]).all()


def test_the_frozen_half_of_a_run_is_its_base_and_is_held_once(project, monkeypatch):
    monkeypatch.chdir(project)
    own = Generator.load(run_of(project), "cpu", seconds=5.0)
    assert own.max_frames == 99 and own.size_hw == SIZE and own.codec.clip == own.chunk == 9
    numbers = sum(p.numel() for p in own.model.parameters())
    cameras = Cameras(torch.eye(4).expand(1, 33, 4, 4), torch.ones(1, 33, 4))
    session = own.session(1, np.full((*SIZE, 3), 90, np.uint8), evidence=lambda cond, before: ())
    session.append("a box", 33 / own.fps)
    frozen = torch.cat(list(session.frames())).numpy()
    composed = command.compose
    settings = [x for x in SIZES if "width" not in x] + ["model.text_length=12"]
    monkeypatch.setattr(command, "compose", lambda name, words=(): composed(name, [*words, *settings]))
    from omegaconf import OmegaConf

    from vgr import sample as module

    words = dict(checkpoint="release", preset="warp_adapter/one_video", device="cpu", steps=None, guidance=None,
                 shift=None, memory=None)  # fmt: skip
    base = module.load(OmegaConf.create(words), None)
    assert sum(p.numel() for p in base.model.parameters()) < numbers
    plain, _ = base(np.full((1, *SIZE, 3), 90, np.uint8), cameras, (("a box",),), [1])
    assert np.array_equal(frozen, plain[0])


def test_a_path_is_followed_by_the_release_and_by_its_adapters(project, depth, monkeypatch):  # noqa: F811
    composed = command.compose
    settings = [x for x in SIZES if "width" not in x] + ["model.text_length=12"]
    monkeypatch.setattr(command, "compose", lambda name, words=(): composed(
        name, [*words, *(settings if any("one_video" in word for word in words) else ())]))  # fmt: skip
    words = (f"depth={depth}", "unit=depth", "path=orbit", "distance=1", "angle_deg=10", "seconds=2.5",
             "first_frame=clip.mp4")  # fmt: skip
    for name, more in (("zero", ("checkpoint=release", "preset=warp_adapter/one_video")),
                       ("own", (f"checkpoint={run_of(project)}",))):  # fmt: skip
        code, told = sample(project, *more, f"out={name}", *words)
        assert code == 0, told
        made = read_video(project / name / "video.mp4")[0]
        assert made.shape == (41, *SIZE, 3)
        about = json.loads((project / name / "sample.json").read_text())
        assert about["sampling"]["staged"]["amplified"] and len(about["weights"]) == 64
    both = [read_video(project / name / "video.mp4")[0].astype(int) for name in ("zero", "own")]
    assert not np.array_equal(*both)


@pytest.mark.parametrize("words, told", [
    (["data.source.frames=65"], "whole clips of 33"),
    (["training.chunk=4"], "training.chunk=4, codec.clip=9"),
    (["base=nowhere"], "nowhere"),
])  # fmt: skip
def test_mistakes_end_in_one_line(project, words, told):
    done = train(project, *SMALL, *words)
    assert done.returncode == 2 and told in done.stderr.splitlines()[-1], done.stderr

"""One video as a warp adapter's training data: what a window holds, and which videos are refused."""

from functools import lru_cache

import numpy as np
import pytest
import torch

from vgr.data.one_video import OneVideo
from vgr.data.prepare import prepare_split
from vgr.data.shards import Shards
from vgr.data.video import read_video, write_video
from vgr.data.worlds import Scene
from vgr.geometry.formats import write_cameras
from vgr.metrics.image import psnr
from vgr.models.codec import CosineCodec
from vgr.types import Cameras

FRAMES, SIZE, FPS, K = 40, (96, 128), 16.0, np.array([0.6, 0.8, 0.5, 0.5])
WINDOW = dict(frames=25, size_hw=SIZE, fps=FPS, chunk=3, stride=4, cameras="files", depth="files")


@lru_cache
def walk(frames=FRAMES, turn=False):
    """c2w (F,4,4), frames and depth of a walk to the right with a slow turn, or of the turn alone."""
    rng = np.random.default_rng(3)
    scene = Scene(rng)
    scene.things = scene.things[2:]  # what does not move
    scene._textures = [np.concatenate([x[:1], x[3:]]) for x in scene._textures]
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    for i in range(frames):
        a = 0.01 * i
        c2w[i, :3, :3] = [[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]]
        c2w[i, :3, 3] = (0 if turn else 0.02 * i, -1.5, -1.0)
    shown = np.stack([scene.render(pose, K, 0.0, SIZE) for pose in c2w])
    return c2w, shown, np.stack([scene.depth(pose, K, 0.0, SIZE) for pose in c2w])


def make(folder, turn=False, depth=True, cameras=None, frames=FRAMES):
    c2w, shown, maps = walk(frames, turn)
    write_video(folder / "clip.mp4", shown, FPS, crf=4)
    given = c2w if cameras is None else cameras(c2w)
    cams = Cameras(torch.from_numpy(given)[None], torch.from_numpy(np.tile(K, (len(given), 1)))[None])
    write_cameras(folder / "clip.npz", cams, FPS)
    if depth:
        np.savez(folder / "clip.depth.npz", depth=maps)
    return str(folder / "clip.mp4"), shown.copy()


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return make(tmp_path_factory.mktemp("room"))


def test_a_window_is_seen_by_its_own_warps(room):
    """Warps show the frames they stand for, wherever they claim to see, in both directions of time."""
    video, _ = room
    source, directions = OneVideo(video, **WINDOW), set()
    for visit in range(6):
        (clip,) = source.capture(1, "train", visit)
        first, last = clip.source["frames"]
        directions.add(np.sign(last - first))
        own = read_video(video)[0][first : last + 1] if last > first else read_video(video)[0][last : first + 1][::-1]
        assert np.array_equal(clip.frames, own)
        sizes = [len(v) for v in clip.warps.videos]
        assert sizes == [13, 13] and clip.warps.visible.shape == (25, *SIZE)  # 1 + 3 x 4, then 1 before and 3 x 4
        assert np.array_equal(clip.warps.videos[0][0], clip.frames[0]) and clip.warps.visible[0].all()
        assert np.array_equal(clip.warps.videos[1][0], clip.frames[12])
        shown = np.concatenate([clip.warps.videos[0], clip.warps.videos[1][1:]])
        seen = clip.warps.visible
        assert 0.8 < seen.mean() <= 1
        truth = np.where(seen[..., None], clip.frames, shown)
        assert psnr(shown, truth).min() > 30  # behind a lossy codec; a warp of another frame has 15 to 20
    assert directions == {-1, 1}


def test_windows_are_functions_of_seed_split_and_visit(room):
    a, b = OneVideo(room[0], **WINDOW), OneVideo(room[0], **WINDOW)
    for visit in (0, 5):
        (x,), (y,) = a.capture(2, "train", visit), b.capture(2, "train", visit)
        assert np.array_equal(x.frames, y.frames) and np.array_equal(x.warps.visible, y.warps.visible)
        assert all(np.array_equal(p, q) for p, q in zip(x.warps.videos, y.warps.videos))
    starts = {tuple(a.capture(2, split, v)[0].source["frames"]) for split in ("train", "val") for v in range(8)}
    assert len(starts) > 4


def test_shards_bring_warps_back(room, tmp_path):
    codec = CosineCodec(stride=(4, 8, 8), luma=(4,), chroma=(1,))
    source = OneVideo(room[0], **WINDOW)
    prepare_split(source, codec, tmp_path / "train", "train", 3, 1)
    sample = Shards(tmp_path / "train").read(2)
    (clip,) = source.capture(1, "train", 2)
    latents, visible = sample.warp
    assert latents.shape == sample.latents.shape and np.array_equal(visible, clip.warps.visible)
    # The first chunk begins with the frame itself, and the second is encoded behind the frame before it.
    assert np.array_equal(latents[:, 0], sample.latents[:, 0])
    video = torch.from_numpy(clip.warps.videos[1]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    assert np.array_equal(latents[:, 4:], codec.encode(video)[0, :, 1:].half().numpy())


@pytest.mark.parametrize("what, words", [
    (dict(frames=25, make=dict(frames=20)), "20 frames at 16 a second, fewer than the 25"),
    (dict(make=dict(turn=True)), "hardly moves from its place"),
    (dict(make=dict(depth=False)), "clip.depth.npz"),
    (dict(make=dict(cameras=lambda c: c[:-3])), "37 poses, the last at 2.25 s, but frames go on to 2.44 s"),
    (dict(make=dict(cameras=np.linalg.inv)), "they would, "),
    (dict(make=dict(cameras=lambda c: c @ np.diag([1.0, -1, -1, 1]))), "they would, "),
    (dict(frames=24), "frames must be 1 \\+ n x 4"),
    (dict(depth="sparse"), "sparse depth comes of the estimate"),
    (dict(size_hw=(48, 64)), "the video's frames at data.source.fps and size_hw are"),
])  # fmt: skip
def test_what_cannot_serve_is_told(tmp_path, what, words):
    video, _ = make(tmp_path, **what.get("make", {}))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        OneVideo(video, **{**WINDOW, **{k: v for k, v in what.items() if k != "make"}}).read()


@pytest.mark.parametrize("spoil, words", [
    (lambda d: d * 0, "frame 0 has no depth"), (lambda d: d[:, :50], "depth \\(40, 50, 128\\)"),
])  # fmt: skip
def test_depth_that_says_nothing_or_is_of_other_frames(tmp_path, spoil, words):
    video, _ = make(tmp_path)
    depth = np.load(tmp_path / "clip.depth.npz")["depth"]
    np.savez(tmp_path / "clip.depth.npz", depth=spoil(depth))
    with pytest.raises(ValueError, match=words):
        OneVideo(video, **WINDOW).read()


def test_a_cut_is_named(tmp_path):
    video, shown = make(tmp_path)
    shown[22:] = 255 - shown[22:][:, ::-1]
    write_video(tmp_path / "clip.mp4", shown, FPS, crf=4)
    with pytest.raises(ValueError, match="cuts at 1.3"):
        OneVideo(video, **WINDOW).read()

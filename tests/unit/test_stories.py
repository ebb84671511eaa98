import json
from collections import Counter

import cv2
import numpy as np
import pytest
import torch

from vgr.data.modules import collate
from vgr.data.shards import Sample
from vgr.data.stories import NAMES, StorySource
from vgr.metrics.shots import detect_cuts
from vgr.types import Layout

SIZE = (32, 32)


@pytest.fixture(scope="module")
def stories():
    source = StorySource(size_hw=SIZE, fps=8.0)
    return source, [source._story(5, "train", i)[1] for i in range(150)]


def entries(parts):
    return [p.entry for p in parts]


def test_clips_and_masks_are_functions_of_seed_split_and_index():
    source, again = StorySource(size_hw=SIZE, clips_per_visit=2), StorySource(size_hw=SIZE, clips_per_visit=2)
    visit = source.capture(3, "train", 1)
    for i, clip in enumerate(visit):
        same = again.clip(3, "train", 2 + i)
        assert (clip.frames == same.frames).all() and (clip.c2w == same.c2w).all() and clip.shots == same.shots
    others = [source.clip(3, "val", 2), source.clip(4, "train", 2), source.clip(3, "train", 3)]
    assert all((visit[0].frames != other.frames).any() for other in others)
    assert (source.masks(3, "train", 2) == again.masks(3, "train", 2)).all()
    assert visit[0].frames.shape == (61, *SIZE, 3) and visit[0].c2w.shape == (61, 4, 4)


@pytest.mark.parametrize("stride, chunk, frames", [(2, 3, 61), (4, 3, 121), (1, 2, 17)])
def test_cuts_fall_on_the_first_raw_frame_of_a_chunk(stride, chunk, frames):
    source = StorySource(frames, SIZE, stride=stride, chunk=chunk)
    latent = 1 + (frames - 1) // stride
    chunk_T = Layout.chunked(1, latent, chunk).chunk
    for i in range(10):
        shots = entries(source._story(1, "val", i)[1])
        shots = json.loads(json.dumps(shots))  # what a shard keeps
        assert shots[0]["start"] == 0 and shots[-1]["end"] == frames
        assert all(a["end"] == b["start"] for a, b in zip(shots, shots[1:]))
        sample = Sample(np.zeros((1, latent, 1, 1), np.float16), np.tile(np.eye(4), (frames, 1, 1)),
                        np.ones((frames, 4)), 8.0, {"shots": shots}, "k")
        shot_T = collate([sample], [0]).shot[0]
        assert shot_T[-1] == len(shots) - 1
        # Where the shot changes between latent frames the chunk does, and the cut is not inside a latent frame.
        assert (chunk_T.diff()[shot_T.diff() > 0] == 1).all()
        assert all((s["start"] - 1) % stride == 0 for s in shots[1:])


def test_returns_lie_beyond_the_window_and_traps_leave_the_first_frame_alone(stories):
    source, told = stories
    per_chunk, lone = source.chunk * source.stride, 0
    for shots in map(entries, told):
        seen = {}
        for i, shot in enumerate(shots):
            if shot["character"] in seen and shot["character"] is not None:
                first, last = seen[shot["character"]][0], seen[shot["character"]][-1]
                assert shot["returns_from"] == first and shot["id"] == shots[first]["id"]
                assert shot["start"] - shots[last]["end"] >= source.window * per_chunk
            else:
                assert shot["returns_from"] is None
            seen.setdefault(shot["character"], []).append(i)
        returns = [s["returns_from"] for s in shots if s["returns_from"] is not None]
        assert returns
        lone += 0 not in returns
    assert 0.4 < lone / len(told) < 0.75


def test_captions_tell_who_and_where_but_not_the_look(stories):
    """The look of a name over stories is as spread as looks are: no name has a hue or a shape of its own."""
    _, told = stories
    hues, shapes = {n: [] for n in NAMES}, {n: Counter() for n in NAMES}
    for parts in told:
        looks = {}
        for p in parts:
            name = p.entry["character"]
            assert p.entry["caption"] == (f"{name} in " if name else "") + f"the {p.scene.colour} room"
            if name is None:
                continue
            thing, base = p.scene.things[-1], p.scene._textures[3][-1]
            same = looks.setdefault(name, (thing.shape, base.tobytes()))
            assert same == (thing.shape, base.tobytes())  # within a story it is one and the same
            if p.entry["returns_from"] is None:
                hues[name].append(cv2.cvtColor(base[None, None], cv2.COLOR_RGB2HSV)[0, 0, 0])
                shapes[name][thing.shape] += 1
    for name in NAMES:
        resultant = np.abs(np.exp(1j * np.radians(hues[name])).mean())
        assert len(hues[name]) > 30 and resultant < 3 / np.sqrt(len(hues[name]))
        assert min(shapes[name].values()) > len(hues[name]) / 4


def test_masks_cover_the_character_which_stands_large_and_central():
    source = StorySource(size_hw=SIZE)
    for i in range(3):
        clip, mask = source.clip(2, "train", i), source.masks(2, "train", i)
        lab = np.stack([cv2.cvtColor(f.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) for f in clip.frames])
        means = {}
        for s, shot in enumerate(clip.shots):
            mine = mask[shot["start"] : shot["end"]]
            assert set(np.unique(mine)) == ({0, shot["id"]} if shot["id"] else {0})
            if not shot["id"]:
                continue
            assert 0.15 < (mine > 0).mean() < 0.5 and (mine[:, 12:20, 12:20] > 0).mean() > 0.95
            means[s] = lab[shot["start"] : shot["end"]][mine > 0].mean(0)
        for s, shot in enumerate(clip.shots):
            if shot["returns_from"] is not None:  # it looks as before, and like no other
                alike = np.linalg.norm(means[s] - means[shot["returns_from"]])
                others = [np.linalg.norm(means[s] - means[o]) for o in means if clip.shots[o]["id"] != shot["id"]]
                assert alike < 15 < min(others)


def test_a_camera_is_where_it_says(stories):
    """The middle of a character, seen through the camera, is the middle of its mask."""
    source = StorySource(size_hw=(48, 48))
    k_4, parts = source._story(1, "val", 0)
    mask = source.masks(1, "val", 0)
    part = parts[0]
    for f in (0, part.entry["end"] - 1):
        x, y, z = part.c2w[f, :3, :3].T @ (part.scene.things[-1].at(f / source.fps) - part.c2w[f, :3, 3])
        u, v = (k_4[0] * x / z + k_4[2]) * 48, (k_4[1] * y / z + k_4[3]) * 48
        rows, columns = np.nonzero(mask[f])
        assert z > 0 and abs(columns.mean() + 0.5 - u) < 2 and abs(rows.mean() + 0.5 - v) < 2
    rotation = torch.from_numpy(part.c2w[:, :3, :3])
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64).expand_as(rotation))


def test_clips_of_one_shot_have_no_cut_and_other_plots_than_stories():
    source = StorySource(size_hw=SIZE, shots=(1, 1))
    for i in range(3):
        clip, mask = source.clip(2, "train", i), source.masks(2, "train", i)
        (shot,) = clip.shots
        assert (shot["start"], shot["end"], shot["id"], shot["returns_from"]) == (0, 61, 1, None)
        assert shot["caption"].startswith(shot["character"]) and detect_cuts(clip.frames) == []
        assert 0.1 < (mask > 0).mean() < 0.6 and (mask > 0).any((1, 2)).all()


@pytest.mark.parametrize(
    "change", [{"frames": 60}, {"shots": (6, 5)}, {"shots": (4, 11)}, {"shots": (1, 2)}, {"window": 8}]
)
def test_sizes_in_which_no_story_fits_are_refused(change):
    with pytest.raises(ValueError, match="source.frames"):
        StorySource(**change)


def test_a_plot_that_cannot_be_is_refused_at_once():
    with pytest.raises(ValueError, match=r"source.shots=\[10, 10\]"):
        StorySource(shots=(10, 10))
    with pytest.raises(ValueError, match="another than the first"):
        StorySource(shots=(3, 3), trap_share=1.0)
    StorySource(shots=(3, 3), trap_share=0.0)

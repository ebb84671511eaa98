"""Misread cameras against frames of procedural rooms, whose cameras are exact."""

import numpy as np
import pytest
import torch

from vgr.data.worlds import Scene, WorldSource
from vgr.geometry.conventions import READINGS, check_convention
from vgr.types import Cameras

# What undoes a reading: each is its own inverse, but for the shifts, which undo each other.
UNDONE = dict(zip(READINGS, READINGS)) | {
    "rows one frame late": "rows one frame early",
    "rows one frame early": "rows one frame late",
}


@pytest.fixture(scope="module")
def flight():
    return WorldSource(17, (96, 128), cut_share=0.0).clip(0, "train", 0)


def cameras(c2w, k):
    return Cameras(torch.tensor(c2w)[None], torch.tensor(k)[None])


def test_the_right_reading_agrees(flight):
    report = check_convention(flight.frames, cameras(flight.c2w, flight.intrinsics))
    assert report.verdict == "agrees" and report.undecided == () and report.parallax_px > 1.5
    assert report.errors_px["as given"] < 0.5 * min(e for n, e in report.errors_px.items() if n != "as given")


@pytest.mark.parametrize("reading", list(READINGS)[1:])
def test_each_misreading_is_refused_and_named(flight, reading):
    wrong = READINGS[UNDONE[reading]](flight.c2w)
    with pytest.raises(ValueError, match="do not fit their frames; they would") as refused:
        check_convention(flight.frames, cameras(wrong, flight.intrinsics))
    assert reading in str(refused.value).split("Errors")[0]


def test_cameras_of_another_clip_are_refused(flight):
    other = WorldSource(17, (96, 128), cut_share=0.0).clip(0, "train", 5)
    with pytest.raises(ValueError, match="Errors in pixels: as given"):
        check_convention(flight.frames, cameras(other.c2w, other.intrinsics))


@pytest.fixture(scope="module")
def turn():
    """A camera that only turns, and its room."""
    scene, k = Scene(np.random.default_rng(1)), np.array([0.6, 0.8, 0.5, 0.5])
    c2w = np.tile(np.eye(4), (9, 1, 1))
    angle = 0.04 * np.arange(9)
    c2w[:, 0, 0], c2w[:, 0, 2], c2w[:, 2, 0], c2w[:, 2, 2] = np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
    c2w[:, 1, 3] = -scene.half[1]
    return np.stack([scene.render(pose, k, 0.0, (96, 128)) for pose in c2w]), c2w, np.tile(k, (9, 1))


def test_turning_alone_decides_nothing_on_translation(turn):
    frames, c2w, k = turn
    report = check_convention(frames, cameras(c2w, k))
    assert report.verdict == "undecidable" and report.parallax_px < 1.5
    drifting = c2w.copy()
    drifting[:, 0, 3] += 1e-3 * np.arange(9)
    assert check_convention(frames, cameras(drifting, k)).verdict == "undecidable"
    with pytest.raises(ValueError, match="transposed|inverted"):
        check_convention(frames, cameras(np.linalg.inv(c2w), k))


def test_blank_frames_decide_nothing():
    frames, k = np.full((5, 48, 64, 3), 90, np.uint8), np.tile([0.6, 0.8, 0.5, 0.5], (5, 1))
    report = check_convention(frames, cameras(np.tile(np.eye(4), (5, 1, 1)), k))
    assert report.verdict == "undecidable" and report.pairs == 0
    with pytest.raises(ValueError, match="5 cameras for 4 frames"):
        check_convention(frames[:4], cameras(np.tile(np.eye(4), (5, 1, 1)), k))

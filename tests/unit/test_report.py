import base64
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from vgr.data.files import read_lines
from vgr.report import media, page
from vgr.report.curves import Line, chart, path_from_above, smooth


def run_folder(tmp_path):
    run = tmp_path / "runs" / "study" / "arm" / "seed3"
    run.mkdir(parents=True)
    lines = [{"samples_seen": 16 * i, "step": i, "train/loss": 1 / (i + 1)} for i in range(50)]
    lines[40] |= {"val/loss": 0.3, "val/loss_shuffled_camera": 0.4, "val/camera_gain": 0.1,
                  "val/camera_gain_low": 0.05, "val/camera_gain_high": 0.15}  # fmt: skip
    text = "\n".join(json.dumps(x) for x in lines) + '\n{"samples_seen": 800, "tra'
    (run / "metrics.jsonl").write_text(text)
    return run


def test_history_survives_a_line_cut_by_a_kill(tmp_path):
    history = read_lines(run_folder(tmp_path) / "metrics.jsonl")
    assert len(history) == 50 and history[-1]["samples_seen"] == 784
    assert read_lines(tmp_path / "metrics.jsonl") == []


def test_training_curves_come_from_the_history(tmp_path):
    losses, gain = page.training(read_lines(run_folder(tmp_path) / "metrics.jsonl"))["charts"]
    assert losses.count("<polyline") == 4 and "Loss" in losses
    assert gain.count('class="band model"') == 1 and "Camera gain" in gain
    assert page.training([])["charts"] == ["", ""]


def test_figures_show_the_digits_their_interval_supports():
    cell = {"value": 22.4713, "low": 20.93, "high": 23.94, "count": 12}
    assert page.figure(cell) == "22.5" and page.interval(cell) == "20.9 … 23.9"
    assert page.figure({"value": -0.01234, "low": -0.0201, "high": -0.0049}) == "−0.012"
    assert page.figure({"value": 1234.5, "low": 800.0, "high": 1500.0}) == "1234"
    assert page.figure({"value": 0.73351, "low": None, "high": None}) == "0.734"
    assert page.figure({"value": None}) == page.figure(None) == "–" and page.figure({"value": 0.0}) == "0"
    assert page.interval({"value": 1.0, "low": 1.0, "high": 1.0}) == ""


def test_chart_is_valid_scaled_and_skips_holes():
    line = Line([0, 1, 2, 3], [1.0, None, float("nan"), 4.0], "model", low=[0, 1, 1, 3], high=[2, 3, 3, 5])
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", chart([line], "s", "a < b & c"))[0])
    points = [p.split(",") for p in svg.find("polyline").get("points").split()]
    assert len(points) == 2
    (x0, y0), (x1, y1) = ((float(x), float(y)) for x, y in points)
    assert x0 == 50 and x1 == 410 and y0 > y1
    ticks = [float(t.text) for t in svg.findall("text") if t.get("text-anchor") == "end" and t.text != "s"]
    assert min(ticks) <= 0 and max(ticks) >= 5
    assert chart([Line([], [], "truth")], "s", "empty") == ""
    assert "polyline" in chart([Line([5], [2.0], "truth")], "s", "one point")


def test_smooth_is_a_centred_mean():
    values = np.random.default_rng(0).normal(size=200)
    out = smooth(values.tolist(), share=0.05)
    assert out[50] == pytest.approx(values[45:56].mean()) and out[0] == pytest.approx(values[:6].mean())
    assert smooth([3.0]) == [3.0]


def test_camera_path_from_above_turns_and_stays_inside():
    yaw = np.linspace(0, np.pi / 2, 33)
    c2w = np.tile(np.eye(4), (33, 1, 1))
    c2w[:, 0, 0] = c2w[:, 2, 2] = np.cos(yaw)
    c2w[:, 0, 2], c2w[:, 2, 0] = np.sin(yaw), -np.sin(yaw)
    still = ElementTree.fromstring(path_from_above(c2w))
    marks = json.loads(still.findall("path")[-1].get("data-path"))
    assert len(marks) == 33 and marks[0][2] == 0 and marks[-1][2] == pytest.approx(90)  # to the right, clockwise
    c2w[:, 0, 3], c2w[:, 2, 3] = 3 * (1 - np.cos(yaw)), 3 * np.sin(yaw)
    moving = ElementTree.fromstring(path_from_above(c2w, c2w @ np.diag([1, 1, 1, 1.0])))
    marks = np.array(json.loads(moving.findall("path")[-1].get("data-path")))
    assert marks[-1, 0] > marks[0, 0] and marks[-1, 1] < marks[0, 1]  # right and ahead, which is up
    assert (marks[:, 0] >= 0).all() and (marks[:, 0] <= 100).all() and (marks[:, 1] >= 0).all()


def test_sheet_takes_equal_times_and_keeps_pixels():
    videos = [
        np.full((9, 4, 6, 3), 10 * r, np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None, None] for r in (1, 2)
    ]
    image = media.sheet(videos, count=3, gap=2)
    assert image.shape == (10, 22, 4)
    assert [image[0, x, 0] for x in (0, 8, 16)] == [10, 14, 18] and image[6, 16, 0] == 28
    assert image[0, 6, 3] == 0 and image[0, 5, 3] == 255


def test_embedded_video_is_enlarged_whole(tmp_path):
    from vgr.data.video import read_video

    clip = np.random.default_rng(0).integers(0, 255, (5, 8, 12, 3)).astype(np.uint8)
    uri = media.video_uri(clip, 8.0, width=48)
    (tmp_path / "v.mp4").write_bytes(base64.b64decode(uri.removeprefix("data:video/mp4;base64,")))
    assert read_video(tmp_path / "v.mp4")[0].shape == (5, 32, 48, 3)


def test_large_and_odd_videos_are_brought_to_a_size_a_page_can_hold(tmp_path):
    from vgr.data.video import read_video

    for shape, want in (((30, 193), (30, 192)), ((360, 1280), (144, 512))):
        clip = np.random.default_rng(1).integers(0, 255, (3, *shape, 3)).astype(np.uint8)
        data = base64.b64decode(media.video_uri(clip, 8.0).removeprefix("data:video/mp4;base64,"))
        assert read_video(data)[0].shape == (3, *want, 3)
    assert media.sheet([clip, clip], count=3).shape == (2 * 72 + 1, 3 * 256 + 2, 4)

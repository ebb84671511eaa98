"""Folders of videos: reading, cutting, judging, and that what is made does not depend on how it was made."""

import json
import multiprocessing
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from damage import CUT, EDITS, damaged, searched
from hypothesis import given
from hypothesis import strategies as st

from vgr.data.filters import LIMITS, Meter, camera_figures, judge
from vgr.data.folder import FolderSource
from vgr.data.prepare import prepare_split
from vgr.data.shards import Shards
from vgr.data.sidecars import captions_of, captions_table, told
from vgr.data.video import at_rate, encode_video, fitted, iter_frames, probe, read_video, write_video
from vgr.data.worlds import Scene, free_flight
from vgr.geometry.cameras import crop_intrinsics
from vgr.geometry.formats import write_cameras
from vgr.models.codec import CosineCodec
from vgr.seeding import numpy_generator
from vgr.types import Cameras

FPS, SIZE = 16.0, (48, 64)
K = np.array([0.6, 0.8, 0.5, 0.5])


def walk(seed, frames=40, fps=FPS, size=SIZE):
    """A flight through a room: frames and c2w."""
    rng = numpy_generator(seed, "test-walk")
    scene = Scene(rng)
    c2w = free_flight(rng, scene, frames, fps)
    return np.stack([scene.render(p, K, f / fps, size) for f, p in enumerate(c2w)]), c2w


def write_walk(folder, name, seed, frames=40, poses=True):
    video, c2w = walk(seed, frames)
    write_video(folder / f"{name}.mp4", video, FPS)
    if poses:
        cameras = Cameras(torch.from_numpy(c2w)[None], torch.from_numpy(np.tile(K, (frames, 1)))[None])
        write_cameras(folder / f"{name}.npz", cameras, FPS)
    return video, c2w


def mux(path, images, times, rate=1000, pix_fmt="yuv420p", codec="libx264", **options):
    """A video of frames at times in seconds."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options={"crf": "4", **options})
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], pix_fmt
        stream.codec_context.time_base = Fraction(1, rate)
        for image, time in zip(images, times):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt, threads=1)
            frame.pts, frame.time_base = round(time * rate), Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def grey(value, size=SIZE):
    return np.full((*size, 3), value, np.uint8)


def source(folder, **settings):
    given = {"frames": 9, "size_hw": (24, 32), "fps": 8.0, "cameras": "files", "scale": 1.0, "val_share": 0.3}
    return FolderSource(str(folder), **{**given, "limits": {"sharpness": None, "saturation": None}, **settings})


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    truth = {name: write_walk(folder, name, i, 40 + 8 * i) for i, name in enumerate(("a", "b", "c"))}
    (folder / "a.txt").write_text("a room\n")
    told = [{"caption": "first", "end_s": 1.2}, {"caption": "then", "start_s": 1.2}]
    (folder / "b.json").write_text(json.dumps(told))
    return folder, truth


def test_frames_have_exact_times_at_variable_rates_and_are_resampled_by_time(tmp_path):
    times = np.cumsum([0, *([0.04] * 10), *([0.1] * 10), *([0.02] * 20)])
    images = [grey(5 * i) for i in range(len(times))]
    mux(tmp_path / "a.mkv", images, times)
    frames = list(iter_frames(tmp_path / "a.mkv"))
    np.testing.assert_allclose([x.time_s - frames[0].time_s for x in frames], times, atol=1e-6)
    picked = list(at_rate(iter_frames(tmp_path / "a.mkv"), 23))
    wanted = [int(np.abs(times - k / 23).argmin()) for k in range(len(picked))]
    assert [x.index for _, x in picked] == wanted and [k for k, _ in picked] == list(range(len(picked)))
    assert abs(len(picked) / 23 - times[-1]) < 0.06
    for _, x in picked:
        assert abs(int(x.rgb()[0, 0, 0]) - 5 * x.index) <= 3
    # From the middle on, the same frames.
    k, x = picked[13]
    later = at_rate(iter_frames(tmp_path / "a.mkv", None, x.time_s - 1e-4, x.index), 23, frames[0].time_s, k)
    assert [(k, y.index, y.time_s) for k, y in later] == [(k, y.index, y.time_s) for k, y in picked[13:]]


def test_turned_and_narrow_pixels_and_ten_bits_and_odd_sizes_are_shown_right(tmp_path):
    image = np.zeros((48, 80, 3), np.uint8)
    image[:24, :40] = (250, 20, 20)  # red in the upper left
    image[24:] = (20, 20, 250)
    with av.open(str(tmp_path / "turned.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=8, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
        stream.set_display_rotation(90)
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    info, (frames, _) = probe(tmp_path / "turned.mp4"), read_video(tmp_path / "turned.mp4")
    assert info.size_hw == (80, 48) == frames.shape[1:3] and "turned by 90" in info.notes[0]
    assert np.abs(frames[0].astype(int) - np.rot90(image)).mean() < 6
    ramp = np.repeat(np.arange(51, 204, 3, dtype=np.uint8)[None, :, None], 33, 0).repeat(3, 2)
    mux(tmp_path / "ten.mkv", [ramp] * 3, [0, 0.1, 0.2], pix_fmt="yuv444p10le")
    info, (frames, _) = probe(tmp_path / "ten.mkv"), read_video(tmp_path / "ten.mkv")
    assert info.size_hw == (33, 51) and info.notes == ("10 bits a colour",)
    assert np.abs(frames[1].astype(int) - ramp).max() <= 3


def test_the_first_video_stream_is_taken_and_said(tmp_path):
    with av.open(str(tmp_path / "two.mkv"), "w") as out:
        streams = [out.add_stream("libx264", rate=8) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for stream, value in zip(streams, (60, 200)):
            for _ in range(2):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(grey(value, (32, 32)), format="rgb24")))
            out.mux(stream.encode())
    assert probe(tmp_path / "two.mkv").notes == ("stream 0, the first of 2 with video",)
    assert abs(read_video(tmp_path / "two.mkv")[0].mean() - 60) < 3


def test_damage_is_reported_with_its_position_and_the_rest_kept(tmp_path):
    video, _ = walk(5, 96)
    data = bytearray(encode_video(video, FPS))
    path = tmp_path / "a.mp4"
    whole = [(x.index, x.time_s) for x in iter_frames(bytes(data))]
    for i in range(len(data) // 2, len(data) // 2 + 2000, 37):
        data[i] ^= 255
    path.write_bytes(data)
    damage = []
    left = [x.time_s for x in iter_frames(path, damage)]
    assert damage and len(left) > 30 and 0.5 < damage[0][0] < 6
    assert set(left) <= {t for _, t in whole}
    (tmp_path / "cut.mkv").write_bytes(b"")
    mux(tmp_path / "cut.mkv", list(video), np.arange(96) / FPS)
    short = (tmp_path / "cut.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(short[: len(short) * 2 // 3])
    damage = []
    left = [x.time_s for x in iter_frames(tmp_path / "cut.mkv", damage)]
    assert 40 < len(left) < 90 and damage


def test_cut_and_scaled_pictures_fit_their_intrinsics():
    """A point of the scene lies where the new intrinsics put it: seen by drawing only that point."""
    shown, wanted = (90, 240), (48, 64)
    scaled, (top, left) = fitted(shown, wanted)
    assert scaled[0] == 48 and left > 0 and top == 0
    k = torch.tensor([0.4, 0.9, 0.5, 0.5], dtype=torch.float64)
    cut = crop_intrinsics(k, scaled, (top, left, *wanted))
    for x, y in ((0.1, 0.2), (-0.2, -0.1), (0.02, 0.3)):
        u, v = (float(k[0] * x + k[2]) * shown[1], float(k[1] * y + k[3]) * shown[0])
        rows, columns = np.mgrid[: shown[0], : shown[1]] + 0.5
        blob = (230 * np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / 18)).astype(np.uint8)
        out = next(iter_frames(encode_video(np.repeat(blob[None, ..., None], 3, 3), 8, crf=2))).rgb(wanted)[..., 1]
        weight = np.where(out > 40, out, 0).astype(float)
        centre = [(weight * grid).sum() / weight.sum() for grid in np.mgrid[:48, :64] + 0.5]
        wanted_at = [float(cut[1] * y + cut[3]) * 48, float(cut[0] * x + cut[2]) * 64]
        np.testing.assert_allclose(centre, wanted_at, atol=0.15)


def test_clips_pair_each_frame_with_its_own_camera_and_caption(videos):
    folder, truth = videos
    mine = source(folder)
    mine.scan(folder / "../scan-a")
    assert mine.count("train") + mine.count("val") == sum(len(v) // 18 for v, _ in truth.values())
    for split in ("train", "val"):
        for visit in range(mine.count(split)):
            (clip,) = mine.capture(1, split, visit)
            name = clip.source["file"][0]
            video, c2w = truth[name]
            first = round(clip.source["start_s"] * FPS)
            np.testing.assert_allclose(clip.c2w, c2w[first : first + 18 : 2], atol=1e-12)
            small = video[first : first + 18 : 2].reshape(9, 24, 2, 32, 2, 3).mean((2, 4))
            assert np.abs(clip.frames - small).mean() < 4
            assert clip.frames.shape == (9, 24, 32, 3) and clip.metric_scale and clip.fps == 8
            np.testing.assert_allclose(clip.intrinsics, np.tile(K, (9, 1)))
            told = {"a": "a room", "b": "first" if first == 0 else "then", "c": ""}[name]
            assert clip.shots == [{"start": 0, "end": 9, "caption": told}]
    files = {s: {p[0] for p in mine._plan[s]} for s in mine.splits}
    assert files["val"] and not files["val"] & files["train"]  # held out by whole files


def test_poses_by_time_and_without_intrinsics_and_missing_ones(tmp_path):
    video, c2w = write_walk(tmp_path, "a", 1, 40, poses=False)
    write_walk(tmp_path, "b", 2, 40, poses=False)
    half = Cameras(torch.from_numpy(c2w[::2])[None], torch.full((1, 20, 4), torch.nan))
    write_cameras(tmp_path / "a.txt", half, FPS / 2, "tum")
    mine = source(tmp_path, fps=16.0, hfov_deg=80.0, frames=17, val_share=0.01)
    with pytest.raises(ValueError, match="nothing to train on.*cameras 2"):
        mine.scan(tmp_path / "scan")
    told = [x["value"] for x in mine.left_out("train")["cameras"]]
    assert len(told) == 2 and all("b.mp4 needs one file of cameras beside it, there are 0" in x for x in told)
    (clip,) = mine.capture(1, "val", 0)
    np.testing.assert_allclose(clip.c2w[::2], c2w[:17:2], atol=1e-9)
    assert np.abs(clip.c2w[1::2] - c2w[1:17:2]).max() < 5e-3
    assert abs(2 * np.degrees(np.arctan(0.5 / clip.intrinsics[0, 0])) - 80) < 1e-6


def test_poses_without_times_go_by_the_files_frames_at_any_rate(tmp_path):
    for name, count in (("a", 40), ("b", 39)):
        _, c2w = write_walk(tmp_path, name, 1, 40, poses=False)
        cameras = Cameras(torch.from_numpy(c2w[:count])[None], torch.full((1, count, 4), torch.nan))
        write_cameras(tmp_path / f"{name}.txt", cameras, FPS, "kitti")
    mine = source(tmp_path, hfov_deg=80.0, scale=0.5, fps=5.3)
    with pytest.raises(ValueError, match="nothing to train on"):
        mine.scan(tmp_path / "scan")
    (told,) = mine.left_out("train")["cameras"]
    assert told["value"] == "39 poses without times for 40 frames; one for each is needed"
    (clip,) = mine.capture(1, "val", 0)
    nearest = [int(np.abs(np.arange(40) / FPS - k / 5.3).argmin()) for k in range(9)]
    wanted = c2w[nearest]
    wanted[:, :3, 3] *= 0.5
    np.testing.assert_allclose(clip.c2w, wanted, atol=1e-12)
    assert clip.metric_scale


def shards(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def prepare(mine, out, scan, workers=1, progress=lambda more: None):
    codec = CosineCodec(stride=(4, 8, 8), luma=(2, 1), chroma=(1,))
    mine.scan(scan, workers)
    return prepare_split(mine, codec, out, "train", mine.count("train"), 1, workers=workers, samples_per_shard=2,
                         about={"left_out": {k: len(v) for k, v in mine.left_out("train").items()}}, progress=progress)


class Stopped(Exception):
    pass


def test_one_process_two_and_killed_and_resumed_make_the_same_files(videos, tmp_path):
    folder, _ = videos
    assert prepare(source(folder, clips_per_visit=2), tmp_path / "one", tmp_path / "scan1") > 3
    prepare(source(folder, clips_per_visit=2), tmp_path / "two", tmp_path / "scan2", workers=2)
    heard = []

    def stop(more):
        heard.append(more)
        if len(heard) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        source(folder).scan(tmp_path / "scan3", 1, stop)
    journal = tmp_path / "scan3/scan-0-of-1.jsonl"
    assert len(journal.read_text().splitlines()) == 2  # an empty line is never the first
    journal.write_text(journal.read_text()[:-30])  # killed while it wrote
    heard.clear()
    with pytest.raises(Stopped):
        prepare(source(folder, clips_per_visit=2), tmp_path / "again", tmp_path / "scan3", progress=stop)
    prepare(source(folder, clips_per_visit=2), tmp_path / "again", tmp_path / "scan3")
    assert shards(tmp_path / "one") == shards(tmp_path / "two") == shards(tmp_path / "again")
    assert source(folder, clips_per_visit=2).scan(tmp_path / "scan1") == 0  # nothing to scan a second time
    manifest = Shards(tmp_path / "one").manifest
    assert manifest["round_trip"]["clips"] == -(-manifest["samples"] // 2) and manifest["round_trip"]["psnr_db"] > 15


def test_encoding_here_what_workers_captured_changes_nothing(videos, tmp_path, monkeypatch):
    folder, _ = videos
    prepare(source(folder), tmp_path / "one", tmp_path / "scan")
    monkeypatch.setattr("vgr.data.prepare._on_gpu", lambda codec: True)
    prepare(source(folder), tmp_path / "two", tmp_path / "scan", workers=2)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert not multiprocessing.active_children()


def test_a_changed_sidecar_or_setting_is_scanned_anew(videos, tmp_path):
    folder, _ = videos
    assert source(folder).scan(tmp_path / "scan") == 3
    before = source(folder)
    before.scan(tmp_path / "scan")
    (folder / "c.txt").write_text("seen later")
    try:
        after = source(folder)
        assert after.scan(tmp_path / "scan") == 1 and after.splits != before.splits
    finally:
        (folder / "c.txt").unlink()
    assert source(folder, frames=5).scan(tmp_path / "scan") == 3
    assert source(folder, val_share=0.6).scan(tmp_path / "scan") == 0


def test_cuts_blank_and_still_stretches_bars_and_leftovers_are_left_out_and_told(tmp_path):
    one, two = walk(1, 40)[0], walk(7, 40)[0]
    barred = two.copy()
    barred[:, :8] = 16
    parts = [one, two, np.repeat(two[-1:], 16, 0), np.repeat(grey(128)[None], 16, 0), barred]
    write_video(tmp_path / "a.mp4", np.concatenate(parts), FPS)
    write_walk(tmp_path, "b", 3, 40, poses=False)
    mine = source(tmp_path, cameras=None, fps=16.0, size_hw=SIZE, frames=17, val_share=0.01)
    mine.scan(tmp_path / "scan")
    rows = [x for split in ("train", "val") for x in mine._dropped[split] if x["file"] == "a.mp4"]
    rules = {}
    for x in rows:
        rules.setdefault(x["rule"], []).append(x)
    assert rules.keys() == {"static", "blank", "black_bars", "short"}, rows
    assert abs(rules["static"][0]["start_s"] - 5) < 0.3 and abs(rules["blank"][0]["start_s"] - 6) < 0.3
    assert len(rules["black_bars"]) == 2 and abs(rules["black_bars"][0]["value"] - 8 / 48) < 0.03
    assert rules["black_bars"][0]["limit"] == [None, 0.02]
    clips = [p for s in mine.splits for rel, p in mine._plan[s] if rel == "a.mp4"]
    assert [p["k"] for p in clips] == [0, 17, 40, 57]  # 34 frames of each 40-frame shot
    spans = sorted([(p["k"] / 16, (p["k"] + 17) / 16) for p in clips] + [(x["start_s"], x["end_s"]) for x in rows])
    assert abs(sum(b - a for a, b in spans) - len(np.concatenate(parts)) / 16) < 0.2  # nothing is lost untold


def test_shots_in_a_row_make_one_clip_where_cuts_are_wanted(tmp_path):
    write_video(tmp_path / "a.mp4", np.concatenate([walk(i, 20)[0] for i in (1, 7, 9)]), FPS)
    (tmp_path / "a.json").write_text(json.dumps([{"caption": "x", "end_s": 1.25}, {"caption": "y", "start_s": 1.25}]))
    write_walk(tmp_path, "b", 3, 40, poses=False)
    mine = source(tmp_path, cameras=None, fps=16.0, size_hw=SIZE, frames=29, cuts=1, val_share=0.01)
    mine.scan(tmp_path / "scan")
    (plan,) = [p for s in mine.splits for rel, p in mine._plan[s] if rel == "a.mp4" and p["k"] == 0]
    assert plan["shots"] == [{"start": 0, "end": 20, "caption": "x"}, {"start": 20, "end": 29, "caption": "y"}]


def test_cameras_by_a_callable_are_estimated_once_and_failures_told(videos, tmp_path):
    folder, _ = videos
    seen = []

    def cameras_of(frames, fps, intrinsics):
        seen.append((frames.shape, fps))
        if len(seen) == 1:
            raise ValueError("too little texture")
        return np.tile(np.eye(4), (9, 1, 1)), np.tile(K, (9, 1)), 0.5

    mine = source(folder, cameras="estimate", cameras_of=cameras_of, scale=None)
    mine.scan(tmp_path / "scan")
    count = len(seen)
    told = [x for s in mine.splits for x in mine._dropped[s] if x["rule"] == "cameras"]
    assert [x["value"] for x in told] == ["too little texture"] and set(seen) == {((9, 48, 64, 3), 8.0)}
    (clip,) = mine.capture(1, "train", 0)
    assert len(seen) == count and not clip.metric_scale and clip.source["cameras"] == "estimate"
    np.testing.assert_allclose(clip.intrinsics[0], K)
    assert clip.source["figures"]["pose_confidence"] == 0.5


def test_depth_in_metres_goes_into_the_estimate_and_makes_it_metric(videos, tmp_path, monkeypatch):
    folder, _ = videos
    given = []

    def found(frames, intrinsics, *, depth_m):
        given.append((len(frames), depth_m))
        c2w = np.tile(np.eye(4), (len(frames), 1, 1))
        return SimpleNamespace(c2w=c2w, intrinsics=K, confidence=1.0, reason="")

    monkeypatch.setattr("vgr.geometry.reconstruct.reconstruct", found)
    monkeypatch.setattr("vgr.data.folder.DepthModel", lambda name: lambda frames: np.full(frames.shape[:3], len(name)))
    mine = source(folder, cameras="estimate", scale=None, depth="four", fps=16.0)
    mine.scan(tmp_path / "scan")
    assert mine.capture(1, "train", 0)[0].metric_scale and {n for n, _ in given} == {5}  # of nine, at eight a second
    assert all(depth.shape == (5, 48, 64) and (depth == 4).all() for _, depth in given)
    with pytest.raises(ValueError, match="with source.depth, estimate and source.scale=null"):
        source(folder, cameras="estimate", scale=1.0, depth="four")


@pytest.mark.parametrize("wrong", [False, True])
def test_pose_files_are_held_against_the_pictures(tmp_path, wrong):
    video, c2w = walk(5, 48, size=(192, 256))
    write_video(tmp_path / "a.mp4", video, FPS)
    poses = np.linalg.inv(c2w) if wrong else c2w
    cameras = Cameras(torch.from_numpy(poses)[None], torch.from_numpy(np.tile(K, (48, 1)))[None])
    write_cameras(tmp_path / "a.npz", cameras, FPS)
    mine = source(tmp_path, frames=13, size_hw=(48, 64), fps=8.0, val_share=0.01, limits=dict.fromkeys(LIMITS))
    record = mine._scan(("a.mp4", []))
    told = [x["value"] for x in record["dropped"] if x["rule"] == "cameras"]
    if wrong:
        assert not record["clips"] and told and "inverted (world-to-camera" in told[0]
    else:
        assert record["clips"][0]["convention"] == "agrees" and not told


def test_a_file_that_is_no_video_costs_only_itself(videos, tmp_path):
    folder, _ = videos
    for name in ("a.mp4", "b.mp4", "a.npz", "b.npz"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "bad.mp4").write_bytes(b"\\0" * 100)
    (tmp_path / "list.mp4").write_text("#EXTM3U\\nfile:///etc/hostname\\n")
    mine = source(tmp_path)
    assert mine.scan(tmp_path / "scan") == 4
    bad = {x["file"] for s in mine.splits for x in mine._dropped[s] if x["rule"] == "unreadable"}
    assert bad == {"bad.mp4", "list.mp4"}


def words(captions):
    """States and lengths of captions, with whatever stands behind shorter ones."""
    lengths = np.array([max(1, len(x)) for x in captions])
    return np.arange(len(captions) * lengths.max() * 2).reshape(len(captions), -1, 2).astype(np.float16), lengths


def prepare_both(mine, out, part=None, progress=lambda more: None):
    """Both splits with text, as vgr-prepare makes them."""
    codec = CosineCodec(stride=(4, 8, 8), luma=(2, 1), chroma=(1,))
    for split in ("val", "train"):
        prepare_split(mine, codec, out / split, split, mine.count(split), 1, samples_per_shard=2, text=words,
                      text_made_by={"class": "Words"}, part=part, progress=progress)  # fmt: skip


def test_the_jobs_of_an_array_make_together_what_one_makes(videos, tmp_path):
    folder, _ = videos
    one, *parts = (source(folder, clips_per_visit=3, part=part) for part in (None, "0/2", "1/2"))
    one.scan(tmp_path / "scan")
    prepare_both(one, tmp_path / "one")
    assert [x.scan(tmp_path / "again") for x in parts] == [2, 1]  # each its own files
    assert parts[0].missing() == 1 and parts[1].missing() == 0
    assert [x.scan(tmp_path / "again") + x.missing() for x in parts] == [0, 0]
    left = iter(range(3))
    with pytest.raises(StopIteration):  # killed
        prepare_both(parts[1], tmp_path / "both", (1, 2), lambda more: next(left))
    prepare_both(parts[0], tmp_path / "both", (0, 2))
    assert not list(tmp_path.glob("both/*/manifest.json"))
    prepare_both(parts[1], tmp_path / "both", (1, 2))
    before, heard = shards(tmp_path / "both/train"), []
    whole = source(folder, clips_per_visit=3)
    assert whole.scan(tmp_path / "again") == 0
    prepare_both(whole, tmp_path / "both", None, heard.append)
    assert heard == [whole.count("val"), whole.count("train")]  # nothing was left to make
    for split in ("train", "val"):
        assert shards(tmp_path / "one" / split) == shards(tmp_path / "both" / split)
    assert before.items() < shards(tmp_path / "both/train").items()
    with pytest.raises(ValueError, match="source.part=2/2"):
        source(folder, part="2/2")


def test_a_model_captions_what_no_file_does_and_its_words_are_kept(videos, tmp_path):
    folder, _ = videos
    seen, heard = [], []

    def captions_of(looks):
        seen.append([x.shape for x in looks])
        if len(seen) == 2:
            raise Stopped
        return [f"looks {x.mean():.3f}" for x in looks]

    def described(name="tiny", fingerprint="1"):
        mine = source(folder)
        mine.scan(tmp_path / "scan")
        heard.clear()
        count = sum(len(shots) for _, shots in mine.uncaptioned())
        mine.describe(captions_of, name, fingerprint, heard.append)
        assert sum(heard) == count
        return mine

    (folder / "b.json").rename(folder / "b.away")
    try:
        with pytest.raises(Stopped):  # c is left
            described()
        mine = described()
        assert len(seen) == 3 and {x for call in seen for x in call} == {(6, 48, 64, 3)}
        again = described()
        assert len(seen) == 3 and again.splits == mine.splits and again._plan == mine._plan
        told = [(rel, x) for split in mine.splits for rel, clip in mine._plan[split] for x in clip["shots"]]
        assert {x.get("captioned_by") for rel, x in told if rel != "a.mp4"} == {"tiny"}
        assert all(x == {"start": 0, "end": 9, "caption": "a room"} for rel, x in told if rel == "a.mp4")
        (clip,) = mine.capture(1, "val", 0)
        at = [0, 2, 3, 5, 6, 8]
        if clip.source["file"] != "a.mp4":
            assert abs(float(clip.shots[0]["caption"].split()[1]) - clip.frames[at].mean()) < 1
        assert described(fingerprint="2").splits == mine.splits and len(seen) == 5
        parts = [source(folder, part=f"{i}/2") for i in (0, 1, 0)]  # a and c; b; the first again
        for part, left in zip(parts, (1, 0, 0)):
            part.scan(tmp_path / "scan")
            assert part.missing() == 0
            part.describe(captions_of, "tiny", "3", heard.append)
            assert part.missing() == left
        assert parts[1]._plan == parts[2]._plan == mine._plan and len(seen) == 7
    finally:
        (folder / "b.away").rename(folder / "b.json")


@pytest.mark.parametrize(("settings", "told"), [
    ({"cameras": "guess"}, "source.cameras=guess"),
    ({"limits": {"motoin": None}}, "source.limits=motoin"), ({"limits": "sekai"}, "source.limits=sekai.*sekai_game"),
    ({"part": "1"}, "source.part=1"), ({"val_share": 1.0}, "val_share=1.0"),
    ({"folder": "nowhere"}, "nowhere"),
])
def test_settings_that_cannot_be_are_refused(tmp_path, settings, told):
    with pytest.raises(ValueError, match=told):
        source(settings.pop("folder", tmp_path), **settings)


def test_rules_name_themselves_with_figure_and_limit():
    assert judge({"motion": 60.0}, LIMITS) == ("motion", 60.0, (0.5, 50.0))
    assert judge({"motion": 60.0}, {**LIMITS, "motion": None}) is None
    assert judge({"fov_deg": (20.0, 90.0)}, LIMITS).value == 20.0
    assert judge({"motion": float("nan")}, LIMITS).rule == "motion"
    still = np.tile(np.eye(4), (20, 1, 1))
    moving = still.copy()
    moving[:, 0, 3] = np.arange(20) * 0.1
    jump = moving.copy()
    jump[11:, 0, 3] += 3
    figures = [camera_figures(x, np.tile(K, (20, 1)), SIZE) for x in (still, moving, jump)]
    assert [judge(x, LIMITS) and judge(x, LIMITS).rule for x in figures] == [None, None, "pose_jump"]
    wide = camera_figures(moving, np.tile([0.6, 0.6, 0.5, 0.5], (20, 1)), SIZE)
    assert judge(wide, LIMITS).rule == "focal_spread" and abs(wide["focal_spread"] - 2 / 7) < 1e-9


def test_motion_is_vmafs_and_cuts_are_found_in_pieces():
    noise = np.random.default_rng(0).integers(0, 255, (2, *SIZE, 3)).astype(np.uint8)
    meter = Meter()
    for image in noise:
        meter.add(image)
    meter.done()
    luma = np.pad((noise @ np.array([0.299, 0.587, 0.114])).round(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
    taps = [0.054488685, 0.244201342, 0.402619947, 0.244201342, 0.054488685]
    blurred = sum(taps[i] * taps[j] * luma[:, i : i + SIZE[0], j : j + SIZE[1]] for i in range(5) for j in range(5))
    assert abs(meter.frames[1, 2] - 219 / 255 * np.abs(blurred[1] - blurred[0]).mean()) < 0.05
    clips = [walk(i, 1)[0][0] for i in range(4)]
    meter, starts = Meter(), [0, 100, 258, 390]
    for k in range(800):
        image = clips[sum(k >= s for s in starts) - 1].astype(int) + (k % 3)
        meter.add(image.clip(0, 255).astype(np.uint8))
    meter.done()
    assert meter.cuts == starts[1:] and meter.frames.shape == (800, 8)


def test_broken_captions_end_in_clear_errors_only(tmp_path):
    """Bytes put in, taken out and replaced in every form of captions: captions, or ValueError."""
    (tmp_path / "a.mp4").write_bytes(b"")
    whole = {"a.json": b'[{"start_s": 0, "end_s": 2.5, "caption": "one"}, {"start_s": 2.5, "caption": "two"}]',
             "a.txt": "a r\u00f6om\n".encode(),
             "captions.csv": b'file,caption,start_s,end_s\na.mp4,"a, b",0,2\n'}  # fmt: skip
    told_of = errors = 0

    @searched(600)
    @given(name=st.sampled_from(sorted(whole)), edits=EDITS, cut=CUT)
    def read(name, edits, cut):
        nonlocal told_of, errors
        (tmp_path / name).write_bytes(damaged(whole[name], edits, cut))
        try:
            found = captions_of(tmp_path / "a.mp4", list(captions_table(tmp_path / "captions.csv")))
            assert isinstance(told(found, 0.0, 1.0), str)
            told_of += 1
        except ValueError as error:
            assert str(error)
            errors += 1
        finally:
            (tmp_path / name).unlink()

    read()
    assert told_of > 100 and errors > 100


@pytest.mark.slow
def test_broken_videos_end_in_clear_errors_only(tmp_path):
    """Bytes flipped, cut off and put in: frames of the right kind, or ValueError with the file's name."""
    video = walk(1, 24)[0]
    mux(tmp_path / "whole.mkv", list(video), np.arange(24) / FPS)
    whole = {".mp4": encode_video(video, FPS), ".mkv": (tmp_path / "whole.mkv").read_bytes()}
    whole[".avi"] = whole[".ts"] = whole[".mp4"]  # of another kind than its name says
    kept = errors = 0

    @searched(600)
    @given(suffix=st.sampled_from(sorted(whole)), edits=EDITS, cut=CUT)
    def read_all(suffix, edits, cut):
        nonlocal kept, errors
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(damaged(whole[suffix], edits, cut))
        for read in (probe, lambda p: [x.rgb((24, 32)).shape for x in iter_frames(p, [])], read_video):
            try:
                read(path)
                kept += 1
            except ValueError as error:
                assert "broken" in str(error), repr(error)
                errors += 1

    read_all()
    assert kept > 100 and errors > 100

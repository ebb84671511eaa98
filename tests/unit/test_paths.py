import json
import math
import re
import sys
from functools import cache

import cv2
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation, Slerp

from benchmarks.paths import GAP_S, NAMES, catmull_rom, main, place, read_depth, shapes, squad, unit_path, waypoints
from vgr.command import root
from vgr.geometry.cameras import from_fov
from vgr.geometry.checks import check_cameras
from vgr.geometry.formats import follow, read_cameras
from vgr.metrics.revisit import find_pairs
from vgr.report.requests import read_requests
from vgr.types import Cameras

FRAMES, FPS, DEPTH_M = 961, 16.0, 5.0
ALL = [*NAMES["simple"], *NAMES["hard"]]
LENS = from_fov(60.0, 16 / 9, torch.float64)


@cache
def unit(name, seed):
    return unit_path(waypoints(name, np.random.default_rng(seed)), FRAMES, FPS)


@cache
def path(name, seed=0, depth_m=DEPTH_M):
    return place(unit(name, seed), FPS, depth_m, None)[0]


def turning(c2w):
    """Degrees a second of each step."""
    R = Rotation.from_matrix(c2w[:, :3, :3])
    return np.rad2deg((R[:-1].inv() * R[1:]).magnitude()) * FPS


def yaw_pitch(c2w):
    """Degrees to the right, without jumps at 180, and up."""
    z = c2w[:, :3, 2]
    return np.rad2deg(np.unwrap(np.arctan2(z[:, 0], z[:, 2]))), np.rad2deg(np.arcsin(np.clip(-z[:, 1], -1, 1)))


def test_positions_pass_through_their_waypoints_without_corners():
    points = np.random.default_rng(0).normal(size=(12, 3)) * np.geomspace(0.1, 3, 12)[:, None]
    np.testing.assert_allclose(catmull_rom(points, np.arange(12.0)), points, atol=1e-12)
    e = 1e-6
    inner = np.arange(1.0, 11)
    before = catmull_rom(points, inner) - catmull_rom(points, inner - e)
    after = catmull_rom(points, inner + e) - catmull_rom(points, inner)
    cosine = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    np.testing.assert_allclose(cosine, 1, atol=1e-4)
    # Centripetal: speeds on both sides of a waypoint are as the square roots of its segments, so no loops arise.
    spacing = np.linalg.norm(np.diff(points, axis=0), axis=1) ** 0.5
    ratio = np.linalg.norm(after, axis=1) / np.linalg.norm(before, axis=1)
    np.testing.assert_allclose(ratio, spacing[1:] / spacing[:-1], rtol=1e-3)


def test_evenly_spaced_waypoints_of_a_line_stay_a_line_at_one_speed():
    line = np.linspace([0.0, 1, 2], [3.0, -1, 5], 11)
    g = np.linspace(0, 10, 301)
    np.testing.assert_allclose(catmull_rom(line, g), line[0] + g[:, None] * (line[1] - line[0]), atol=1e-12)


def test_rotations_pass_through_their_waypoints_with_one_rate_on_both_sides():
    turns = Rotation.from_rotvec(np.cumsum(np.random.default_rng(0).uniform(-0.6, 0.6, (13, 3)), axis=0))
    at, e = np.arange(13.0), 1e-5
    assert (squad(turns, at).inv() * turns).magnitude().max() < 1e-7
    inner = at[1:-1]
    before, here, after = (squad(turns, inner + d) for d in (-e, 0, e))
    assert (before.inv() * after).magnitude().max() < 3 * e, "a jump at a waypoint"
    rates = [(a.inv() * b).as_rotvec() / e for a, b in ((before, here), (here, after))]
    assert np.linalg.norm(rates[0], axis=1).min() > 0.05
    np.testing.assert_allclose(*rates, atol=1e-3)


def test_a_turn_at_one_rate_is_slerp():
    turns = Rotation.from_rotvec(np.arange(9)[:, None] * [[0.3, -0.2, 0.4]])
    g = np.linspace(0, 8, 200)
    assert (squad(turns, g).inv() * Slerp(np.arange(9), turns)(g)).magnitude().max() < 1e-7


def test_there_are_ten_templates_a_split_and_each_begins_in_the_identity():
    assert [len(set(NAMES[s])) for s in ("simple", "hard")] == [10, 10] and len(set(ALL)) == 20
    for split in shapes(np.linspace(0, 1, 11)).values():
        for name, rows in split.items():
            assert rows.shape == (11, 5) and not rows[0].any(), name
    counts = {len(waypoints("arc", np.random.default_rng(seed))) for seed in range(60)}
    assert counts == {11, 12, 13, 14, 15}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ALL)
def test_every_path_keeps_to_the_limits(name, seed):
    c2w = path(name, seed)
    assert c2w.shape == (FRAMES, 4, 4) and c2w.dtype == np.float64
    np.testing.assert_allclose(c2w[0], np.eye(4), atol=1e-12)
    R = c2w[:, :3, :3]
    np.testing.assert_allclose(R @ R.swapaxes(1, 2), np.tile(np.eye(3), (FRAMES, 1, 1)), atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(R), 1)
    np.testing.assert_array_equal(c2w[:, 3], np.tile([0.0, 0, 0, 1], (FRAMES, 1)))
    assert turning(c2w).max() <= 12
    speed = np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1) * FPS
    assert speed.max() <= 0.4
    # As far as the scene lets it, and nothing jerks: half a second changes little.
    assert np.linalg.norm(c2w[:, :3, 3], axis=1).max() == pytest.approx(0.6 * DEPTH_M, abs=1e-9)
    assert np.abs(np.diff(turning(c2w))).max() < 2 and np.abs(np.diff(speed)).max() < 0.1
    cameras = Cameras(torch.from_numpy(c2w)[None], LENS.expand(1, FRAMES, 4))
    assert check_cameras(cameras, FPS, (720, 1280)) == []
    assert not np.allclose(c2w, path(name, seed + 1), atol=0.01), "another seed is another path"


def test_in_a_deep_scene_the_speed_bounds_a_path():
    c2w = path("figure_eight", 0, 1000.0)
    speed = np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1) * FPS
    assert speed.max() == pytest.approx(0.4)
    assert np.linalg.norm(c2w[:, :3, 3], axis=1).max() < 24


@pytest.mark.parametrize("name", ["arc", "backtrack", "full_turn", "double_loop"])
def test_where_no_turn_binds_the_speed_is_one(name):
    speed = np.linalg.norm(np.diff(path(name)[:, :3, 3], axis=0), axis=1)
    assert np.percentile(speed, 10) > 0.95 * np.median(speed) and speed.max() < 1.05 * np.median(speed)


@pytest.mark.parametrize("seconds", [5, 10, 30])
@pytest.mark.parametrize("name", ["yaw_sweep", "helix", "whip_pans"])
def test_turns_shrink_where_the_time_is_short(name, seconds):
    c2w = unit_path(waypoints(name, np.random.default_rng(0)), 1 + seconds * 16, FPS)
    assert len(c2w) == 1 + seconds * 16 and turning(c2w).max() <= 12
    assert turning(c2w).sum() / FPS > 0.5 * min(0.9 * 12 * seconds, turning(path(name)).sum() / FPS)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hard_paths_do_what_their_names_say(seed):
    c2w = {name: path(name, seed) for name in NAMES["hard"]}
    yaw, pitch = ({n: yaw_pitch(x)[i] for n, x in c2w.items()} for i in (0, 1))
    rise = {n: -x[:, 1, 3] for n, x in c2w.items()}
    home = {n: np.linalg.norm(x[-1, :3, 3]) for n, x in c2w.items()}
    for name in ("full_turn", "helix"):
        assert abs(yaw[name][-1]) == pytest.approx(360, abs=6)
    assert np.ptp(yaw["yaw_sweep"]) > 225 and home["yaw_sweep"] < 0.3 and abs(yaw["yaw_sweep"][-1]) < 6
    assert rise["helix"][-1] > 1.8 and rise["elevator"].max() > 2.9 and home["elevator"] < 0.3
    assert pitch["pitch_swing"].max() > 63 and pitch["pitch_swing"].min() < -63
    assert pitch["pitch_rise"].min() < -68 and rise["pitch_rise"].max() > 1.5
    assert pitch["crane"].min() < -40 and rise["crane"].max() > 1.5 and rise["crane"][-1] < 0.3
    for name in ("full_turn", "double_loop", "whip_back"):
        assert home[name] < 0.3
    middle, twice = c2w["double_loop"][FRAMES // 2], c2w["double_loop"][:, :3, 3]
    assert np.linalg.norm(middle[:3, 3]) < 0.5 < 2 < np.linalg.norm(twice[FRAMES // 4]), "home after the first loop"
    for name, most in (("whip_pans", 92), ("whip_back", 85)):
        rate = turning(c2w[name])
        assert np.ptp(yaw[name]) > most and (rate > 11.5).mean() > 0.1, "no whip"
        assert (rate < 3).mean() > 0.35, "no steady view between"


def test_simple_paths_are_calm_and_come_back_where_they_should():
    for name in NAMES["simple"]:
        yaw, pitch = yaw_pitch(path(name))
        assert np.ptp(yaw) < 80 and np.abs(pitch).max() < 15
        assert np.ptp(path(name)[:, 1, 3]) < (1.5 if name == "arc_rise" else 0.2)
    for name in ("arc_sides", "s_back", "backtrack", "backtrack_side", "figure_eight"):
        assert np.linalg.norm(path(name)[-1, :3, 3]) < 0.3, name
        assert find_pairs(path(name), FPS, 10.0), name


def test_seeds_draw_sides_and_proportions():
    drawn = [waypoints("figure_eight", np.random.default_rng(seed)) for seed in range(9)]
    assert {bool(x[1, 0] > 0) for x in drawn} == {True, False}
    proportions = [np.ptp(x[:, 2]) / np.ptp(x[:, 0]) for x in drawn]
    assert max(proportions) > 1.3 * min(proportions)


def test_angles_that_wrap_are_the_same_path():
    shape = waypoints("full_turn", np.random.default_rng(0))
    wrapped = shape.copy()
    wrapped[:, 3] = (shape[:, 3] + 180) % 360 - 180
    assert np.ptp(wrapped[:, 3]) < np.ptp(shape[:, 3])
    np.testing.assert_allclose(unit_path(wrapped, FRAMES, FPS), unit_path(shape, FRAMES, FPS), atol=1e-6)


def wall(metres, height=90, width=160):
    """Points (P,3) of a plane across the view."""
    fx, fy, cx, cy = LENS.numpy()
    v, u = np.mgrid[:height, :width]
    x, y = ((u + 0.5) / width - cx) / fx, ((v + 0.5) / height - cy) / fy
    return metres * np.stack([x, y, np.ones_like(x)], axis=-1).reshape(-1, 3)


def nearest(c2w, points):
    return min(np.linalg.norm(points - p, axis=1).min() for p in c2w[::4, :3, 3])


@pytest.mark.parametrize("metres, tries", [(3.35, 0), (3.25, 1), (2.45, 1), (1.9, 2), (1.4, 3)])
def test_a_wall_makes_a_path_smaller_until_it_keeps_the_margin(metres, tries):
    points, free = wall(metres), path("backtrack")  # 3 m ahead and back
    c2w, found = place(unit("backtrack", 0), FPS, DEPTH_M, points)
    assert found == tries and nearest(c2w, points) >= 0.3
    np.testing.assert_allclose(c2w[:, :3, 3], free[:, :3, 3] * 0.7**tries)
    np.testing.assert_array_equal(c2w[:, :3, :3], free[:, :3, :3])
    if tries:
        free = free.copy()
        free[:, :3, 3] *= 0.7 ** (tries - 1)
        assert nearest(free, points) < 0.3, "made smaller than it must"


def test_three_times_smaller_is_the_end_of_it():
    assert place(unit("backtrack", 0), FPS, DEPTH_M, wall(1.0))[1] == 4
    assert place(unit("elevator", 0), FPS, DEPTH_M, wall(1.0))[1] == 0, "beside the way nothing is hit"


def test_depth_becomes_points_where_the_picture_shows_them(tmp_path):
    depth = np.full((9, 16), 4.0, np.float32)
    depth[0, 0], depth[0, 1], depth[0, 2], depth[0, 3] = 0, -1, np.nan, np.inf
    depth[6, 12] = 2.0
    np.save(tmp_path / "d.npy", depth)
    median, points = read_depth(tmp_path / "d.npy", LENS.numpy())
    assert median == 4.0
    # Of 2.7 m and nearer there is one, right and below the middle: (12.5, 6.5) of (16, 9) pixels.
    half = math.tan(math.radians(30))
    np.testing.assert_allclose(points, [[2 * half * (12.5 / 8 - 1), 2 * half * 9 / 16 * (6.5 / 4.5 - 1), 2]])


def scenes(folder, count=2, depth=None):
    folder.mkdir()
    for i in range(count):
        picture = np.random.default_rng(i).integers(0, 255, (36, 64, 3), np.uint8)
        cv2.imwrite(str(folder / f"s{i:02d}.png"), picture)
        (folder / f"s{i:02d}.caption.txt").write_text(f"I stand at place {i}.\n")
    if depth is not None:
        np.save(folder / "s00.depth.npy", depth)
    return folder


def run(monkeypatch, images, out, *more):
    given = ["paths", "--images", str(images), "--out", str(out), "--split", "simple", *more]
    monkeypatch.setattr(sys, "argv", given)
    main()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    top = tmp_path_factory.mktemp("paths")
    depth = np.full((18, 32), 4.0, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        run(patch, scenes(top / "in", 11, depth), top / "a", "--split", "hard")
        run(patch, top / "in", top / "b", "--split", "hard")
        run(patch, top / "in", top / "other", "--split", "hard", "--seed", "1")
    return top


def test_what_is_written_is_what_requests_reads(written):
    found = read_requests(written / "a")
    assert [r.key for r in found] == [f"s{i:02d}" for i in range(11)]
    for i, request in enumerate(found):
        assert request.captions == (f"I stand at place {i}.",)
        assert request.picture.read_bytes() == (written / "in" / request.picture.name).read_bytes()
        file = read_cameras(request.poses, size_hw=(36, 64))
        assert file.c2w.shape == (1, FRAMES, 4, 4) and file.fps == pytest.approx(16)
        np.testing.assert_allclose(file.intrinsics[0, 0], LENS)
        c2w, k = follow(file, 16.0, (36, 64), 2000, LENS, name="test")
        np.testing.assert_allclose(c2w, file.c2w[0], atol=1e-9)
        # Cut to a square, the lens follows the picture: its height fills the frame.
        square = follow(file, 16.0, (32, 32), 2000, LENS, name="test")[1]
        np.testing.assert_allclose(square[0], [LENS[1], LENS[1], 0.5, 0.5])


def test_templates_come_in_turn_and_returns_are_told(written):
    told = json.loads((written / "a" / "revisits.json").read_text())
    assert [told[f"s{i:02d}"]["template"] for i in range(11)] == [*NAMES["hard"], NAMES["hard"][0]]
    for key, row in told.items():
        c2w = read_cameras(written / "a" / f"{key}.npz", size_hw=(36, 64)).c2w[0].numpy()
        reach = np.linalg.norm(c2w[:, :3, 3], axis=1).max()
        assert reach == pytest.approx(0.6 * (4 if key == "s00" else 5) * 0.7 ** row["smaller"])
        if key in ("s00", "s02", "s06", "s08"):
            check_pairs(row["pairs"], c2w)
    assert len(told["s08"]["pairs"]) == 5 and told["s08"]["template"] == "double_loop"
    assert told["s06"]["pairs"] == [], "whip_pans does not come back"
    for split in NAMES:
        protocol = json.loads((root() / "benchmarks/protocols" / f"sana_wm_{split}.json").read_text())
        assert protocol["revisit"]["gap_s"] == GAP_S, "returns told are those that are measured"


def check_pairs(pairs, c2w):
    """Every pair is a return by the rules, and the first is the best of all pairs of frames."""
    R, centre = Rotation.from_matrix(c2w[:, :3, :3]), c2w[:, :3, 3]
    best = np.inf
    for i in range(FRAMES - 160):  # ten seconds apart, and elsewhere in between
        metres = np.linalg.norm(centre[i:] - centre[i], axis=1)
        size = np.maximum(metres / 0.5, np.rad2deg((R[i].inv() * R[i:]).magnitude()) / 20)
        left = np.maximum.accumulate(size)[160:] >= 2
        best = min(best, size[160:][left].min(initial=np.inf))
    sizes = []
    for first, second in pairs:
        metres = np.linalg.norm(centre[first] - centre[second])
        degrees = np.rad2deg((R[first].inv() * R[second]).magnitude())
        assert second - first >= 160 and metres < 0.5 and degrees < 20
        sizes.append(max(metres / 0.5, degrees / 20))
    if pairs:
        assert sizes[0] == pytest.approx(best, abs=1e-5) and max(sizes) <= best + 0.11
    assert bool(pairs) == bool(best < 1) and len(pairs) <= 5


def test_one_seed_is_one_folder_to_the_byte(written):
    names = sorted(p.name for p in (written / "a").iterdir())
    assert len(names) == 34 and names == sorted(p.name for p in (written / "b").iterdir())
    for name in names:
        assert (written / "a" / name).read_bytes() == (written / "b" / name).read_bytes(), name
    for key in ("s00", "s05"):
        assert (written / "a" / f"{key}.npz").read_bytes() != (written / "other" / f"{key}.npz").read_bytes()
    assert sorted(p.name for p in written.iterdir()) == ["a", "b", "in", "other"], "nothing is left beside"


def test_it_says_where_collisions_were_not_looked_for(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "out"
    run(monkeypatch, scenes(tmp_path / "in", 2, np.full((18, 32), 4.0)), out, "--seconds", "6", "--fps", "8")
    with_depth, without = capsys.readouterr().out.splitlines()
    assert with_depth.startswith("s00: arc,") and "no collision check" not in with_depth
    assert without.startswith("s01: arc_rise,") and without.endswith("no depth, so no collision check")
    assert read_cameras(out / "s00.npz", size_hw=(36, 64)).c2w.shape[1] == 49


def spoil(folder, what):
    picture, caption, depth = (folder / f"s00{end}" for end in (".png", ".caption.txt", ".depth.npy"))
    if what == "no images":
        picture.unlink()
        (folder / "s01.png").unlink()
    elif what == "no caption":
        caption.unlink()
    elif what == "empty caption":
        caption.write_text(" \n")
    elif what == "caption not UTF-8":
        caption.write_bytes(b"caf\xe9")
    elif what == "no image":
        picture.write_text("not a picture")
    elif what == "two pictures":
        (folder / "s00.jpg").write_bytes(picture.read_bytes())
    elif what == "depth of three axes":
        np.save(depth, np.ones((2, 3, 1)))
    elif what == "no depth known":
        np.save(depth, np.zeros((2, 3)))
    elif what == "no npy":
        depth.write_text("5 metres")
    elif what == "too near":
        np.save(depth, np.concatenate([np.full((40, 64), 0.2), np.full((41, 64), 5.0)]))


@pytest.mark.parametrize(
    "what, more, told",
    [
        ("no images", (), "holds no <key>.png, .jpg"),
        ("no caption", (), "s00.png has no caption; write one"),
        ("empty caption", (), "s00.png has no caption; write one"),
        ("caption not UTF-8", (), "s00.caption.txt is no UTF-8 text"),
        ("no image", (), "s00.png is no image that can be read"),
        ("two pictures", (), "one key"),
        ("depth of three axes", (), r"s00.depth.npy is \(2, 3, 1\) with 6 known values; give planar depth"),
        ("no depth known", (), "with 0 known values"),
        ("no npy", (), "s00.depth.npy is no array that can be read"),
        ("too near", (), "arc of s00: within 0.3 m of what the first frame shows"),
        ("", ("--fov-deg", "150"), "s00.png at --fov-deg 150"),
        ("", ("--seconds", "0"), "--seconds 0 must be a number above 0"),
        ("", ("--fps", "nan"), "--fps nan must be a number above 0"),
        ("", ("--depth-m", "-2"), "--depth-m -2 must be a number above 0"),
        ("", ("--seconds", "0.01"), "is 1 frames; give 2 to"),
        ("", ("--images", "nowhere"), "nowhere is no folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, what, more, told):
    images = scenes(tmp_path / "in")
    spoil(images, what)
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, images, tmp_path / "out", *more)
    line = capsys.readouterr().err
    assert exit_.value.code == 2 and line.count("\n") == 1
    assert re.search(told, line), line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, monkeypatch, capsys):
    images, out = scenes(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for there in (out, out / "mine.txt", images):
        with pytest.raises(SystemExit):
            run(monkeypatch, images, there)
        assert "is there and not an empty folder" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine.txt"] and len(list(images.iterdir())) == 4
    (out / "mine.txt").unlink()
    run(monkeypatch, images, out, "--seconds", "2")
    assert len(list(out.iterdir())) == 7, "an empty folder is taken"

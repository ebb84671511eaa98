"""Pose files against scipy's rotations, plain matrix inverses and numbers worked out by hand."""

import io
import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from vgr.geometry.formats import read_cameras, write_cameras
from vgr.geometry.published import read_published
from vgr.types import Cameras

F, HEIGHT, WIDTH = 6, 480, 640
K = np.array([0.8, 1.0, 0.52, 0.47])
PIXELS = K * (WIDTH, HEIGHT, WIDTH, HEIGHT)


@pytest.fixture
def poses():
    """Rotation (scipy) and c2w (F,4,4)."""
    rotation = Rotation.random(F, random_state=3)
    c2w = np.tile(np.eye(4), (F, 1, 1))
    c2w[:, :3, :3] = rotation.as_matrix()
    c2w[:, :3, 3] = np.random.default_rng(0).normal(size=(F, 3)) * 3
    return rotation, c2w


def write(path, rows, head=""):
    path.write_text(head + "\n".join(" ".join(str(v) for v in row) for row in rows) + "\n")
    return path


def check(found, c2w, k=None, times=None, atol=1e-12):
    assert isinstance(found, Cameras) and found.c2w.dtype == found.intrinsics.dtype == torch.float64
    np.testing.assert_allclose(found.c2w[0], c2w, atol=atol)
    wanted = np.full((len(c2w), 4), np.nan) if k is None else np.broadcast_to(k, (len(c2w), 4))
    np.testing.assert_allclose(found.intrinsics[0], wanted, atol=atol)
    assert (found.times is None) == (times is None)
    if times is not None:
        np.testing.assert_allclose(found.times, times, atol=1e-9)


def colmap(folder, poses, names, camera="1 PINHOLE 640 480 512 480 332.8 225.6", lines="1 2 -1"):
    rotation, c2w = poses
    w2c = np.linalg.inv(c2w)
    text = "# Image list with two lines of data per image:\n"
    for i, (name, q) in enumerate(zip(names, rotation.inv().as_quat())):
        text += " ".join(map(str, (i + 1, q[3], *q[:3], *w2c[i, :3, 3], 1, name))) + f"\n{lines}\n"
    folder.mkdir(exist_ok=True)
    (folder / "images.txt").write_text(text)
    (folder / "cameras.txt").write_text(f"# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n{camera}\n")
    return folder


def nerf(path, c2w, lens, names=None, **more):
    """OpenGL's camera axes written as columns: right, up, backwards."""
    frames = []
    for i, pose in enumerate(c2w):
        right, down, ahead, centre = pose[:3, 0], pose[:3, 1], pose[:3, 2], pose[:3, 3]
        rows = np.stack([right, -down, -ahead, centre], axis=1).tolist() + [[0, 0, 0, 1]]
        frames.append({"file_path": names[i] if names else f"images/{i}.png", "transform_matrix": rows, **more})
    path.write_text(json.dumps({**lens, "frames": frames}))
    return path


def test_our_npz_round_trips(tmp_path, poses):
    cameras = Cameras(torch.tensor(poses[1])[None], torch.tensor(K).expand(1, F, 4))
    write_cameras(tmp_path / "a.npz", cameras, 16)
    found = read_cameras(tmp_path / "a.npz", size_hw=(7, 9))
    check(found, poses[1], K, np.arange(F) / 16)
    assert found.fps == pytest.approx(16) and found.size_hw is None
    np.savez(tmp_path / "b.npz", c2w=poses[1], intrinsics=np.tile(K, (F, 1)))
    assert read_cameras(tmp_path / "b.npz", "vgr").fps is None


def test_the_bench_npz_is_in_pixels_of_a_given_size(tmp_path, poses):
    k = np.tile(np.array([[1000.0, 0, 640], [0, 990, 360], [0, 0, 1]]), (F, 1, 1))
    path = tmp_path / "scene.npz"
    np.savez(path, c2w=poses[1].astype(np.float32), intrinsics=k, fps=16, num_frames=F)
    found = read_cameras(path, size_hw=(720, 1280))
    check(found, poses[1], (1000 / 1280, 990 / 720, 0.5, 0.5), np.arange(F) / 16, atol=1e-6)
    assert found.size_hw == (720, 1280)
    with pytest.raises(ValueError, match="scene.npz.*size_hw"):
        read_cameras(path)
    np.savez(path, c2w=poses[1], intrinsics=k, fps=16, num_frames=F + 1)
    with pytest.raises(ValueError, match="scene.npz.*num_frames 7"):
        read_cameras(path, size_hw=(720, 1280))


def test_kitti_holds_camera_to_world_rows(tmp_path, poses):
    path = write(tmp_path / "00.txt", poses[1][:, :3].reshape(F, 12).tolist())
    check(read_cameras(path), poses[1])
    cameras = Cameras(torch.tensor(poses[1])[None], torch.tensor(K).expand(1, F, 4))
    write_cameras(tmp_path / "out.txt", cameras, 16, "kitti")
    np.testing.assert_array_equal(np.loadtxt(tmp_path / "out.txt"), poses[1][:, :3].reshape(F, 12))


def test_tum_holds_seconds_and_scalar_last_quaternions(tmp_path, poses):
    rotation, c2w = poses
    times = 1305031102.175304 + np.array([0, 0.1, 0.25, 0.3, 0.4, 0.5])
    rows = np.concatenate([times[:, None], c2w[:, :3, 3], rotation.as_quat()], axis=1)
    path = write(tmp_path / "groundtruth.txt", [[f"{v:.17g}" for v in row] for row in rows], "# ground truth\n")
    found = read_cameras(path)
    np.testing.assert_allclose(found.times, times - times[0], atol=1e-6)  # float64 keeps 1e-7 of such a clock
    assert found.fps == pytest.approx(10, abs=1e-4)
    check(found, c2w, times=found.times)
    # a quarter turn to the right by hand: z becomes x
    quarter = write(tmp_path / "one.txt", [[0, 1, 2, 3, 0, 0.7071, 0, 0.7071]])
    np.testing.assert_allclose(read_cameras(quarter).c2w[0, 0] @ torch.eye(4)[2].double(), [1, 0, 0, 0], atol=1e-12)


def test_written_tum_is_scipys(tmp_path, poses):
    rotation = Rotation.from_rotvec(
        np.array([[0, 0, 0], [1e-9, 0, 0], [0, 3.1415, 0], [0.3, -2, 1], [0, 0, 1], [1, 0, 0]])
    )
    c2w = poses[1].copy()
    c2w[:, :3, :3] = rotation.as_matrix()
    cameras = Cameras(torch.tensor(c2w)[None], torch.tensor(K).expand(1, F, 4))
    write_cameras(tmp_path / "out.txt", cameras, 8, "tum")
    rows = np.loadtxt(tmp_path / "out.txt")
    np.testing.assert_allclose(rows[:, 0], np.arange(F) / 8)
    np.testing.assert_allclose((Rotation.from_quat(rows[:, 4:]) * rotation.inv()).magnitude(), 0, atol=1e-9)
    check(read_cameras(tmp_path / "out.txt"), c2w, times=np.arange(F) / 8, atol=1e-9)
    with pytest.raises(ValueError, match="blender.*vgr, sana_wm_bench, kitti, tum"):
        write_cameras(tmp_path / "x", cameras, 8, "blender")


@pytest.mark.parametrize("head", ["", "https://www.youtube.com/watch?v=x\n", "a title of words\n"])
def test_realestate10k_holds_world_to_camera_and_microseconds(tmp_path, poses, head):
    w2c = np.linalg.inv(poses[1])[:, :3].reshape(F, 12)
    stamps = 52553000 + np.arange(F) * 33367
    path = write(tmp_path / "clip.txt", [[t, *K, 0, 0, *row] for t, row in zip(stamps, w2c)], head)
    found = read_cameras(path, size_hw=(720, 1280))
    check(found, poses[1], K, np.arange(F) * 0.033367)
    assert found.fps == pytest.approx(29.97, abs=0.01) and found.size_hw == (720, 1280)


@pytest.mark.parametrize("stamps", [[0] * F, range(F), [100 * i for i in range(F)]])
def test_realestate10k_without_a_clock_has_no_times(tmp_path, poses, stamps):
    w2c = np.linalg.inv(poses[1])[:, :3].reshape(F, 12)
    path = write(tmp_path / "clip.txt", [[t, *K, 0, 0, *row] for t, row in zip(stamps, w2c)])
    assert read_cameras(path).times is None


@pytest.mark.parametrize("lines", ["10.5 20 -1 11 21 4", ""])
def test_colmap_is_world_to_camera_in_the_order_of_names(tmp_path, poses, lines):
    names = [f"frame_{i}.png" for i in (9, 10, 1, 2, 11, 100)]
    order = [2, 3, 0, 1, 4, 5]
    folder = colmap(tmp_path / "0", poses, names, lines=lines)
    for given in (folder, folder / "images.txt"):
        found = read_cameras(given)
        check(found, poses[1][order], K)
        assert found.size_hw == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("camera", "k"),
    [
        ("1 SIMPLE_PINHOLE 640 480 480 320 240", (0.75, 1.0, 0.5, 0.5)),
        ("1 SIMPLE_RADIAL 640 480 480 320 240 0", (0.75, 1.0, 0.5, 0.5)),
        ("1 OPENCV 640 480 512 480 332.8 225.6 0 0 0 0.0", K),
    ],
)
def test_colmap_models(tmp_path, poses, camera, k):
    check(read_cameras(colmap(tmp_path / "0", poses, [f"{i}.png" for i in range(F)], camera)), poses[1], k)


def test_nerf_cameras_look_along_minus_z(tmp_path, poses):
    lens = {"fl_x": PIXELS[0], "fl_y": PIXELS[1], "cx": PIXELS[2], "cy": PIXELS[3], "w": WIDTH, "h": HEIGHT}
    found = read_cameras(nerf(tmp_path / "transforms.json", poses[1], lens))
    check(found, poses[1], K)
    # What an OpenGL camera sees at (x, y, -depth) lies at (x, -y, depth) for ours: right and up in the picture.
    matrix = np.array(json.loads((tmp_path / "transforms.json").read_text())["frames"][2]["transform_matrix"])
    point = torch.tensor(matrix @ [1.0, 0.5, -4.0, 1.0])[:3]
    local = (point - found.c2w[0, 2, :3, 3]) @ found.c2w[0, 2, :3, :3]
    focal, centre = found.intrinsics[0, 2].chunk(2)
    seen, depth = (focal * local[:2] / local[2] + centre)[None], local[2:]
    np.testing.assert_allclose(seen[0], [K[2] + K[0] / 4, K[3] - K[1] * 0.5 / 4])
    assert float(depth) == pytest.approx(4.0)


def test_nerf_lenses_by_angle_and_by_frame(tmp_path, poses):
    path = tmp_path / "transforms.json"
    found = read_cameras(nerf(path, poses[1], {"camera_angle_x": np.pi / 2}), size_hw=(HEIGHT, WIDTH))
    check(found, poses[1], (0.5, 0.5 * WIDTH / HEIGHT, 0.5, 0.5))
    both = {"camera_angle_x": np.pi / 2, "camera_angle_y": np.pi / 2, "w": WIDTH, "h": HEIGHT}
    check(read_cameras(nerf(path, poses[1], both)), poses[1], (0.5, 0.5, 0.5, 0.5))
    check(read_cameras(nerf(path, poses[1], both, fl_x=320.0, fl_y=480.0)), poses[1], (0.5, 1.0, 0.5, 0.5))
    check(read_cameras(nerf(path, poses[1], {})), poses[1])
    names = [f"./r_{i}" for i in (3, 10, 2, 1, 0, 7)]
    check(read_cameras(nerf(path, poses[1], {}, names)), poses[1][[4, 3, 2, 0, 5, 1]])
    with pytest.raises(ValueError, match="size_hw"):
        read_cameras(nerf(path, poses[1], {"camera_angle_x": 1.0}))


ROW = "1 0 0 0 0 1 0 0 0 0 1 0"
RE10K = f"0 0.5 0.5 0.5 0.5 0 0 {ROW}"


@pytest.mark.parametrize(
    ("format", "text", "told"),
    [
        ("auto", "1 2 3\n4 5 6\n", "kitti, tum, realestate10k, colmap, nerf"),
        ("auto", "", "kitti"),
        ("kitti", f"{ROW}\n{ROW[:-1]}x\n", "line 2: needs 12 finite numbers"),
        ("kitti", f"# poses\n\n{ROW} 3\n", "line 3: needs 12"),
        ("kitti", ROW.replace("0", "nan", 1), "line 1"),
        ("kitti", "# nothing\n", "0 poses"),
        ("tum", "0 0 0 0 0 0 0 1\n1 0 0 0 0 0 0 2\n", "line 2: a rotation's quaternion has length 1, not 2"),
        ("tum", "0 0 0 0 0 0 0 1\n# a\n0 0 0 0 0 0 0 1\n", "line 3: time 0 does not follow 0"),
        ("realestate10k", f"title\n{RE10K}\n{RE10K.replace('0.5 0 0', '0.5 0.1 0')}\n", "line 3: columns 6 and 7"),
        ("nerf", "{", "frames"),
        ("nerf", "[]", "frames"),
        ("nerf", '{"frames": [{"file_path": "a"}]}', "transform_matrix"),
        ("nerf", '{"frames": [{"transform_matrix": [[1, 2, 3]]}]}', "frame 0: needs 12 finite numbers"),
        ("nerf", '{"w": 2, "h": 0, "fl_x": 1, "frames": [{"transform_matrix": %s}]}', "2x0 pixels"),
        ("nerf", '{"w": 2, "h": 2, "fl_x": 1, "k1": 0.1, "frames": [{"transform_matrix": %s}]}', "lens distortion"),
        ("nerf", '{"camera_model": "OPENCV_FISHEYE", "fl_x": 1, "frames": [{"transform_matrix": %s}]}', "FISHEYE"),
        ("nerf", '{"w": "a", "h": 2, "fl_x": 1, "frames": [{"transform_matrix": %s}]}', "needs 3 finite numbers"),
        ("kittti", ROW, "kitti, tum"),
    ],
)
def test_wrong_text_is_named_with_file_and_line(tmp_path, format, text, told):
    path = tmp_path / "poses.txt"
    path.write_text(text.replace("%s", "[[1,0,0,0],[0,1,0,0],[0,0,1,0],[0,0,0,1]]"))
    with pytest.raises(ValueError, match=told) as refused:
        read_cameras(path, format)
    assert format == "kittti" or "poses.txt" in str(refused.value)


def test_wrong_colmap_models_are_named(tmp_path, poses):
    names = [f"{i}.png" for i in range(F)]
    for camera, told in (
        ("1 SIMPLE_RADIAL 640 480 480 320 240 0.1", "cameras.txt: line 2: lens distortion"),
        ("1 FOV 640 480 480 480 320 240 0.1", "cameras.txt: line 2: needs CAMERA_ID MODEL"),
        ("1 PINHOLE 640 480 480", "cameras.txt: line 2: needs 6 finite numbers"),
        ("2 PINHOLE 640 480 512 480 332.8 225.6", "images.txt: line 2: no camera 1"),
    ):
        with pytest.raises(ValueError, match=told):
            read_cameras(colmap(tmp_path / "0", poses, names, camera))
    two = colmap(tmp_path / "0", poses, names, "1 PINHOLE 640 480 1 1 1 1\n2 PINHOLE 64 48 1 1 1 1")
    (two / "images.txt").write_text((two / "images.txt").read_text().replace(" 1 5.png", " 2 5.png"))
    with pytest.raises(ValueError, match="several sizes"):
        read_cameras(two)
    (two / "images.txt").rename(two / "images.bin")
    with pytest.raises(ValueError, match="holds no cameras.bin and images.bin"):
        read_cameras(two)


def binary(folder, poses, names, points=3):
    """COLMAP's layout by hand: counts, then records, little-endian."""
    rotation, c2w = poses
    w2c = np.linalg.inv(c2w)
    folder.mkdir(exist_ok=True)
    (folder / "cameras.bin").write_bytes(struct.pack("<QIiQQ4d", 1, 7, 1, WIDTH, HEIGHT, *PIXELS))
    data = struct.pack("<Q", F)
    for i, (name, q) in enumerate(zip(names, rotation.inv().as_quat())):
        data += struct.pack("<I7dI", i + 1, q[3], *q[:3], *w2c[i, :3, 3], 7) + name.encode() + b"\0"
        data += struct.pack("<Q", points) + points * struct.pack("<2dq", 1.5, 2.5, -1)
    (folder / "images.bin").write_bytes(data)
    return folder


def test_colmap_in_binary_equals_text(tmp_path, poses):
    names = [f"frame_{i}.png" for i in (9, 10, 1, 2, 11, 100)]
    folder = binary(tmp_path / "0", poses, names)
    for given in (folder, folder / "images.bin", folder / "cameras.bin"):
        found = read_cameras(given)
        check(found, poses[1][[2, 3, 0, 1, 4, 5]], K)
        assert found.size_hw == (HEIGHT, WIDTH)
    colmap(folder, poses, [f"{i}.png" for i in range(F)])
    check(read_cameras(folder / "images.txt"), poses[1], K)


def test_colmaps_own_binary_files(tmp_path, poses):
    pycolmap = pytest.importorskip("pycolmap")
    model = pycolmap.Reconstruction()
    camera = pycolmap.Camera(camera_id=1, model="PINHOLE", width=640, height=480, params=PIXELS)
    model.add_camera_with_trivial_rig(camera)
    for i, w2c in enumerate(np.linalg.inv(poses[1])):
        image = pycolmap.Image(name=f"{i}.png", camera_id=1, image_id=i + 1)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(w2c[:3]))
    model.write_binary(tmp_path)
    check(read_cameras(tmp_path), poses[1], K)


def test_binary_counts_beyond_the_file_allocate_nothing(tmp_path, poses):
    folder = binary(tmp_path / "0", poses, [f"{i}.png" for i in range(F)])
    whole = {name: (folder / name).read_bytes() for name in ("cameras.bin", "images.bin")}
    for name, damaged, told in (
        ("cameras.bin", struct.pack("<Q", 1 << 60) + whole["cameras.bin"][8:], "cameras.bin: says 1152921504606846976"),
        ("images.bin", struct.pack("<Q", F + 9) + whole["images.bin"][8:], "images.bin: says"),
        ("images.bin", whole["images.bin"][:-1], "images.bin: says"),
        ("images.bin", b"", "images.bin: says 1 items of 8 bytes or more at byte 0 of its 0"),
        ("images.bin", whole["images.bin"].replace(b"\0", b"x"), "images.bin"),
        ("cameras.bin", whole["cameras.bin"].replace(struct.pack("<i", 1), struct.pack("<i", 99), 2), "camera 7|says"),
    ):
        (folder / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=told):
            read_cameras(folder)
        (folder / name).write_bytes(whole[name])


@pytest.mark.parametrize("format", ["vgr", "sana_wm_bench", "kitti", "tum", "realestate10k", "colmap", "nerf"])
@pytest.mark.parametrize("zoom", [False, True])
def test_what_is_written_is_read_back(tmp_path, poses, format, zoom):
    k = torch.tensor(K) * (1 + 0.1 * torch.arange(F)[:, None] * zoom)
    names = {"vgr": "x.npz", "sana_wm_bench": "x.npz", "colmap": "0", "nerf": "transforms.json"}
    path = tmp_path / names.get(format, "x.txt")
    write_cameras(path, Cameras(torch.tensor(poses[1])[None], k[None]), 16, format, size_hw=(HEIGHT, WIDTH))
    found = read_cameras(path, size_hw=(HEIGHT, WIDTH))
    timed = format not in ("kitti", "colmap", "nerf")
    lenses = None if format in ("kitti", "tum") else k.numpy()
    check(found, poses[1], lenses, np.arange(F) / 16 if timed else None, 1e-9)


def test_writers_refuse_what_a_format_cannot_hold(tmp_path, poses):
    cameras = Cameras(torch.tensor(poses[1])[None], torch.full((1, F, 4), torch.nan))
    for format in ("colmap", "nerf", "sana_wm_bench"):
        with pytest.raises(ValueError, match=f"{format} holds intrinsics in pixels"):
            write_cameras(tmp_path / "x", cameras, 8, format)
    for format in ("vgr", "realestate10k"):
        with pytest.raises(ValueError, match="not finite"):
            write_cameras(tmp_path / "x", cameras, 8, format)
    assert not list(tmp_path.iterdir())


def published(folder, poses, **changed):
    """Two clips of two and four frames in one sidecar, and the zip that tells their sizes."""
    pixels = np.tile(PIXELS, (F, 1))
    arrays = {"ids": np.array(["b", "a"]), "ranges": np.array([[0, 2], [2, 4]]), "pose": poses[1], "intrinsics": pixels}
    np.savez(folder / "part_camera.npz", **{**arrays, **changed})
    (folder / "part_metric_scale_stats.json").write_text(json.dumps({"a": {"median": 2.0}, "b": 0.5}))
    with zipfile.ZipFile(folder / "part.zip", "w") as archive:
        for key in "ab":
            archive.writestr(f"{key}.json", json.dumps({"width": WIDTH, "height": HEIGHT, "prompt": key}))
    return folder / "part.zip"


def test_published_zips_hold_many_clips_in_units_of_their_own(tmp_path, poses):
    found = read_published(published(tmp_path, poses))
    assert list(found) == ["b", "a"] and found["a"].size_hw == (HEIGHT, WIDTH)
    for key, rows, metres in (("b", slice(0, 2), 0.5), ("a", slice(2, 6), 2.0)):
        c2w = poses[1][rows].copy()
        c2w[:, :3, 3] *= metres
        check(found[key], c2w, K)
    for changed, told in (
        ({"ranges": np.array([[0, 2], [2, 5]])}, "a: rows 2 to 7 of 6"),
        ({"ids": np.array(["b", "c"])}, "c"),
        ({"pose": poses[1][:5]}, r"pose.*\(5, 4, 4\)"),
        ({"ids": np.array([{"b": 1}, 2])}, "part_camera.npz"),
    ):
        with pytest.raises(ValueError, match=told):
            read_published(published(tmp_path, poses, **changed))


def test_wrong_npz_are_named_and_never_unpickled(tmp_path, poses):
    path, k = tmp_path / "poses.npz", np.tile(K, (F, 1))
    for arrays, told in (
        ({"c2w": np.array([{"a": 1}]), "intrinsics": k}, "allow_pickle=False"),
        ({"c2w": poses[1]}, "no intrinsics"),
        ({"c2w": poses[1][:, :3], "intrinsics": k}, r"c2w \(6, 3, 4\)"),
        ({"c2w": poses[1][:5], "intrinsics": k}, r"intrinsics \(6, 4\)"),
        ({"c2w": np.float64(1), "intrinsics": k}, r"c2w \(\)"),
        ({"c2w": poses[1], "intrinsics": k, "fps": 0}, "fps is 0"),
        ({"c2w": poses[1], "intrinsics": k, "fps": np.ones(2)}, "fps is"),
        ({"c2w": poses[1][:0], "intrinsics": k[:0]}, "0 poses"),
        ({"c2w": np.full((F, 4, 4), "a"), "intrinsics": k}, "could not convert"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=f"poses.npz.*{told}"):
            read_cameras(path)
    np.savez_compressed(path, c2w=poses[1], intrinsics=k)
    whole = path.read_bytes()
    for damaged in (b"", b"no zip", whole[: len(whole) // 2], whole[:80] + bytes(40) + whole[120:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="poses.npz"):
            read_cameras(path)


def test_an_npz_that_says_more_than_it_holds_allocates_nothing(tmp_path):
    path = tmp_path / "big.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**15, 4, 4)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c2w.npy", header.getvalue())
        archive.writestr("intrinsics.npy", header.getvalue())
    with pytest.raises(ValueError, match="big.npz"):
        read_cameras(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(9):
            archive.writestr(f"{i}.npy", bytes(1 << 25), compresslevel=1)
    with pytest.raises(ValueError, match="big.npz.*256 MiB"):
        read_cameras(path)


def test_a_missing_file_is_an_os_error(tmp_path):
    for name in ("none.npz", "none.txt", "none.json"):
        with pytest.raises(FileNotFoundError, match=name):
            read_cameras(tmp_path / name)

"""vgr-sample: what it writes, that equal seeds give equal videos, and that mistakes end in one line and code 2."""

import contextlib
import io
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation, Slerp

sys.path.insert(0, str(Path(__file__).parent))
from small_training import make_project, train  # noqa: E402

from vgr import sample
from vgr.data.video import read_video
from vgr.generator import Generator
from vgr.geometry.formats import write_cameras
from vgr.geometry.trajectories import from_actions
from vgr.types import Cameras

RUN = "runs/mini/seed1"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    import cv2

    folder = make_project(tmp_path_factory.mktemp("sample"))
    assert train(folder).returncode == 0
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "first.png"), image)
    for name in ("words.png", "words.mp4"):
        (folder / name).write_text("this is no image")
    return folder


def turning(frames=9, degrees=1.0):
    """Poses (F,4,4) that turn right and walk ahead in a world whose origin is elsewhere."""
    rotation = Rotation.from_euler("xyz", [[40, 10 + degrees * i, 20] for i in range(frames)], degrees=True)
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, :3, :3] = rotation.as_matrix()
    c2w[:, :3, 3] = np.outer(np.arange(frames), [0, 0, 0.02]) + [5000, 2, 3]
    return c2w


def pose_file(path, c2w, fps, k=(0.5, 0.6, 0.5, 0.5), format="vgr"):
    write_cameras(path, Cameras(torch.tensor(c2w)[None], torch.tensor(k).expand(1, len(c2w), 4)), fps, format)
    return path.name


def made(folder, name):
    """c2w and intrinsics that vgr-sample wrote."""
    with np.load(folder / name / "cameras.npz", allow_pickle=False) as file:
        return file["c2w"], file["intrinsics"]


def run(folder, *words):
    """vgr-sample in this process: exit code and stderr."""
    err, code = io.StringIO(), 0
    here = os.getcwd()
    os.chdir(folder)
    try:
        with mock.patch.object(sys, "argv", ["vgr-sample", "device=cpu", *words]), contextlib.redirect_stderr(err):
            sample.main()
    except SystemExit as exit_:
        code = exit_.code
    finally:
        os.chdir(here)
    return code, err.getvalue()


def test_a_path_becomes_video_poses_and_settings(project):
    words = (f"checkpoint={RUN}", "path=orbit", "seconds=1.5", "first_frame=first.png", "prompt=a room", "out=made")
    assert run(project, *words)[0] == 0
    frames, times = read_video(project / "made/video.mp4")
    assert frames.shape == (13, 32, 32, 3) and times[-1] == pytest.approx(1.5)
    beside, _ = read_video(project / "made/side_by_side.mp4")
    assert len(beside) == 13 and beside.shape[2] > beside.shape[1]
    poses = np.load(project / "made/cameras.npz", allow_pickle=False)
    assert poses["c2w"].shape == (13, 4, 4) and np.allclose(poses["c2w"][0], np.eye(4), atol=1e-6)
    settings = json.loads((project / "made/sample.json").read_text())
    assert settings["path"] == "orbit" and settings["prompt"] == "a room" and len(settings["weights"]) == 64


def test_actions_drive_the_camera(project):
    assert run(project, f"checkpoint={RUN}", "actions=[w-4,l-4]", "out=driven")[0] == 0
    poses = np.load(project / "driven/cameras.npz", allow_pickle=False)["c2w"]
    np.testing.assert_allclose(poses, from_actions("w-4,l-4").numpy(), atol=1e-6)


def test_a_pose_file_of_another_rate_is_followed_at_the_models(project):
    """12 poses at 10 a second become 9 at 8, as scipy turns them; the last pose of the file lies beyond."""
    c2w = turning(12)
    k = np.linspace((0.5, 0.6, 0.5, 0.5), (0.6, 0.7, 0.52, 0.5), 12)
    np.savez(project / "ten.npz", c2w=c2w, intrinsics=k, fps=10)
    code, err = run(project, f"checkpoint={RUN}", "cameras=ten.npz", "scale=2", "out=ten")
    assert code == 0
    poses, intrinsics = made(project, "ten")
    times = np.arange(9) / 8
    assert len(poses) == len(read_video(project / "ten/video.mp4")[0]) == 9
    start = Rotation.from_matrix(c2w[0, :3, :3])
    wanted = start.inv() * Slerp(np.arange(12) / 10, Rotation.from_matrix(c2w[:, :3, :3]))(times)
    np.testing.assert_allclose(poses[:, :3, :3], wanted.as_matrix(), atol=1e-6)
    np.testing.assert_allclose(poses[:, :3, 3], start.inv().apply(np.outer(times, [0, 0, 0.4])), atol=1e-6)
    np.testing.assert_allclose(intrinsics[:, 0], np.interp(times, np.arange(12) / 10, k[:, 0]), atol=1e-6)
    # 0.4 m/s after the scale is the limit itself; the turn is 1 degree a tenth of a second
    assert "warning" not in err
    assert json.loads((project / "ten/sample.json").read_text())["cameras"] == "ten.npz"


def test_a_pose_file_without_times_or_lens_takes_the_models(project):
    name = pose_file(project / "bare.txt", turning(7, 3.0), 8, format="kitti")
    code, err = run(project, f"checkpoint={RUN}", f"cameras={name}", "out=bare")
    poses, intrinsics = made(project, "bare")
    assert code == 0 and len(poses) == 7
    relative = np.linalg.inv(turning(7, 3.0)[0]) @ turning(7, 3.0)
    np.testing.assert_allclose(poses, relative, atol=1e-6)
    np.testing.assert_allclose(intrinsics, np.tile(Generator.load(project / RUN, "cpu").intrinsics, (7, 1)), atol=1e-6)
    assert "vgr-sample: warning: frame" in err and "rotation at 24 degrees/s" in err


def test_intrinsics_are_cut_like_the_first_frame_and_can_be_given(project):
    """A bench file in pixels of the 60x40 first frame, of which the middle 40x40 become the 32x32 picture."""
    k = np.tile([[30.0, 0, 30], [0, 32, 22], [0, 0, 1]], (9, 1, 1))
    np.savez(project / "bench.npz", c2w=turning(), intrinsics=k, fps=8, num_frames=9)
    words = (f"checkpoint={RUN}", "cameras=bench.npz", "first_frame=first.png")
    assert run(project, *words, "out=cut")[0] == 0
    wanted = np.tile([30 / 40, 32 / 40, 20 / 40, 22 / 40], (9, 1))
    np.testing.assert_allclose(made(project, "cut")[1], wanted, atol=1e-6)
    assert run(project, *words, "intrinsics=[0.5,0.6,0.4,0.5]", "out=four")[0] == 0
    np.testing.assert_allclose(made(project, "four")[1], np.tile([0.5, 0.6, 0.4, 0.5], (9, 1)), atol=1e-6)
    assert run(project, f"checkpoint={RUN}", "actions=[w-4]", "intrinsics=90", "out=angle")[0] == 0
    np.testing.assert_allclose(made(project, "angle")[1], np.full((5, 4), 0.5), atol=1e-6)


def test_videos_depend_on_their_own_seed_only(project):
    generator = Generator.load(project / RUN, "cpu")
    cameras = Cameras(torch.eye(4).repeat(2, 9, 1, 1), torch.tensor(generator.intrinsics).repeat(2, 9, 1))
    first = np.zeros((2, 32, 32, 3), np.uint8)
    both, timings = generator(first, cameras, (("a",), ("b",)), [5, 6])
    alone, _ = generator(first[1:], Cameras(cameras.c2w[1:], cameras.intrinsics[1:]), (("b",),), [6])
    assert np.abs(both[1:].astype(int) - alone).max() <= 1
    assert np.abs(both[1].astype(int) - both[0]).max() > 1
    assert timings["total_s"] >= timings["denoise_s"] > 0


def test_the_given_first_frame_is_kept(project):
    generator = Generator.load(project / RUN, "cpu")
    image = np.random.default_rng(1).integers(0, 255, (1, 32, 32, 3), dtype=np.uint8)
    cameras = Cameras(torch.eye(4).repeat(1, 5, 1, 1), torch.tensor(generator.intrinsics).repeat(1, 5, 1))
    video, _ = generator(image, cameras, (("a",),), [1])
    clip = torch.from_numpy(image).permute(0, 3, 1, 2)[:, :, None] / 127.5 - 1
    kept = generator.codec.decode(generator.codec.encode(clip))
    expected = ((kept[0, :, 0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(video[0, 0], expected)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("path=orbit", "seconds=60"), "beyond this model"),
        (("actions=[w-400]",), "beyond this model"),
        (("path=orbitt", "seconds=1"), "orbit"),
        (("path=orbit", "actions=[w-4]"), "got path and actions"),
        (("cameras=whole.npz", "actions=[w-4]"), "got actions and cameras"),
        ((), "cameras=<pose file> and shots=<story.yaml>; got none"),
        (("cameras=none.npz",), "none.npz"),
        (("cameras=words.png",), "kitti, tum"),
        (("cameras=sheared.npz",), "cameras=sheared.npz: camera frame 4: the 3x3 part is no rotation"),
        (("cameras=wide.npz",), "cameras=wide.npz: camera frame 0: field of view 136.4 x"),
        (("cameras=gap.npz",), "cameras=gap.npz: camera frame 3: intrinsics [nan"),
        (("cameras=long.npz",), "cameras=long.npz holds 200 poses over 24.88 s"),
        (("cameras=one.npz",), "this model makes 2 to 17 frames"),
        (("cameras=pixels.npz",), "first_frame="),
        (("cameras=whole.npz", "scale=big"), "scale=big"),
        (("cameras=whole.npz", "intrinsics=wide"), "cannot be estimated"),
        (("path=orbit", "seconds=1", "intrinsics=[1,2,3]"), "intrinsics=[1, 2, 3]"),
        (("path=orbit", "seconds=1", "intrinsics=150"), "field of view 150.0"),
        (("actions=[w-4,q-3]",), "q"),
        (("path=orbit", "seconds=1", "first_frame=words.png"), "words.png"),
        (("path=orbit", "seconds=1", "first_frame=words.mp4"), "words.mp4"),
        (("path=orbit", "seconds=1", "first_frame=none.png"), "none.png"),
        (("path=orbit", "second=1"), "seconds"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(project, words, told):
    sheared = turning()
    sheared[4, 0, 0] += 0.1
    pose_file(project / "whole.npz", turning(), 8)
    pose_file(project / "sheared.npz", sheared, 8)
    pose_file(project / "wide.npz", turning(), 8, (0.2, 0.6, 0.5, 0.5))
    pose_file(project / "long.npz", turning(200), 8)
    gap = np.tile([0.5, 0.6, 0.5, 0.5], (9, 1))
    gap[3, 0] = np.nan
    np.savez(project / "gap.npz", c2w=turning(), intrinsics=gap, fps=8)
    pose_file(project / "one.npz", turning(1), 8)
    np.savez(project / "pixels.npz", c2w=turning(), intrinsics=np.tile(np.eye(3), (9, 1, 1)), fps=8)
    before = sorted(project.iterdir())
    code, err = run(project, f"checkpoint={RUN}", *words)
    assert code == 2 and told in err and err.count("\n") == 1 and err.startswith("vgr-sample: error:")
    assert sorted(project.iterdir()) == before


def test_missing_and_truncated_checkpoints_are_named(project, tmp_path):
    code, err = run(tmp_path, "checkpoint=nothing", "path=orbit")
    assert code == 2 and "nothing" in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
    shutil.copytree(project / RUN, tmp_path / "run")
    victim = next((tmp_path / "run/checkpoints").glob("step_*/ema/*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:1000])
    code, err = run(tmp_path, "checkpoint=run", "path=orbit")
    assert code == 2 and victim.name in err and err.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_is_one_line_and_code_2_and_leaves_no_file(project):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        code, err = run(project, f"checkpoint={RUN}", "path=orbit", "seconds=1", "out=full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    errors = [line for line in err.splitlines() if not line.startswith("denoising: ")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith("vgr-sample: error: File too large")
    assert not [p for p in (project / "full").rglob("*") if p.is_file()]

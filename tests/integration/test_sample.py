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

sys.path.insert(0, str(Path(__file__).parent))
from small_training import make_project, train  # noqa: E402

from vgr import sample
from vgr.data.video import read_video
from vgr.geometry.trajectories import from_actions
from vgr.sample import Generator
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
        (("path=orbit", "actions=[w-4]"), "either path"),
        (("actions=[w-4,q-3]",), "q"),
        (("path=orbit", "seconds=1", "first_frame=words.png"), "words.png"),
        (("path=orbit", "seconds=1", "first_frame=words.mp4"), "words.mp4"),
        (("path=orbit", "seconds=1", "first_frame=none.png"), "none.png"),
        (("path=orbit", "second=1"), "seconds"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(project, words, told):
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

"""Damage to pose files of every format ends in cameras or in a ValueError, in nothing else."""

import json
import zipfile

import numpy as np
import pytest
import torch
from damage import CUT, EDITS, damaged, searched
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from vgr.geometry.formats import read_cameras, write_cameras
from vgr.geometry.published import read_published
from vgr.types import Cameras

SIZE = (48, 64)
ROUNDS = 400


def made(folder, format):
    """A small file of a format, and the files that may be damaged."""
    c2w = torch.eye(4, dtype=torch.float64).repeat(1, 4, 1, 1)
    c2w[0, :, :3, :3] = torch.tensor(Rotation.random(4, random_state=0).as_matrix())
    cameras = Cameras(c2w, torch.tensor([0.6, 0.8, 0.5, 0.5]).expand(1, 4, 4))
    if format == "colmap binary":
        pycolmap = pytest.importorskip("pycolmap")
        write_cameras(folder, cameras, 8, "colmap", size_hw=SIZE)
        pycolmap.Reconstruction(folder).write_binary(folder)
        return folder, [folder / "cameras.bin", folder / "images.bin"]
    if format == "published":
        np.savez(folder / "p_camera.npz", ids=np.array(["a"]), ranges=np.array([[0, 4]]), pose=c2w[0].numpy(),
                 intrinsics=np.full((4, 4), 9.0))  # fmt: skip
        (folder / "p_metric_scale_stats.json").write_text(json.dumps({"a": {"median": 2.0}}))
        with zipfile.ZipFile(folder / "p.zip", "w") as archive:
            archive.writestr("a.json", json.dumps({"width": 64, "height": 48}))
        return folder / "p.zip", sorted(folder.iterdir())
    path = folder / {"vgr": "x.npz", "sana_wm_bench": "x.npz", "nerf": "x.json", "colmap": "0"}.get(format, "x.txt")
    write_cameras(path, cameras, 8, format, size_hw=SIZE)
    return path, [path / "cameras.txt", path / "images.txt"] if format == "colmap" else [path]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "format", ["vgr", "sana_wm_bench", "kitti", "tum", "realestate10k", "colmap", "colmap binary", "nerf", "published"]
)
def test_damaged_files_end_in_value_errors_only(tmp_path, format):
    path, files = made(tmp_path, format)
    whole = {file: file.read_bytes() for file in files}
    named = [None] if format == "published" else ["auto", format.split()[0]]
    refused = 0

    @searched(ROUNDS)
    @given(file=st.sampled_from(files), edits=EDITS, cut=CUT)
    def read(file, edits, cut):
        nonlocal refused
        file.write_bytes(damaged(whole[file], edits, cut))
        for name in named:
            try:
                found = read_published(path) if name is None else read_cameras(path, name, size_hw=SIZE)
            except ValueError as error:
                assert str(error)
                refused += 1
            else:
                for cameras in found.values() if name is None else [found]:
                    assert cameras.c2w.shape[2:] == (4, 4) and cameras.c2w.shape[:2] == cameras.intrinsics.shape[:2]
        file.write_bytes(whole[file])

    read()
    assert refused > ROUNDS / 10

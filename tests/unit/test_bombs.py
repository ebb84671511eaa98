"""Archives and headers that promise more than there is, or hold more than is sane: refused before memory is taken."""

import io
import json
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from vgr.data.shards import _read_npz
from vgr.geometry import camera_file, published
from vgr.geometry.camera_file import read_npy
from vgr.geometry.formats import read_cameras
from vgr.geometry.published import read_published


def header(shape):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return out.getvalue()


def peak(work, error=ValueError, match=None):
    tracemalloc.start()
    try:
        with pytest.raises(error, match=match):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)


def test_arrays_smaller_than_their_header_says_take_no_memory(tmp_path):
    promised = header((1 << 28, 4, 4)) + bytes(128)
    assert peak(lambda: read_npy(promised), match="does not fit") < 1 << 20
    npz(tmp_path / "a.npz", c2w=promised, intrinsics=header((1, 4)) + bytes(32))
    assert peak(lambda: read_cameras(tmp_path / "a.npz"), match="does not fit") < 1 << 20
    assert peak(lambda: _read_npz((tmp_path / "a.npz").read_bytes()), match="does not fit") < 1 << 20


def test_archives_that_unpack_to_too_much_are_refused_unread(tmp_path, monkeypatch):
    zeros = header((1 << 22,)) + bytes(8 << 22)  # 32 MiB, 32 kB packed
    npz(tmp_path / "a.npz", c2w=zeros, intrinsics=zeros)
    data = (tmp_path / "a.npz").read_bytes()
    assert len(data) < 1 << 17
    monkeypatch.setattr(camera_file, "MAX_BYTES", 48 << 20)
    assert peak(lambda: read_cameras(tmp_path / "a.npz"), match="more than 48 MiB") < 1 << 20
    assert peak(lambda: _read_npz(data, 48 << 20), match="an archive of more than") < 1 << 20
    # A directory that says less than is packed: no more is unpacked than it says.
    lying = bytearray(data)
    at = lying.index(b"PK\1\2")
    while at >= 0:
        lying[at + 24 : at + 28] = struct.pack("<I", 1000)
        at = lying.find(b"PK\1\2", at + 1)
    assert peak(lambda: _read_npz(bytes(lying), 48 << 20), zipfile.BadZipFile, match="Bad CRC-32") < 1 << 21
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("c2w.npy", zeros)
    with pytest.raises(ValueError, match="c2w.npy is packed by method 12"):
        _read_npz((tmp_path / "b.npz").read_bytes())


def test_a_published_clips_json_is_bounded(tmp_path, monkeypatch):
    np.savez(tmp_path / "p_camera.npz", ids=np.array(["a"]), ranges=np.array([[0, 1]]), pose=np.eye(4)[None],
             intrinsics=np.full((1, 4), 9.0))  # fmt: skip
    (tmp_path / "p_metric_scale_stats.json").write_text(json.dumps({"a": 1.0}))
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.json", '{"width": 64, "height": 48, "more": "' + "x" * (8 << 20) + '"}')
    assert read_published(tmp_path / "p.zip").keys() == {"a"}
    monkeypatch.setattr(published, "MAX_BYTES", 4 << 20)
    assert peak(lambda: read_published(tmp_path / "p.zip"), match="a.json: more than 4 MiB") < 1 << 20

import hashlib
import json
import resource
import tarfile

import numpy as np
import pytest

from vgr.data.shards import DamagedSample, Shards, ShardWriter

HEAD = dict(codec_name="Toy", codec_fingerprint="abc", stride=(4, 8, 8), channels=3, size_hw=(48, 64), fps=17.5,
            licence="CC0-1.0", samples_per_shard=4, extra={"split": "train"})


def sample(i):
    rng = np.random.default_rng(i)
    return dict(
        key=f"train-{i:06d}",
        latents=rng.normal(size=(3, 3, 6, 8)).astype(np.float16),
        c2w=np.tile(np.eye(4), (9, 1, 1)) + rng.normal(size=(9, 4, 4)),
        intrinsics=rng.normal(size=(9, 4)),
        meta={"shots": [{"start": 0, "end": 9, "caption": f"clip {i} \u00fc"}], "metric_scale": True, "split": "train"},
        video=bytes([i]) * 100 if i % 2 else None,
        depth=np.full((9, 4, 4), i, np.float32) if i == 0 else None,
    )


def fill(folder, count, start=0, **changes):
    with ShardWriter(folder, **{**HEAD, **changes}) as writer:
        for i in range(start, count):
            writer.add(**sample(i))
    return folder


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_samples_come_back_exactly(tmp_path):
    shards = Shards(fill(tmp_path, 10), "abc")
    assert len(shards) == 10 and shards.counts == [4, 4, 2] and shards.fingerprint == "abc"
    assert shards.keys == [f"train-{i:06d}" for i in range(10)]
    for shard in shards.manifest["shards"]:
        assert hashlib.sha256((tmp_path / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    assert shards.manifest["licence"] == "CC0-1.0" and shards.manifest["extra"] == {"split": "train"}
    for i in (9, 0, 5):
        wanted, read = sample(i), shards.read(i)
        for name in ("latents", "c2w", "intrinsics", "meta", "key"):
            np.testing.assert_array_equal(getattr(read, name), wanted[name])
        assert read.fps == 17.5 and read.latents.dtype == np.float16 and read.c2w.dtype == np.float64
        assert shards.read_video_bytes(i) == wanted["video"]
    assert (shards.read_depth(0) == 0).all() and shards.read_depth(1) is None


def test_plain_tar_tools_read_the_same_members(tmp_path):
    shards = Shards(fill(tmp_path, 3))
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        names = tar.getnames()
        first = {f"train-000000.{suffix}" for suffix in ("latent.npy", "cameras.npz", "json", "depth.npz")}
        assert set(names[:4]) == first  # a sample's members stand together
        assert all(member.mtime == 0 for member in tar.getmembers())
        assert tar.extractfile("train-000001.mp4").read() == shards.read_video_bytes(1)
        assert json.load(tar.extractfile("train-000002.json")) == shards.read(2).meta


def test_equal_samples_give_equal_files_and_resuming_too(tmp_path):
    whole = files(fill(tmp_path / "a", 10))
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "b", **HEAD) as writer:
        for i in range(10):
            if i == 6:
                raise KeyboardInterrupt
            writer.add(**sample(i))
    with pytest.raises(ValueError, match="vgr-prepare"):
        Shards(tmp_path / "b")
    with ShardWriter(tmp_path / "b", **HEAD) as writer:
        assert writer.done == 4
        for i in range(writer.done, 10):
            writer.add(**sample(i))
    assert files(tmp_path / "b") == whole
    with ShardWriter(tmp_path / "b", **HEAD) as writer:  # more of it: the short last shard is written again
        assert writer.done == 8
        for i in range(writer.done, 11):
            writer.add(**sample(i))
    assert files(tmp_path / "b") == files(fill(tmp_path / "c", 11))


def test_other_settings_are_refused_and_leave_the_folder_whole(tmp_path):
    before = files(fill(tmp_path, 5))
    with pytest.raises(ValueError, match="codec.*another `out`"):
        ShardWriter(tmp_path, **{**HEAD, "codec_fingerprint": "other"})
    with pytest.raises(ValueError, match="fps"):
        ShardWriter(tmp_path, **{**HEAD, "fps": 35.0})
    assert files(tmp_path) == before


def test_a_full_disk_leaves_no_half_shard(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError), ShardWriter(tmp_path, **HEAD) as writer:
        for i in range(3):
            writer.add(**sample(i))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        try:
            writer.add(**sample(3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == {}
    assert len(Shards(fill(tmp_path, 5))) == 5


def test_wrong_codec_truncation_and_missing_files_say_what_to_do(tmp_path):
    fill(tmp_path, 6)
    with pytest.raises(ValueError, match="codec Toy abc, not xyz.*vgr-prepare"):
        Shards(tmp_path, "xyz")
    shard = tmp_path / "shard-00001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(ValueError, match="shard-00001.tar.*truncated.*vgr-prepare"):
        Shards(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match="shard-00001.tar"):
        Shards(tmp_path)
    with pytest.raises(ValueError, match="no manifest.json.*vgr-prepare"):
        Shards(tmp_path / "absent")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="no manifest of shards"):
        Shards(tmp_path)


def test_a_flipped_bit_is_found_in_its_sample(tmp_path):
    shards = Shards(fill(tmp_path, 6))
    offset, size, _ = shards._samples[1][2]["latent.npy"]
    path = tmp_path / "shard-00000.tar"
    data = bytearray(path.read_bytes())
    data[offset + size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedSample, match="train-000001.latent.npy"):
        shards.read(1)
    assert shards.read(0).key == "train-000000"


def test_pickle_and_lying_headers_are_never_loaded():
    import io
    import pickle

    from vgr.data.shards import _npy
    from vgr.geometry.camera_file import read_npy

    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    lying = _npy(np.zeros(4)).replace(b"(4,)", b"(9999999999,)")
    for data in (objects.getvalue(), pickle.dumps([1]), lying, b""):
        with pytest.raises(ValueError):
            read_npy(data)


def test_shapes_that_do_not_fit_the_codec_are_refused(tmp_path):
    with pytest.raises(ValueError, match="do not fit a codec"), ShardWriter(tmp_path, **HEAD) as writer:
        writer.add(**{**sample(0), "latents": np.zeros((3, 4, 6, 8), np.float16)})
    with pytest.raises(ValueError, match="do not fit a codec"), ShardWriter(tmp_path, **HEAD) as writer:
        writer.add(**{**sample(0), "intrinsics": np.zeros((8, 4))})

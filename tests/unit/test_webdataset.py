"""Our shards are WebDataset tar files: its own reader finds every sample and member."""

import io

import numpy as np
import pytest

webdataset = pytest.importorskip("webdataset")

from vgr.data.shards import ShardWriter  # noqa: E402


def test_webdataset_reads_our_shards(tmp_path):
    latents = np.random.default_rng(0).normal(size=(3, 4, 2, 3, 4)).astype(np.float16)
    c2w, intrinsics = np.tile(np.eye(4), (5, 1, 1)), np.tile([0.5, 0.6, 0.5, 0.5], (5, 1))
    meta = {"shots": [{"start": 0, "end": 5, "caption": "a room"}]}
    with ShardWriter(tmp_path, "WaveletCodec", "0" * 16, (4, 8, 8), 4, (24, 32), 8.0, "CC0") as writer:
        for i in range(3):
            writer.add(f"clip.{i}".replace(".", "-"), latents[i], c2w, intrinsics, meta)
    tar = next(tmp_path.glob("*.tar"))
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert [s["__key__"] for s in samples] == ["clip-0", "clip-1", "clip-2"]
    for i, sample in enumerate(samples):
        assert {"latent.npy", "cameras.npz", "json"} <= sample.keys()
        assert np.array_equal(np.load(io.BytesIO(sample["latent.npy"]), allow_pickle=False), latents[i])

"""Published latents to shards: what is taken, what is left out and why, and going on after a kill."""

import io
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import CUT, EDITS, damaged, searched
from hypothesis import given
from hypothesis import strategies as st

from vgr.data.latent_zips import LatentZips
from vgr.data.shards import Shards, ShardWriter
from vgr.models.codec import CosineCodec
from vgr.report import inspect

CODEC = CosineCodec(stride=[2, 8, 8], luma=[4], chroma=[0])
FRAMES, SIZE_HW, KEYS = 9, (16, 24), [f"walk/{i:02d}" for i in range(24)]


def packed(**arrays):
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def latents(key, frames=1 + (FRAMES - 1) // 2):
    generator = np.random.default_rng(KEYS.index(key))
    return generator.standard_normal((CODEC.channels, frames, 2, 3)).astype(np.float32)


@pytest.fixture
def release(tmp_path):
    """Two pairs of zips; of the second, clips are wrong in every way."""
    for folder in ("raw", "latents"):
        (tmp_path / folder).mkdir()
    for name, keys in (("a", KEYS[:12]), ("b", KEYS[12:])):
        c2w = np.tile(np.eye(4), (len(keys), FRAMES + 2, 1, 1))
        c2w[:, :, 0, 3] = np.arange(FRAMES + 2) / 100
        ranges = np.array([[i * (FRAMES + 2), FRAMES + 2] for i in range(len(keys))])
        metres = {key: {"median": 2.0} for key in keys}
        with zipfile.ZipFile(tmp_path / f"latents/{name}.zip", "w") as zip:
            for key in keys:
                z = latents(key)
                if key == KEYS[13]:
                    z[0, 0, 0, 0] = np.nan
                elif key == KEYS[14]:
                    z = z[:, :3]
                elif key == KEYS[15]:
                    z = z[:-1]
                if key != KEYS[12]:
                    zip.writestr(f"{key}.npz", packed(z=z) if key != KEYS[16] else packed(z=z)[:-60])
        if name == "b":
            ranges[5, 1] = FRAMES - 1
            del metres[KEYS[18]]
            c2w[7, 3, 0, 0] = 2.0
        np.savez(tmp_path / f"raw/{name}_camera.npz", ids=np.array(keys), ranges=ranges,
                 pose=c2w.reshape(-1, 4, 4).astype(np.float32),
                 intrinsics=np.tile([20.0, 20.0, 12.0, 8.0], (c2w.shape[0] * c2w.shape[1], 1)))  # fmt: skip
        (tmp_path / f"raw/{name}_metric_scale_stats.json").write_text(json.dumps(metres))
        figures = [{"key": k, "score": 0.1 * KEYS.index(k)} for k in keys if k != KEYS[0]]
        (tmp_path / f"raw/{name}_dover.jsonl").write_text("\n".join(map(json.dumps, figures)))
        (tmp_path / f"raw/{name}_caption.json").write_text(json.dumps({k: {"prompt": f"told {k}"} for k in keys}))
        with zipfile.ZipFile(tmp_path / f"raw/{name}.zip", "w") as zip:
            for key in keys:
                zip.writestr(f"{key}.json", json.dumps({"height": 16, "width": 24, "prompt": f"prompt {key}"}))
    (tmp_path / "raw/alone.zip").write_bytes(b"no pair, so never opened")
    return tmp_path


def source(folder, **more):
    settings = {"frames": FRAMES, "size_hw": SIZE_HW, "fps": 8.0, "val_share": 0.3, **more}
    return LatentZips(str(folder / "raw"), str(folder / "latents"), CODEC, **settings)


def written(source, out, **more):
    for split in ("train", "val"):
        source.write(out / split, source.count(split), 0, lambda more: None, "cpu", **more)
    return {split: Shards(out / split, CODEC.fingerprint) for split in ("train", "val")}


def by_key(sets):
    samples = [s.read(i) for s in sets.values() for i in range(len(s))]
    return {x.meta["source"]["key"]: x for x in samples}


def dropped(out):
    return {x["key"]: x for split in ("train", "val") for x in json.loads((out / split / "dropped.json").read_text())}


def test_latents_cameras_and_prompts_come_through_and_what_is_wrong_stays_out(release, tmp_path):
    sets = written(source(release), tmp_path / "out")
    found, lost = by_key(sets), dropped(tmp_path / "out")
    assert found.keys() == set(KEYS) - set(KEYS[12:20]) and lost.keys() == set(KEYS[12:20])
    assert len(sets["val"]) > 2 and len(sets["train"]) > 2
    for key, sample in found.items():
        np.testing.assert_array_equal(sample.latents, latents(key).astype(np.float16))
        np.testing.assert_allclose(sample.c2w[:, 0, 3], 2.0 * np.arange(FRAMES) / 100, atol=1e-8)  # metres
        np.testing.assert_allclose(sample.intrinsics, np.tile([20 / 24, 20 / 16, 0.5, 0.5], (FRAMES, 1)))
        assert sample.meta["shots"] == [{"start": 0, "end": FRAMES, "caption": f"prompt {key}"}]
        assert sample.meta["metric_scale"] and sample.fps == 8
    for i, told in enumerate(("no latents", "not finite", "shape", "shape", "BadZipFile", "8 poses of 9", "KeyError",
                              "is no rotation"), 12):  # fmt: skip
        assert told in f"{lost[KEYS[i]]['rule']} {lost[KEYS[i]]['value']}"


def test_captions_and_limits_by_files_beside_the_zips(release, tmp_path):
    own = source(release, captions="_caption", limits={"_dover": (0.25, 1.05)})
    found = by_key(written(own, tmp_path / "out"))
    assert found.keys() == set(KEYS[3:11])  # the first has no figure
    assert found[KEYS[5]].meta["shots"][0]["caption"] == f"told {KEYS[5]}"
    low = dropped(tmp_path / "out")[KEYS[1]]
    assert low["rule"] == "_dover" and low["value"] == 0.1 and low["limit"] == [0.25, 1.05]
    assert dropped(tmp_path / "out")[KEYS[0]]["value"] is None
    html = inspect.write(tmp_path / "out").read_text()
    assert "_dover" in html and "at least 0.25" in html and f"a.zip {KEYS[1]}: 0.1" in html
    with pytest.raises(ValueError, match="neither a_clip.json nor a_clip.jsonl stands beside it"):
        source(release, limits={"_clip": (0.0, None)})


def test_killed_anywhere_and_run_again_gives_the_same_files(release, tmp_path, monkeypatch):
    whole = written(source(release), tmp_path / "whole", samples_per_shard=3)
    add = ShardWriter.add
    for adds in (2, 5, 4, 3):
        calls = iter(range(adds))

        def dying(self, *args, calls=calls, **kwargs):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            add(self, *args, **kwargs)

        monkeypatch.setattr(ShardWriter, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            written(source(release), tmp_path / "out", samples_per_shard=3)
    monkeypatch.setattr(ShardWriter, "add", add)
    again = written(source(release), tmp_path / "out", samples_per_shard=3)
    for split in again:
        assert again[split].manifest == whole[split].manifest
        assert (tmp_path / f"out/{split}/dropped.json").read_text() == (
            tmp_path / f"whole/{split}/dropped.json").read_text()
    heard = []
    assert source(release).write(tmp_path / "out/train", again["train"].manifest["extra"]["clips"], 0, heard.append,
                                 "cpu", samples_per_shard=3) == 0  # fmt: skip
    assert heard == [again["train"].manifest["extra"]["clips"]]


def test_text_states_stand_beside_the_latents(release, tmp_path):
    def states(captions):
        told = np.full((len(captions), 2, 3), len(captions[0]), np.float16)
        return told, np.full(len(captions), 2)

    sets = written(source(release), tmp_path / "out", text=states, text_made_by={"class": "Told", "config": {}})
    sample = sets["train"].read(0)
    assert torch.from_numpy(sample.text[0]).eq(len(sample.meta["shots"][0]["caption"])).all()
    assert (sets["val"].null_text() == 0).all()


def test_settings_and_folders_that_do_not_fit_are_refused(release, tmp_path):
    for more, told in (({"frames": 8}, "frames must be 1"), ({"size_hw": (16, 20)}, "width of 8"),
                       ({"val_share": 0.0}, "the share between 0 and 1")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            source(release, **more)
    with pytest.raises(ValueError, match="0 clips, of which one at least is held out; left out: 24"):
        source(release, limits={"_dover": (9.0, None)})
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="have no zip of one name"):
        LatentZips(str(tmp_path / "none"), str(release / "latents"), CODEC, FRAMES, SIZE_HW)
    whole = (release / "latents/b.zip").read_bytes()
    (release / "latents/b.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="b.zip has latents of no clip of .* is it whole"):
        source(release)
    (release / "latents/b.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="b.zip: no zip that can be read"):
        source(release)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_zips_end_in_clips_or_value_errors_only(release, tmp_path):
    files = [release / f"{name}" for name in ("latents/a.zip", "raw/a.zip", "raw/a_camera.npz", "raw/a_dover.jsonl",
                                              "raw/a_metric_scale_stats.json", "raw/a_caption.json")]  # fmt: skip
    whole, refused, rounds = {file: file.read_bytes() for file in files}, 0, 200

    @searched(rounds)
    @given(file=st.sampled_from(files), edits=EDITS, cut=CUT)
    def read(file, edits, cut):
        nonlocal refused
        file.write_bytes(damaged(whole[file], edits, cut))
        try:
            own = source(release, captions="_caption", limits={"_dover": (0.25, 1.05)})
            with tempfile.TemporaryDirectory(dir=tmp_path) as out:
                own.write(Path(out) / "train", own.count("train"), 0, lambda more: None, "cpu")
        except ValueError as error:
            assert str(error)
            refused += 1
        file.write_bytes(whole[file])

    read()
    assert refused > rounds / 10

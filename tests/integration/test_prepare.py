import os
import resource
import subprocess
import sys

import pytest

from vgr.data.prepare import prepare_split
from vgr.data.shards import Shards
from vgr.data.video import read_video
from vgr.data.worlds import WorldSource
from vgr.models.codec import CosineCodec


def source():
    return WorldSource(9, (24, 32), clips_per_visit=2, depth=True)


def prepare(folder, clips=5, split="train", **kwargs):
    codec = CosineCodec(stride=(4, 8, 8), luma=(2, 1), chroma=(1,))
    return prepare_split(source(), codec, folder, split, clips, 1, samples_per_shard=2, **kwargs)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert prepare(folder) == 5
    return folder


def test_shards_hold_what_the_source_gave(whole):
    shards = Shards(whole)
    assert len(shards) == 5 and shards.manifest["extra"]["split"] == "train"
    clip, sample = source().clip(1, "train", 3), shards.read(3)
    assert (sample.c2w == clip.c2w).all() and sample.meta["shots"] == clip.shots and sample.meta["metric_scale"]
    assert sample.meta["split"] == "train" and abs(shards.read_depth(3) - clip.depth).max() < 0.01
    assert shards.read_video_bytes(0) is None


def test_validation_keeps_its_videos(tmp_path):
    prepare(tmp_path, 2, "val")
    frames, _ = read_video(Shards(tmp_path).read_video_bytes(1))
    truth = source().clip(1, "val", 1).frames
    assert frames.shape == truth.shape and abs(frames.astype(float) - truth).mean() < 6


def test_workers_do_not_change_a_byte(whole, tmp_path):
    prepare(tmp_path, workers=2)
    assert files(tmp_path) == files(whole)


def test_an_interrupted_run_continues_to_the_same_files_and_a_finished_one_is_left(whole, tmp_path):
    heard = []

    def stop(more):
        heard.append(more)
        if sum(heard) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, progress=stop)
    assert not (tmp_path / "manifest.json").exists() and (tmp_path / "shard-00000.tar").exists()
    assert prepare(tmp_path) == 3  # the first shard's two clips stood
    assert files(tmp_path) == files(whole)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert prepare(tmp_path) == 0
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_a_truncated_shard_is_made_again(whole, tmp_path):
    prepare(tmp_path)
    shard = tmp_path / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert prepare(tmp_path) == 2  # and no other
    assert files(tmp_path) == files(whole)


def test_fewer_clips_than_there_are_is_an_error(whole):
    with pytest.raises(ValueError, match="holds 5 clips"):
        prepare(whole, 4)


def command(folder, *words, limit=resource.RLIM_INFINITY):
    """vgr-prepare as a user runs it; limit: bytes a file may have, which stands in for a full disk."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-B", "-m", "vgr.prepare", *words], cwd=folder, env=env, capture_output=True, text=True,
        timeout=120, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_command_prepares_and_then_has_nothing_to_do(tmp_path):
    words = ("data=worlds_tiny", "train_clips=4", "val_clips=4", "source.frames=9", "workers=1")
    code, out = command(tmp_path, *words)
    assert code == 0, out
    assert [len(Shards(tmp_path / "datasets/worlds_tiny" / split)) for split in ("train", "val")] == [4, 4]
    code, out = command(tmp_path, *words)
    assert code == 0 and out.count("nothing to do") == 2


@pytest.mark.parametrize(("words", "told"), [
    (("data=nowhere",), "data=nowhere"),
    (("source.skipp=2",), "source.skipp"),
    (("data=worlds_tiny", "source.frames=10"), "frames"),
    (("source.size_hw=[64,64]",), "size_hw"),
])
def test_mistakes_end_in_one_line_and_code_2(tmp_path, words, told):
    code, out = command(tmp_path, *words)
    assert code == 2 and told in out and len(out.strip().splitlines()) == 1 and "Traceback" not in out
    assert not list(tmp_path.rglob("*.tar")) and not list(tmp_path.rglob("manifest.json"))


def test_a_full_disk_is_one_line_code_2_and_nothing_half_written(tmp_path):
    words = ("data=worlds_tiny", "train_clips=4", "val_clips=4", "source.frames=9", "workers=1")
    code, out = command(tmp_path, *words, limit=9000)
    errors = [line for line in out.splitlines() if not line.startswith("val clips: ")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith("vgr-prepare: error: File too large")
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".log"]
    assert command(tmp_path, *words)[0] == 0

"""Samples a second of our shards in their exact order, beside a plain webdataset pipeline and beside mp4 files.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.loading --out benchmarks/results/speed_loading_cpu.json

The same clips (random latents, cameras, a caption) stand in one set of shards, which both sides read with the same
decoding into the same batches, checked first. webdataset shuffles shards and a buffer of samples and loops; it checks
no sums and keeps no position. Ours reads without its memory cache and checks each member. mp4: clips as h264 files of
as many frames, decoded to uint8 RGB and not encoded into latents, which a training on videos would still have to do.

Turns follow each other in one process, each with two loader workers of its own, and are of whole passes over the clips
from the first batch on (of mp4 four batches): less would time webdataset while it lives on its buffer. Ratios are of
adjacent turns. Processor time is that of one process without workers. Files come from the page cache: a cold one cannot
be had without privileges.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.speed.reading import film
from vgr.data.files import write_json
from vgr.data.modules import MicroBatches, ShardData, collate
from vgr.data.shards import Sample, Shards, ShardWriter, _read_npz
from vgr.data.video import read_video, write_video
from vgr.geometry.camera_file import read_npy
from vgr.types import VideoBatch

WORKERS, MICRO_BATCH, BUFFER, PER_SHARD = 2, 4, 32, 32
FILMS = 2  # mp4 files, read again and again


@dataclass(frozen=True)
class Case:
    """latents (C,T,H,W) of `frames` raw ones of size_hw; clips in the shards; passes over them a turn, some seconds."""

    latents: tuple[int, int, int, int]
    frames: int
    size_hw: tuple[int, int]
    clips: int
    passes: int


CASES = {
    "doom_tiny": Case((96, 8, 6, 8), 29, (48, 64), 512, 8),
    "doom": Case((96, 25, 12, 16), 97, (96, 128), 256, 6),
    "wan": Case((16, 17, 60, 104), 65, (480, 832), 192, 3),
}


def write(case: Case, folder: Path) -> None:
    """The shards of a case, and mp4 files of as many frames in folder/mp4."""
    rng, (channels, _, h, w) = np.random.default_rng(0), case.latents
    stride = (4, case.size_hw[0] // h, case.size_hw[1] // w)
    meta = {"shots": [{"start": 0, "end": case.frames, "caption": "a walk through rooms with lamps"}], "source": {}}
    intrinsics = np.tile([0.5, 0.6, 0.5, 0.5], (case.frames, 1))
    with ShardWriter(folder, "random", "0" * 16, stride, channels, case.size_hw, 16.0, "CC0", PER_SHARD) as writer:
        for i in range(case.clips):
            c2w = np.tile(np.eye(4), (case.frames, 1, 1))
            c2w[:, :3, 3] = rng.normal(size=(case.frames, 3)).cumsum(0)
            latents = rng.standard_normal(case.latents, dtype=np.float32)
            writer.add(f"clip{i:05d}", latents, c2w, intrinsics, meta)
    height, width = case.size_hw
    whole = film(case.frames, max(height, 64), max(width, 3 * case.frames))[:, :height, :width]
    (folder / "mp4").mkdir()
    for i in range(FILMS):
        write_video(folder / "mp4" / f"{i}.mp4", np.roll(whole, i * case.frames // FILMS, axis=0), 16.0, crf=23)


class Videos(Dataset):
    """Item i is a batch (B,F,H,W,3) uint8 of decoded mp4 files."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.mp4"))

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, i: int) -> torch.Tensor:
        clips = [read_video(self.paths[(i + k) % len(self.paths)])[0] for k in range(MICRO_BATCH)]
        return torch.from_numpy(np.stack(clips))


def ours(folder: Path) -> MicroBatches:
    """Micro-batches in the order of seed 1; samples are read anew each time."""
    data = ShardData(str(folder), str(folder), None, 1, MICRO_BATCH, MICRO_BATCH)
    data.total_batches = 1 << 20
    batches = data.micro_batches()
    batches._cache = None
    return batches


def decoded(sample: dict[str, Any]) -> Sample:
    """What webdataset found of a clip, by the decoding that `Shards.read` uses."""
    cameras = _read_npz(sample["cameras.npz"])
    views = cameras["c2w"], cameras["intrinsics"], float(cameras["fps"])
    return Sample(read_npy(sample["latent.npy"]), *views, json.loads(sample["json"]), sample["__key__"])


def _batched(samples: list[Sample]) -> VideoBatch:
    return collate(samples, range(len(samples)))


def theirs(folder: Path) -> Any:
    """Shards and a buffer shuffled, over and over."""
    import webdataset

    tars = sorted(map(str, folder.glob("*.tar")))
    found = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(BUFFER).map(decoded)
    return found.batched(MICRO_BATCH, collation_fn=_batched, partial=False).repeat()


def loader(source: Any, workers: int) -> DataLoader:
    return DataLoader(source, batch_size=None, num_workers=workers)


def keys(batches: Iterable[VideoBatch], count: int) -> list[str]:
    """Names of the first so many clips."""
    return [key for batch in islice(batches, count // MICRO_BATCH) for key in batch.keys]


def check(folder: Path, case: Case) -> dict[str, Any]:
    """Every clip of both sides is the other's; whether its order depends on the number of workers."""
    shards, seen = Shards(folder), set()
    for batch in islice(loader(theirs(folder), 0), case.clips // MICRO_BATCH):
        for i, key in enumerate(batch.keys):
            own = collate([shards.read(shards.keys.index(key))], [0])
            same = torch.equal(own.latents[0], batch.latents[i]) and own.captions[0] == batch.captions[i]
            if not same or not torch.equal(own.cameras.c2w[0], batch.cameras.c2w[i]):
                raise ValueError(f"{key} is not the same to both")
            seen.add(key)
    few = min(case.clips, 64)
    orders = {name: [keys(loader(make(folder), n), few) for n in (0, WORKERS)]
              for name, make in (("ours", ours), ("webdataset", theirs))}  # fmt: skip
    return {"clips_compared": len(seen), "same_order_by_workers": {name: a == b for name, (a, b) in orders.items()}}


def rate(source: Any, batches: int) -> float:
    """Samples a second of two workers, once the first batch is there."""
    found: Iterator[Any] = iter(loader(source, WORKERS))
    next(found)
    start = time.perf_counter()
    for _ in range(batches):
        next(found)
    return batches * MICRO_BATCH / (time.perf_counter() - start)


def processor_ms(source: Any, batches: int) -> float:
    """Milliseconds of processor time a sample takes, all of it in this process."""
    found: Iterator[Any] = iter(loader(source, 0))
    start = time.process_time()
    for _ in range(batches):
        next(found)
    return 1e3 * (time.process_time() - start) / batches / MICRO_BATCH


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


def measure(case: Case, folder: Path, repeats: int) -> dict[str, Any]:
    """All sides in turn, `repeats` times."""
    write(case, folder)
    found: dict[str, Any] = {"bytes_a_clip": int(np.prod(case.latents)) * 2, **check(folder, case)}
    whole = case.passes * (case.clips // MICRO_BATCH)
    sides: dict[str, tuple[Callable[[], Any], int]] = {
        "ours": (lambda: ours(folder), whole),
        "webdataset": (lambda: theirs(folder), whole),
        "mp4": (lambda: Videos(folder / "mp4"), 4),
    }
    for name, turn in (("samples_per_s", rate), ("processor_ms", processor_ms)):
        turns = [{side: turn(make(), count) for side, (make, count) in sides.items()} for _ in range(repeats)]
        found[name] = {side: _spread([x[side] for x in turns]) for side in sides}
        for side in ("webdataset", "mp4"):
            ratios = [x["ours"] / x[side] if turn is rate else x[side] / x["ours"] for x in turns]
            found[f"ours_{name}_times_as_good_as_{side}"] = _spread(ratios)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", help="where the files are made and removed; default: the system's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name in args.cases:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows[name] = measure(CASES[name], Path(folder), args.repeats)
        print(name, json.dumps(rows[name], indent=1))
    result = {
        "workers": WORKERS, "micro_batch": MICRO_BATCH, "shuffle_buffer": BUFFER, "repeats": args.repeats,
        "cases": rows,
        "versions": {name: version(name) for name in ("torch", "numpy", "webdataset", "av")},
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "load": os.getloadavg(),
    }  # fmt: skip
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()

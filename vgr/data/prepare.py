"""From a source of clips to shards: capture and encoding in worker processes, writing in order in this one."""

from __future__ import annotations

import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from vgr.data.shards import ShardWriter
from vgr.data.video import Clip, encode_video
from vgr.types import Codec


class Source(Protocol):
    """Clips in visits of a few, each a pure function of (seed, split, visit)."""

    frames: int
    size_hw: tuple[int, int]
    fps: float
    licence: str
    clips_per_visit: int
    splits: dict[str, Any]

    def capture(self, seed: int, split: str, visit: int) -> list[Clip]: ...


@torch.no_grad()
def encode(codec: Codec, frames_FHWC: np.ndarray) -> np.ndarray:
    """(F,H,W,3) uint8 to latents (C,T,h,w) float16."""
    video = torch.from_numpy(frames_FHWC).permute(3, 0, 1, 2).float().div(127.5).sub(1.0)
    return codec.encode(video[None])[0].half().numpy()


def prepare_split(source: Source, codec: Codec, folder: str | Path, split: str, clips: int, seed: int, *,
                  workers: int = 1, keep_video: bool = False, samples_per_shard: int = 64,
                  progress: Callable[[int], None] = lambda done: None) -> int:
    """Writes `clips` clips of a split as shards and returns how many were new.

    A finished folder of the same settings is left as it is, an unfinished one continued at its first missing
    shard. Validation keeps its videos, since measuring needs true frames. `progress` hears the number of clips
    done. Raises ValueError where source and codec do not fit or the folder holds something else, OSError where
    the disk is full.
    """
    t, h, w = codec.stride
    if (source.frames - 1) % t or source.size_hw[0] % h or source.size_hw[1] % w:
        raise ValueError(f"source.frames={source.frames}, source.size_hw={list(source.size_hw)} do not fit a codec of "
                         f"stride {[t, h, w]}: frames must be 1 + n x {t}, height a multiple of {h}, width of {w}")
    extra = {"source": type(source).__name__, "split": split, "seed": seed, "frames": source.frames,
             "places": list(source.splits[split]), "video": keep_video or split == "val",
             "settings": json.loads(json.dumps(vars(source), default=str))}
    head = dict(codec_name=type(codec).__name__, codec_fingerprint=codec.fingerprint, stride=tuple(codec.stride),
                channels=codec.channels, size_hw=source.size_hw, fps=source.fps, licence=source.licence,
                samples_per_shard=samples_per_shard, extra=extra)
    if _finished(Path(folder), head, clips):
        progress(clips)
        return 0
    with ShardWriter(folder, **head) as writer:
        start = min(writer.done, clips)
        progress(start)
        items = _encoded(source, codec, seed, split, start, clips, workers, extra["video"])
        for index, item in enumerate(items, start):
            writer.add(f"{split}-{index:06d}", **item)
            progress(index + 1)
    return clips - start


def _finished(folder: Path, head: dict[str, Any], clips: int) -> bool:
    """True where a manifest of these settings and this many clips stands; ValueError where it has more clips."""
    path = folder / "manifest.json"
    if not path.is_file():
        return False
    manifest = json.loads(path.read_text())
    same = (manifest.get("codec", {}).get("fingerprint"), manifest.get("extra"), manifest.get("size_hw")) == (
        head["codec_fingerprint"], head["extra"], list(head["size_hw"]))
    whole = all((folder / s["file"]).is_file() and (folder / s["file"]).stat().st_size == s["bytes"]
                for s in manifest.get("shards", []))
    if same and manifest["samples"] > clips:
        raise ValueError(f"{folder} holds {manifest['samples']} clips, more than the {clips} asked for; choose another "
                         "`out`, or remove that folder")
    return same and whole and manifest["samples"] == clips


def _encoded(source: Source, codec: Codec, seed: int, split: str, start: int, stop: int, workers: int,
             keep_video: bool) -> Iterator[dict[str, Any]]:
    """Encoded clips start to stop in order, whatever the number of workers."""
    per_visit = source.clips_per_visit
    visits = range(start // per_visit, -(-stop // per_visit))
    jobs = ((seed, split, visit, keep_video) for visit in visits)
    skip, left = start % per_visit, stop - start
    for items in _in_order(source, codec, jobs, workers):
        wanted = items[skip : skip + left]
        yield from wanted
        skip, left = 0, left - len(wanted)


def _in_order(source: Source, codec: Codec, jobs: Iterator[tuple], workers: int) -> Iterator[list[dict[str, Any]]]:
    if workers <= 1:
        for job in jobs:
            yield _visit(source, codec, *job)
        return
    # A server process forks the workers: fork from here would copy threads' locks, spawn costs seconds each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vgr.data.prepare"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(source, codec))
    waiting: deque[Future] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(_work, *job))
            if len(waiting) > 2 * workers:  # enough ahead to keep all busy, without filling memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(source: Source, codec: Codec) -> None:
    torch.set_num_threads(1)
    _worker.update(source=source, codec=codec)


def _work(*job: Any) -> list[dict[str, Any]]:
    return _visit(_worker["source"], _worker["codec"], *job)


def _visit(source: Source, codec: Codec, seed: int, split: str, visit: int, keep_video: bool) -> list[dict[str, Any]]:
    return [
        {
            "latents": encode(codec, clip.frames),
            "c2w": clip.c2w,
            "intrinsics": clip.intrinsics,
            "meta": {"shots": clip.shots, "source": clip.source, "metric_scale": True, "split": split},
            "video": encode_video(clip.frames, clip.fps) if keep_video else None,
            "depth": clip.depth,
        }
        for clip in source.capture(seed, split, visit)
    ]

"""From a source of clips to shards: capture and encoding in worker processes, writing in order in this one."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from vgr.data.files import atomic
from vgr.data.shards import Shards, ShardWriter
from vgr.data.video import Clip, encode_video
from vgr.types import Codec

# Captions of a clip's shots to states (S,J,D) float16 and lengths (S,).
TextArrays = Callable[[tuple[str, ...]], tuple[np.ndarray, np.ndarray]]


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
                  text: TextArrays | None = None, text_made_by: dict[str, Any] | None = None,
                  progress: Callable[[int], None] = lambda more: None) -> int:
    """Writes `clips` clips of a split as shards and returns how many were new.

    A finished folder of the same settings is left as it is, an unfinished one continued at its first missing
    shard. Validation keeps its videos, since measuring needs true frames. `progress` hears how many clips stood
    already, then of each new one. text: a frozen encoder whose states go beside the latents, `text_made_by` its class
    and configuration; those of the empty caption, for dropout and guidance, stand in one file. Raises ValueError
    where source and codec do not fit or the folder holds something else, OSError where the disk is full.
    """
    t, h, w = codec.stride
    if (source.frames - 1) % t or source.size_hw[0] % h or source.size_hw[1] % w:
        raise ValueError(f"source.frames={source.frames}, source.size_hw={list(source.size_hw)} do not fit a codec of "
                         f"stride {[t, h, w]}: frames must be 1 + n x {t}, height a multiple of {h}, width of {w}")
    keep_video = keep_video or split == "val"
    extra = {"source": type(source).__name__, "split": split, "seed": seed, "frames": source.frames,
             "places": list(source.splits[split]), "video": keep_video,
             "settings": json.loads(json.dumps(vars(source), default=str))}
    if text is not None:
        extra["text"] = {**text_made_by, "null": "null.text.npy"}
    if _finished(Path(folder), codec.fingerprint, extra, clips):
        progress(clips)
        return 0
    with ShardWriter(folder, type(codec).__name__, codec.fingerprint, tuple(codec.stride), codec.channels,
                     source.size_hw, source.fps, source.licence, samples_per_shard, extra) as writer:
        start = min(writer.done, clips)
        progress(start)
        first, skip = divmod(start, source.clips_per_visit)
        visits = range(first, -(-clips // source.clips_per_visit))
        visit = partial(_visit, source, codec, seed, split, keep_video)
        items = itertools.chain.from_iterable(_in_order(visit, visits, workers))
        if text is not None:
            with atomic(Path(folder) / extra["text"]["null"]) as file:
                np.save(file, text(("",))[0][0], allow_pickle=False)
        for index, item in enumerate(itertools.islice(items, skip, skip + clips - start), start):
            shots = item["meta"]["shots"]
            states = None if text is None else text(tuple(shot["caption"] for shot in shots))
            writer.add(f"{split}-{index:06d}", **item, text=states)
            progress(1)
    return clips - start


def _finished(folder: Path, codec_fingerprint: str, extra: dict[str, Any], clips: int) -> bool:
    """True where whole shards of these settings and this many clips stand; ValueError where there are more clips."""
    try:
        there = Shards(folder, codec_fingerprint)
    except ValueError:
        return False
    if there.manifest["extra"] == extra and len(there) > clips:
        raise ValueError(f"{folder} holds {len(there)} clips, more than the {clips} asked for; choose another "
                         "`out`, or remove that folder")
    return there.manifest["extra"] == extra and len(there) == clips


def _in_order(visit: Callable[[int], list[dict[str, Any]]], visits: range, workers: int) -> Iterator[list[dict]]:
    if workers <= 1:
        yield from map(visit, visits)
        return
    # A server process forks the workers: fork from here would copy threads' locks, spawn costs seconds each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vgr.data.prepare"])
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(visit, visits)


def _visit(source: Source, codec: Codec, seed: int, split: str, keep_video: bool, visit: int) -> list[dict[str, Any]]:
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

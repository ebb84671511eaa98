"""From a source of clips to shards: capture and encoding in worker processes, writing in order in this one."""

from __future__ import annotations

import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from vgr.data.files import atomic, write_text
from vgr.data.shards import Shards, ShardWriter
from vgr.data.video import Clip, Warps, encode_video
from vgr.metrics.image import psnr
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
def encode(codec: Codec, frames_BFHWC: np.ndarray) -> np.ndarray:
    """(B,F,H,W,3) uint8 to latents (B,C,T,h,w) float16."""
    video = torch.from_numpy(frames_BFHWC).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1.0)
    return codec.encode(video).half().numpy()


@torch.no_grad()
def round_trip_db(codec: Codec, latents_CTHW: np.ndarray, frames_FHWC: np.ndarray) -> float:
    """PSNR in dB, mean over frames, of what the codec makes of its latents."""
    video = codec.decode(torch.from_numpy(latents_CTHW)[None].float())[0].permute(1, 2, 3, 0)
    return float(psnr(video.clamp(-1, 1).add(1).mul(127.5).round().byte().numpy(), frames_FHWC).mean())


def prepare_split(source: Source, codec: Codec, folder: str | Path, split: str, clips: int, seed: int, *,
                  workers: int = 1, keep_video: bool = False, samples_per_shard: int = 64,
                  text: TextArrays | None = None, text_made_by: dict[str, Any] | None = None,
                  about: dict[str, Any] | None = None, part: tuple[int, int] | None = None,
                  progress: Callable[[int], None] = lambda more: None) -> int:
    """Writes `clips` clips of a split as shards and returns how many were new.

    A finished folder of the same settings is left as it is, an unfinished one continued at its first missing
    shard. Validation keeps its videos, since measuring needs true frames. `progress` hears how many clips stood
    already, then of each new one. text: a frozen encoder whose states go beside the latents, `text_made_by` its class
    and configuration; those of the empty caption, for dropout and guidance, stand in one file. about: more for the
    manifest's `extra`. part: i and n of one job of several, which makes every n-th shard from the i-th on; a call
    without it, once all have ended, makes what they left and the manifest. The first clip of every shard is decoded
    again; the manifest's `round_trip` has their PSNR. The clips of a visit are encoded at once, in the workers, or here
    where the codec stands on a GPU. Raises ValueError where source and codec do not fit or the folder holds something
    else, OSError where the disk is full.
    """
    _refuse_misfit(source, codec)
    keep_video = keep_video or split == "val"
    extra = {"source": type(source).__name__, "split": split, "seed": seed, "frames": source.frames,
             "places": list(source.splits[split]), "video": keep_video,
             "settings": json.loads(json.dumps({k: v for k, v in vars(source).items() if k[0] != "_"}, default=str)),
             **(about or {})}
    if text is not None:
        extra["text"] = {**text_made_by, "null": "null.text.npy"}
    if _finished(Path(folder), codec.fingerprint, extra, clips):
        progress(clips)
        _note_round_trip(Path(folder), samples_per_shard)
        return 0
    if hasattr(source, "read"):  # what cannot be read leaves no folder, and is read once for all workers
        source.read()
    with ShardWriter(folder, type(codec).__name__, codec.fingerprint, tuple(codec.stride), codec.channels,
                     source.size_hw, source.fps, source.licence, samples_per_shard, extra, part is None,
                     codec.clip) as writer:
        sizes = [min(samples_per_shard, clips - at) for at in range(0, clips, samples_per_shard)]
        i, n = part or (0, 1)
        todo = [shard for shard in range(i, len(sizes), n) if not writer.stands(shard, sizes[shard])]
        writer.shards = {shard: told for shard, told in writer.shards.items() if shard < len(sizes)}
        numbers = {shard * samples_per_shard + k for shard in todo for k in range(sizes[shard])}
        progress(clips - len(numbers))
        visits = sorted({number // source.clips_per_visit for number in numbers})
        capture = partial(_capture, source, seed, split)
        pack = partial(_pack, codec, split, keep_video, samples_per_shard)
        if _on_gpu(codec):
            packed = map(pack, in_order(capture, visits, workers))
        else:
            packed = in_order(partial(_both, capture, pack), visits, workers)
        if text is not None and part is None:
            with atomic(Path(folder) / extra["text"]["null"]) as file:
                np.save(file, text(("",))[0][0], allow_pickle=False)
        for visit, items in zip(visits, packed, strict=True):
            for number, item in enumerate(items, visit * source.clips_per_visit):
                if number in numbers:
                    writer.at = number // samples_per_shard
                    states = None if text is None else text(tuple(s["caption"] for s in item["meta"]["shots"]))
                    writer.add(f"{split}-{number:06d}", **item, text=states)
                    progress(1)
    if part is None:
        _note_round_trip(Path(folder), samples_per_shard)
    return len(numbers)


def _refuse_misfit(source: Source, codec: Codec) -> None:
    t, h, w = codec.stride
    try:
        codec.latent_frames(source.frames)
    except ValueError as error:
        raise ValueError(f"source.frames={source.frames}: {error}") from error
    if source.size_hw[0] % h or source.size_hw[1] % w:
        raise ValueError(f"source.size_hw={list(source.size_hw)} does not fit a codec of stride {[t, h, w]}: height "
                         f"must be a multiple of {h}, width of {w}")


def _note_round_trip(folder: Path, every: int) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    if "round_trip" not in manifest and (shards := Shards(folder)).manifest["samples"]:
        found = [shards.read(i).meta.get("round_trip_db") for i in range(0, len(shards), every)]
        found = [x for x in found if x is not None]
        mean = {"psnr_db": float(np.mean(found)), "least_db": min(found), "clips": len(found)} if found else {}
        write_text(path, json.dumps({**manifest, "round_trip": mean}))


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


def in_order(work: Callable[[Any], Any], tasks: Iterable[Any], workers: int) -> Iterator[Any]:
    """work(task) of each task in turn, by so many processes, a few tasks ahead of who takes them."""
    if workers <= 1:
        yield from map(work, tasks)
        return
    # A server process forks the workers: fork from here would copy threads' locks, spawn costs seconds each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vgr.data.prepare"])
    with ProcessPoolExecutor(workers, context, _begin, (work,)) as pool:
        ahead: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                ahead.append(pool.submit(_do, task))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]  # of a worker process; sent once, since a codec's weights are large


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    torch.set_num_threads(1)
    _work = work


def _do(task: Any) -> Any:
    return _work(task)


def _on_gpu(codec: Codec) -> bool:
    return isinstance(codec, torch.nn.Module) and any(p.is_cuda for p in codec.parameters())


def _capture(source: Source, seed: int, split: str, visit: int) -> tuple[int, list[Clip]]:
    return visit * source.clips_per_visit, source.capture(seed, split, visit)


def _both(capture: Callable[[int], Any], pack: Callable[[Any], Any], visit: int) -> Any:
    return pack(capture(visit))


def _pack(
    codec: Codec, split: str, keep_video: bool, every: int, visit: tuple[int, list[Clip]]
) -> list[dict[str, Any]]:
    """What `ShardWriter.add` takes of the clips of a visit, the first of which is number visit[0]."""
    first, clips = visit
    packed = []
    latents_BCTHW = encode(codec, np.stack([clip.frames for clip in clips])) if clips else ()
    for number, (clip, latents) in enumerate(zip(clips, latents_BCTHW), first):
        meta = {"shots": clip.shots, "source": clip.source, "metric_scale": clip.metric_scale, "split": split}
        if number % every == 0:
            meta["round_trip_db"] = round_trip_db(codec, latents, clip.frames)
        packed.append({
            "latents": latents, "c2w": clip.c2w, "intrinsics": clip.intrinsics, "meta": meta, "depth": clip.depth,
            "video": encode_video(clip.frames, clip.fps) if keep_video else None,
            "warp": None if clip.warps is None else _encoded(codec, clip.warps),
        })
    return packed


def _encoded(codec: Codec, warps: Warps) -> tuple[np.ndarray, ...]:
    """Warp latents (C,T,h,w) and what is visible (F,H,W); a later chunk's first latent is of the frame before it. Of
    chunks that are clips of their own, all latents, and that of the first frame standing still (C,1,h,w)."""
    parts = [encode(codec, video[None])[0] for video in warps.videos]
    if codec.clip is None:
        latents = np.concatenate([parts[0], *(part[:, 1:] for part in parts[1:])], axis=1)
        return latents, warps.visible
    first = warps.videos[0]
    still = encode(codec, np.repeat(first[:1], len(first), 0)[None])[0][:, -1:]
    return np.concatenate(parts, axis=1), warps.visible, still

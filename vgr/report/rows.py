"""The rows of a result: true videos, the codec's round trip, the model, and two controls, each a set of videos."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vgr.data.files import write_json
from vgr.data.shards import latent_shots
from vgr.metrics import frame_rate
from vgr.report.sets import Clip, Frames, VideoSet, fill_set, fingerprint, timings
from vgr.seeding import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from vgr.types import Cameras

Done = Callable[[int], None]


def choose(protocol: dict[str, Any], shards: Any, generator: Any, videos: VideoSet | None) -> tuple[list[Clip], int]:
    """The clips of a protocol, in manifest order, and the number of frames measured.

    With a set made elsewhere: the clips it has a video for. Raises ValueError where nothing fits.
    """
    keys = [k for k in shards.keys if videos is None or k in videos.keys][: protocol["clips"]]
    if videos is not None and not keys:
        raise ValueError(f"no video of {videos.folder} is named like a clip of data, such as {shards.keys[0]}.mp4")
    if len(keys) < 2:
        raise ValueError(f"{len(keys)} clip to measure; the control with another clip's camera needs 2 or more")
    clips = [_clip(shards, k) for k in keys]
    frames = min(protocol["frames"], *(len(c.c2w) for c in clips))
    if generator is not None:
        frames = min(frames, generator.max_frames)
        frames = 1 + (frames - 1) // generator.stride * generator.stride
    return clips, frames


def true_sets(
    protocol: dict[str, Any], out: Path, shards: Any, clips: list[Clip], done: Done, part: tuple[int, int] = (0, 1)
) -> tuple[VideoSet, VideoSet | None]:
    """The true videos, bit for bit as in the shards, and those of further clips for Frechet distances.

    The latter is None where data holds fewer than half as many further clips as are measured. part: as `fill_set`.
    """
    index = {k: i for i, k in enumerate(shards.keys)}
    fps = float(shards.read(index[clips[0].key]).fps)
    taken = {c.key for c in clips}
    rest = [k for k in shards.keys if k not in taken][: protocol["reference"]]
    made_by = {"row": "truth", "data": fingerprint(shards.manifest)}

    def copy(group: list[Clip]) -> list[bytes]:
        found = [shards.read_video_bytes(index[c.key]) for c in group]
        if None in found:
            raise ValueError("data holds latents without videos; prepare it with its videos kept")
        return found

    truth = fill_set(out / "truth", made_by, fps, clips, copy, part=part, done=done)
    if len(rest) < max(2, len(clips) // 2):
        return truth, None
    further = [_clip(shards, k) for k in rest]
    return truth, fill_set(out / "reference", made_by, fps, further, copy, part=part, done=done)


def make_rows(
    protocol: dict[str, Any], out: Path, generator: Any, truth: VideoSet, clips: list[Clip], frames: int, batch: int,
    done: Done, part: tuple[int, int] = (0, 1),
) -> dict[str, VideoSet]:  # fmt: skip
    """Codec, model and swapped rows, made where missing; the first part measures speed, once.

    generator: see vgr.generator.Generator. Clip i draws its noise from (protocol seed, "bench", i) in both rows
    of the model; its swapped camera is that of the clip half the list further.
    """
    fps = float(truth.info["fps"])
    number = {c.key: i for i, c in enumerate(clips)}
    mine = clips[part[0] :: part[1]]
    height, width = truth.video(mine[0].key)[0].shape[1:3]
    if (height, width) != tuple(generator.size_hw):
        made = "x".join(map(str, generator.size_hw[::-1]))
        raise ValueError(f"data is {width}x{height}, the checkpoint makes {made}")

    def generate(group: list[Clip], watch: frame_rate.Watch | None = None) -> tuple[Frames, dict[str, float]]:
        first = np.stack([truth.video(c.key)[0][0] for c in group])
        seeds = [derive_seed(protocol["seed"], "bench", number[c.key]) for c in group]
        cut = [c._replace(c2w=c.c2w[:frames], intrinsics=c.intrinsics[:frames]) for c in group]
        return generator(first, *asked_of(cut), seeds, watch=watch, shot=shots_of(cut, generator))

    source = {"codec": generator.codec.fingerprint, "truth": truth.info["fingerprint"], "frames": frames}
    by = {**source, "name": generator.name, "weights": generator.weights_hash, "sampling": generator.sampling,
          "protocol": protocol["sha256"]}  # fmt: skip
    turned = clips[len(clips) // 2 :] + clips[: len(clips) // 2]
    others = [c._replace(c2w=o.c2w, intrinsics=o.intrinsics) for c, o in zip(clips, turned)]
    rows = {}
    for row, made_by, asked, make in (
        ("codec", source, clips, lambda group: _round_trip(generator, truth, group, frames)),
        ("model", by, clips, lambda group: generate(group)[0]),
        ("swapped", by, others, lambda group: generate(group)[0]),
    ):
        told = {} if row == "codec" else {"chunk_starts": _chunk_starts(generator, frames)}
        given = out / row, {**made_by, "row": row}, fps, asked, make
        rows[row] = fill_set(*given, batch=batch, part=part, told=told, done=done)
    if part[0] == 0:
        starts = told["chunk_starts"]
        steered = (lambda: _control_latency(generate, clips[0], others[0], starts[0])) if starts else None
        time_requests(protocol, rows["model"], [lambda watch, c=c: generate([c], watch) for c in mine], steered)
    return rows


def asked_of(clips: list[Clip]) -> tuple[Cameras, tuple[tuple[str, ...], ...]]:
    """Cameras and captions of clips of one length, as a generator takes them."""
    import torch

    from vgr.types import Cameras

    both = (torch.from_numpy(np.stack([getattr(c, name) for c in clips])).float() for name in ("c2w", "intrinsics"))
    return Cameras(*both), tuple(c.captions for c in clips)


def shots_of(clips: list[Clip], generator: Any) -> Tensor:
    """The shot (B,T) of each latent frame of clips of one length."""
    import torch

    from vgr.types import latents_holding

    stride, clip = generator.stride, generator.codec.clip
    latents = latents_holding(len(clips[0].c2w), stride, clip)
    return torch.from_numpy(np.stack([latent_shots(c.starts, latents, stride, clip) for c in clips]))


def time_requests(
    protocol: dict[str, Any], made: VideoSet, calls: list[Callable[..., Any]], steered: Callable[[], Any] | None = None
) -> None:
    """Measure the speed of calls(watch), once a set, into its timings.json; steered: gives the control latency."""
    speed = protocol["frame_rate"]
    if timings(made.folder, made.info):
        return
    found = frame_rate.measure_requests(calls[: speed["requests"]], speed["warmup"])
    if steered is not None:
        found[0]["control_latency_s"] = steered()
    write_json(made.folder / "timings.json", {"fingerprint": made.info["fingerprint"], "timings": found})


def _control_latency(generate: Callable[..., Any], clip: Clip, other: Clip, start: int) -> float | None:
    """Seconds from another camera, told as the first chunk is there, to a frame that shows it; None: none does."""
    changed = clip._replace(c2w=np.concatenate([clip.c2w[:start], other.c2w[start:]]))
    arrivals, begun = [], time.perf_counter()
    steered = generate([changed], lambda x: arrivals.append([time.perf_counter() - begun, x.shape[1]]))[0][0]
    there = int(np.searchsorted(np.cumsum([count for _, count in arrivals]), start))
    seconds = frame_rate.control_latency(arrivals, arrivals[there][0], steered, generate([clip])[0][0])
    return seconds if np.isfinite(seconds) else None


def _chunk_starts(generator: Any, frames: int) -> list[int]:
    """First frames of the chunks that a chunk-causal model makes in turn; [] of one that makes all at once."""
    from vgr.diffusion.samplers import chunk_bounds
    from vgr.types import Layout, latents_holding, raw_frames

    if not getattr(generator, "chunk", None):
        return []
    stride, clip = generator.stride, generator.codec.clip
    latents = latents_holding(frames, stride, clip)
    bounds = chunk_bounds(Layout.chunked(1, latents, generator.chunk, clips=clip is not None))
    return [raw_frames(start, stride, clip) for start, _ in bounds if start]


def frozen_row(
    out: Path, truth: VideoSet, clips: list[Clip], frames: int, batch: int, done: Done, part: tuple[int, int] = (0, 1)
) -> VideoSet:
    """The first frame repeated."""

    def repeat(group: list[Clip]) -> list[Frames]:
        return [np.repeat(truth.video(c.key)[0][:1], frames, axis=0) for c in group]

    made_by = {"row": "frozen", "truth": truth.info["fingerprint"], "frames": frames}
    given = out / "frozen", made_by, float(truth.info["fps"]), clips, repeat
    return fill_set(*given, batch=batch, part=part, done=done)


def _round_trip(generator: Any, truth: VideoSet, group: list[Clip], frames: int) -> Frames:
    import torch

    video = np.stack([truth.video(c.key, frames)[0] for c in group])
    x = torch.from_numpy(video).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.inference_mode():
        x = generator.codec.decode(generator.codec.encode(x.to(generator.device)))
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def _clip(shards: Any, key: str) -> Clip:
    sample = shards.read(list(shards.keys).index(key))
    captions, starts = (tuple(shot[k] for shot in sample.meta["shots"]) for k in ("caption", "start"))
    return Clip(key, np.asarray(sample.c2w, np.float64), np.asarray(sample.intrinsics, np.float64), captions, starts)

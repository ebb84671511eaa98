"""Shards of what is made from clips: a teacher's trajectories, which ODE initialisation regresses on (spec 6.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgr.data.files import atomic
from vgr.data.modules import collate
from vgr.data.prepare import TextArrays
from vgr.data.shards import Shards, ShardWriter
from vgr.diffusion.guidance import guided, teacher_forced
from vgr.diffusion.timesteps import few_step_sigmas, sigma_grid
from vgr.distillation.ode import trajectory
from vgr.seeding import normal_like
from vgr.training import checkpoints
from vgr.training.conditioning import conditioning
from vgr.training.rebuild import rebuild_teacher
from vgr.types import Codec, VideoBatch


class TeacherPaths:
    """Trajectories of `teacher` (a run) under the text, cameras and first frames of `clips` (a folder of shards).

    times: where a trajectory is kept, falling from 1 to 0; batch: trajectories made at once; steps, shift, guidance:
    how the teacher samples, by default as its run says; frames: raw frames of a trajectory, those of a clip's start
    (None: all); image: the clip's first latent frame is given. chunk: latent frames of a chunk of a causal teacher,
    whose paths go under the clip's own frames before each chunk and have them as a last snapshot; None for a
    bidirectional one. negative: the prompt that guidance leads away from. Trajectory i takes clip i, round and round,
    with noise of (seed, i).
    """

    def __init__(
        self, teacher: str, clips: str, times: Sequence[float], batch: int, steps: int | None = None,
        shift: float | None = None, guidance: float | None = None, frames: int | None = None, chunk: int | None = None,
        image: bool = True, negative: str = "",
    ) -> None:  # fmt: skip
        self.checkpoint = checkpoints.resolve(Path(teacher))
        sampling = checkpoints.read_generator(self.checkpoint)["sampling"]
        steps, shift, guidance = (
            sampling[key] if given is None else given
            for key, given in (("steps", steps), ("shift", shift), ("guidance", guidance))
        )
        self.times, self.guidance, self.batch, self.frames = [float(t) for t in times], guidance, batch, frames
        if self.times != sorted(self.times, reverse=True) or self.times[0] != 1.0 or self.times[-1] != 0.0:
            raise ValueError(f"source.times={self.times} must fall from 1 to 0")
        # A causal teacher walks the shift of uniform times, on which those of its student lie (causal video, spec 5).
        self.grid = sigma_grid(steps, shift) if chunk is None else few_step_sigmas(steps, shift)
        self.parts = rebuild_teacher(teacher, chunk=chunk)
        self.cut_prefix = sampling.get("cut_prefix")
        self.story = checkpoints.read_state(self.checkpoint)["config"]["data"].get("story", True)
        self.shards = Shards(clips, self.parts["codec"].fingerprint)
        self.settings = {"steps": steps, "shift": shift, "guidance": guidance, "clips": clips}
        self.chunk, self.image, self.negative = chunk, image, negative
        own = {"frames": frames, "chunk": chunk, "history": True if chunk else None, "image": None if image else False}
        self.settings |= {k: v for k, v in {**own, "negative": negative or None}.items() if v is not None}

    def write(
        self, folder: Path, count: int, seed: int, progress: Callable[[int], None], device: str, **told: Any
    ) -> int:
        """Write `count` trajectories as shards of S*C channels, continuing what stands; returns how many were new."""
        codec, teacher = self.parts["codec"], checkpoints.weights_hash(self.checkpoint)
        extra = {"times": self.times, "teacher": teacher, "seed": seed, **self.settings}

        def path(batch: VideoBatch) -> Tensor:
            model, text = (self.parts[k].to(device).eval() for k in ("model", "text"))
            args = (batch.captions, batch.cameras, batch.shot, codec.stride[0], self.chunk)
            cond = conditioning(text, *args, self.cut_prefix)
            negative = text(tuple((self.negative,) * len(row) for row in batch.captions))
            noise = normal_like(batch.latents, seed, "trajectory", batch.position)
            denoiser = guided(model, self.guidance, negative)
            if self.chunk is not None:
                denoiser = teacher_forced(denoiser, batch.latents)
            first = batch.latents[:, :, :1] if self.image else None
            made = trajectory(denoiser, noise, cond, self.times, self.grid, first)
            return made if self.chunk is None else torch.cat([made, batch.latents[:, None]], dim=1)

        snapshots = len(self.times) + (self.chunk is not None)
        return write_made(
            folder, self.shards, codec, snapshots, extra, count, self.batch, self.frames, "path", path, progress,
            device, self.story, **told,
        )  # fmt: skip


def write_made(
    folder: Path, clips: Shards, codec: Codec, factor: int, extra: dict[str, Any], count: int, batch: int,
    frames: int | None, name: str, make: Callable[[VideoBatch], Tensor], progress: Callable[[int], None], device: str,
    story: bool = True, text: TextArrays | None = None, text_made_by: dict[str, Any] | None = None,
) -> int:  # fmt: skip
    """Shards of what `make` makes of clips, (B,factor,C,T,H,W), continuing what stands; returns how many were new.

    Sample i is of clip i, round and round, under its cameras and captions, with `text`'s states of them (see
    `data.prepare`); its first `frames` raw frames, `batch` samples at once.
    """
    if text is not None:
        extra = {**extra, "text": {**text_made_by, "null": "null.text.npy"}}
    if _finished(folder, extra, count):
        progress(count)
        return 0
    head = clips.manifest
    writer = ShardWriter(
        folder, head["codec"]["name"], codec.fingerprint, codec.stride, factor * codec.channels,
        tuple(head["size_hw"]), head["fps"], head["licence"], extra=extra,
    )  # fmt: skip
    with writer:
        done = start = min(writer.done, count)
        progress(done)
        if text is not None:
            with atomic(folder / extra["text"]["null"]) as file:
                np.save(file, text(("",))[0][0], allow_pickle=False)
        while done < count:
            numbers = range(done, min(done + batch, count))
            samples = [clips.read(i % len(clips)) for i in numbers]
            given = collate(samples, numbers, frames, story).to(device)
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                made = make(given)
            for i, sample, latents in zip(numbers, samples, made.flatten(1, 2).cpu().numpy()):
                kept = slice(given.cameras.c2w.shape[1])
                states = {} if text is None else {"text": text(tuple(x["caption"] for x in sample.meta["shots"]))}
                cameras = sample.c2w[kept], sample.intrinsics[kept]
                writer.add(f"{name}-{i:06d}", latents, *cameras, sample.meta, **states)
            done = numbers.stop
            progress(len(numbers))
    return count - start


def refuse_other_shards(train: Shards, val: Shards, objective: Mapping[str, Any]) -> None:
    """ValueError for shards that hold something else than training's objective is made for."""
    pairs = str(objective.get("_target_", "")).endswith(".refinement")
    for shards in (train, val):
        if bool(shards.manifest["extra"].get("pairs")) != pairs:
            fix = "vgr-prepare data=pairs makes some" if pairs else "training.objective.refinement takes them alone"
            raise ValueError(f"{shards.folder} holds {'no ' * pairs}pairs of stage-1 and true latents; {fix}")
    extra = train.manifest["extra"]
    made_for, asked = ((x.get("times"), bool(x.get("history"))) for x in (extra, objective))
    if made_for != asked:
        times, history = (f"{key}={objective.get(key)}" for key in ("times", "history"))
        raise ValueError(
            f"training.objective.{times}, {history}, but {train.folder} holds trajectories at {made_for[0]}"
            f"{' with the true frames behind' if made_for[1] else ''}"
        )


def _finished(folder: Path, extra: dict[str, object], count: int) -> bool:
    if not (folder / "manifest.json").is_file():
        return False
    manifest = Shards(folder).manifest
    return manifest["extra"] == extra and manifest["samples"] == count

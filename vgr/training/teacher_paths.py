"""Shards of a teacher's trajectories, which ODE initialisation regresses on (spec 6.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vgr.data.modules import collate
from vgr.data.shards import Shards, ShardWriter
from vgr.diffusion.guidance import guided, teacher_forced
from vgr.diffusion.timesteps import few_step_sigmas, sigma_grid
from vgr.distillation.ode import trajectory
from vgr.seeding import normal_like
from vgr.training import checkpoints
from vgr.training.conditioning import conditioning
from vgr.training.rebuild import rebuild_teacher


class TeacherPaths:
    """Trajectories of `teacher` (a run) under the text, cameras and first frames of `clips` (a folder of shards).

    times: where a trajectory is kept, falling from 1 to 0; steps, shift, guidance: how the teacher samples; batch:
    trajectories made at once; frames: raw frames of a trajectory, those of a clip's start (None: all); image: the
    clip's first latent frame is given. chunk: latent frames of a chunk of a causal teacher, whose paths go under the
    clip's own frames before each chunk and have them as a last snapshot; None for a bidirectional one. negative: the
    prompt that guidance leads away from. Trajectory i takes clip i, round and round, with noise of (seed, i).
    """

    def __init__(
        self, teacher: str, clips: str, times: Sequence[float], steps: int, shift: float, guidance: float, batch: int,
        frames: int | None = None, chunk: int | None = None, image: bool = True, negative: str = "",
    ) -> None:  # fmt: skip
        self.checkpoint = checkpoints.resolve(Path(teacher))
        self.times, self.guidance, self.batch, self.frames = [float(t) for t in times], guidance, batch, frames
        if self.times != sorted(self.times, reverse=True) or self.times[0] != 1.0 or self.times[-1] != 0.0:
            raise ValueError(f"source.times={self.times} must fall from 1 to 0")
        # A causal teacher walks the shift of uniform times, on which those of its student lie (causal video, spec 5).
        self.grid = sigma_grid(steps, shift) if chunk is None else few_step_sigmas(steps, shift)
        self.parts = rebuild_teacher(teacher, chunk=chunk)
        self.cut_prefix = checkpoints.read_generator(self.checkpoint)["sampling"].get("cut_prefix")
        self.story = checkpoints.read_state(self.checkpoint)["config"]["data"].get("story", True)
        self.shards = Shards(clips, self.parts["codec"].fingerprint)
        self.settings = {"steps": steps, "shift": shift, "guidance": guidance, "clips": clips}
        self.chunk, self.image, self.negative = chunk, image, negative
        own = {"frames": frames, "chunk": chunk, "history": True if chunk else None, "image": None if image else False}
        self.settings |= {k: v for k, v in {**own, "negative": negative or None}.items() if v is not None}

    def write(self, folder: Path, count: int, seed: int, progress: Callable[[int], None], device: str) -> int:
        """Write `count` trajectories as shards of S*C channels, continuing what stands; returns how many were new."""
        head, codec = self.shards.manifest, self.parts["codec"]
        teacher = checkpoints.weights_hash(self.checkpoint)
        extra = {"times": self.times, "teacher": teacher, "seed": seed, **self.settings}
        if _finished(folder, extra, count):
            progress(count)
            return 0
        model, text = (self.parts[k].to(device).eval() for k in ("model", "text"))
        writer = ShardWriter(
            folder, head["codec"]["name"], codec.fingerprint, codec.stride,
            (len(self.times) + (self.chunk is not None)) * codec.channels,
            tuple(head["size_hw"]), head["fps"], head["licence"], extra=extra,
        )  # fmt: skip
        with writer:
            done = start = min(writer.done, count)
            progress(done)
            while done < count:
                numbers = range(done, min(done + self.batch, count))
                samples = [self.shards.read(i % len(self.shards)) for i in numbers]
                batch = collate(samples, numbers, self.frames, self.story).to(device)
                with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    args = (batch.captions, batch.cameras, batch.shot, codec.stride[0])
                    cond = conditioning(text, *args, self.chunk, self.cut_prefix)
                    negative = text(tuple((self.negative,) * len(row) for row in batch.captions))
                    noise = normal_like(batch.latents, seed, "trajectory", batch.position)
                    denoiser = guided(model, self.guidance, negative)
                    if self.chunk is not None:
                        denoiser = teacher_forced(denoiser, batch.latents)
                    first = batch.latents[:, :, :1] if self.image else None
                    path = trajectory(denoiser, noise, cond, self.times, self.grid, first)
                    if self.chunk is not None:
                        path = torch.cat([path, batch.latents[:, None]], dim=1)
                for i, sample, latents in zip(numbers, samples, path.flatten(1, 2).cpu().numpy()):
                    kept = slice(batch.cameras.c2w.shape[1])
                    writer.add(f"path-{i:06d}", latents, sample.c2w[kept], sample.intrinsics[kept], sample.meta)
                done = numbers.stop
                progress(len(numbers))
        return count - start


def _finished(folder: Path, extra: dict[str, object], count: int) -> bool:
    if not (folder / "manifest.json").is_file():
        return False
    manifest = Shards(folder).manifest
    return manifest["extra"] == extra and manifest["samples"] == count

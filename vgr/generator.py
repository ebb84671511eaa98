"""A checkpoint's model, text encoder and codec, as one callable from first frame, cameras and captions to video."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from vgr.diffusion.rollout import Session
    from vgr.diffusion.samplers import FrameNoise
    from vgr.types import Cameras, Conditioning, Denoiser, HistoryBlock, VideoBatch

    Evidence = Callable[[Conditioning, Tensor | None], tuple[HistoryBlock, ...]]

METHODS = ("joint", "chunk_flow", "stream", "pyramid")


class Generator:
    """Model, text encoder and codec of a checkpoint, as one callable from first frame and cameras to video.

    name, weights_hash, fps, stride, max_frames, size_hw, codec, sampling and data_info (shard folders the model
    was trained with) say what it is. `load` makes it; nothing a file says is ever imported or executed.
    """

    def __init__(
        self, parts: dict[str, Any], record: dict[str, Any], name: str, weights_hash: str, data_info: dict[str, Any],
        sampling: dict[str, Any], device: str,
    ) -> None:  # fmt: skip
        self.model, self.text, self.codec = (parts[k].to(device).eval() for k in ("model", "text", "codec"))
        self.name, self.weights_hash, self.data_info, self.device = name, weights_hash, data_info, device
        self.fps, self.max_frames = float(record["fps"]), int(record["max_frames"])
        self.size_hw = tuple(record["size_hw"])
        self.intrinsics = record["intrinsics"]
        self.stride = self.codec.stride[0]
        self.plan: str | None = None
        # The base of a warp adapter's run, which makes all that evidence is not shown to.
        self.frozen: Denoiser | None = None
        self.evidence = record.get("evidence", {})  # how a warp adapter was trained to read warps
        self.tells_story: bool | None = record.get("story")  # None: a checkpoint that does not say
        self.refine: Callable[..., Iterator[Tensor]] | None = None  # latents on their way to the decoder
        # A student's times have its teacher's guidance trained in.
        self.takes_cameras = self.model.takes_cameras
        self.chunk, self.sampling = record.get("chunk"), sampling | ({"guidance": 1.0} if sampling["sigmas"] else {})
        if sampling["method"] not in METHODS:
            raise ValueError(f"sampling.method={sampling['method']}: choose from {', '.join(METHODS)}")
        if self.chunk is None and sampling["method"] != "joint":
            raise ValueError(
                f"sampling.method={sampling['method']} needs a chunk-causal model; {name} is bidirectional: use joint"
            )
        if self.codec.clip is not None and (sampling["method"] != "pyramid" or self.codec.clip != self.chunk):
            raise ValueError(
                f"codec.clip={self.codec.clip} is for method pyramid and chunks as long, not {sampling['method']} in "
                f"chunks of {self.chunk}"
            )

    @classmethod
    def load(
        cls, checkpoint: str | Path, device: str = "auto", steps: int | None = None, shift: float | None = None,
        guidance: float | None = None, memory: Mapping[str, Any] | None = None, seconds: float | None = None,
    ) -> Generator:  # fmt: skip
        """From a run folder or one of its checkpoints, averaged weights; None keeps the checkpoint's own sampling.

        memory: settings of a causal video model's memory, instead of its own. seconds: what is to be made, refused
        before weights are read where the device cannot hold its memory; `plan` says in one line what that takes. A
        model that streams then takes as much, whatever it was trained on.
        FileNotFoundError or ValueError name what is missing, damaged or does not fit.
        """
        import torch

        from vgr.models.warp_adapter import without_adapters
        from vgr.training import budget, checkpoints
        from vgr.training.rebuild import rebuild

        folder = checkpoints.resolve(Path(checkpoint))
        record = checkpoints.read_generator(folder)
        given = {"steps": steps, "shift": shift, "guidance": guidance}
        if steps is not None or shift is not None:
            given["sigmas"] = []  # a student's own times give way
        sampling = {**record["sampling"], **{k: v for k, v in given.items() if v is not None}}
        if sampling["sigmas"] and guidance not in (None, 1.0):
            raise ValueError(
                f"guidance={guidance}: {checkpoint} is a few-step student with its teacher's guidance trained in; "
                "leave guidance out, or give steps= too, to sample it as an ordinary model"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        known = seconds is not None and math.isfinite(seconds)
        plan = budget.of_video(budget.with_memory(record, memory), sampling, seconds, device) if known else None
        apart = "evidence" in record and "lora" in record
        parts, digest = rebuild(folder, memory, merged=not apart), checkpoints.weights_hash(folder, "ema")
        data = checkpoints.read_state(folder)["config"]["data"]
        name = "/".join(p for p in folder.parts[-4:] if p != "checkpoints")
        data_info = {k: data[k] for k in ("train", "val") if k in data}
        generator = cls(parts, record, name, digest, data_info, sampling, device)
        generator.plan = plan
        if apart:
            generator.frozen = without_adapters(generator.model)
        if known:
            generator.reach(seconds)
        return generator

    def reach(self, seconds: float) -> None:
        """Takes as long a video, whatever it was trained on, if it streams."""
        if self.sampling["method"] in ("stream", "pyramid"):
            self.max_frames = max(self.max_frames, self.whole(1 + math.ceil(seconds * self.fps)))

    def whole(self, frames: int) -> int:
        """Raw frames of the fewest latent frames, in whole clips where the codec has such, that hold so many."""
        from vgr.types import latents_holding, raw_frames

        clip = self.codec.clip
        return raw_frames(latents_holding(frames, self.stride, clip), self.stride, clip)

    @property
    def sigmas(self) -> Tensor:
        """The times of sampling, falling from 1 to 0: a student's own, or a grid of `steps` at `shift`."""
        import torch

        from vgr.diffusion.timesteps import sigma_grid

        own, steps, shift = (self.sampling[k] for k in ("sigmas", "steps", "shift"))
        if self.sampling["method"] == "pyramid":  # one step, in which are all of all stages
            own = [1.0, 0.0]
        return torch.tensor(own, dtype=torch.float64) if own else sigma_grid(steps, shift)

    def session(
        self, seed: int, first_frame: np.ndarray | None = None, story: str = "", evidence: Evidence | None = None
    ) -> Session:
        """A video to be directed shot by shot; first_frame (H,W,3) uint8; story, evidence: `Session`'s. Or ValueError.

        With evidence a warp adapter's adapters make what is shown to them, its base all else.
        """
        import torch

        from vgr.diffusion.guidance import guided
        from vgr.diffusion.rollout import Session
        from vgr.geometry.cameras import group_by_latent

        if self.sampling["method"] not in ("stream", "pyramid"):
            raise ValueError(
                f"{self.name} samples by method {self.sampling['method']}; shots are made by a model that streams: "
                "train one with sampling.method=stream"
            )
        with torch.no_grad():
            args = self.sampling["guidance"], self.text((("",),))
            denoiser = guided(self.model, *args)
            base = denoiser if self.frozen is None else guided(self.frozen, *args)
        denoiser, _ = self._streaming(denoiser, [seed], None if evidence is None else base)
        return Session(
            denoiser, self.codec, self.text, sigmas=self.sigmas, chunk=self.chunk, fps=self.fps, size_hw=self.size_hw,
            seed=seed, first_frame=None if first_frame is None else torch.from_numpy(first_frame),
            group_cameras=group_by_latent if self.takes_cameras else None, device=self.device,
            cut_prefix=self.sampling.get("cut_prefix"), renoise=self.sampling.get("renoise", False), story=story,
            evidence=evidence, image_noise=self._staged()[0],
        )  # fmt: skip

    def _staged(self) -> tuple[tuple[float, float], dict[str, Any]]:
        """Of a pyramid: what noise an image gets that a video goes on from, and settings of `Streamed`."""
        staged = dict(self.sampling.get("staged") or {})
        return tuple(staged.pop("image_noise", (0.0, 0.0))), staged

    def _streaming(
        self, denoiser: Denoiser, seeds: list[int], base: Denoiser | None = None
    ) -> tuple[Denoiser, FrameNoise]:
        """The denoiser, one of stages made to stream, and the noise it starts from, one video a seed.

        base: makes what evidence is not shown to, where there is evidence.
        """
        from vgr.diffusion.pyramid import Streamed
        from vgr.diffusion.samplers import frame_noise
        from vgr.models.warp_adapter import FROM_TIME, where_shown, with_evidence

        height, width = (s // p for s, p in zip(self.size_hw, self.codec.stride[1:]))
        noise = frame_noise(seeds, (self.codec.channels, height, width), self.device)
        if self.sampling["method"] == "pyramid":
            steps = (self.sampling["steps"],) * self.model.stages
            denoiser = Streamed(base or denoiser, noise, steps, coarse=denoiser, **self._staged()[1])
        elif base is not None:
            denoiser = with_evidence(where_shown(denoiser, base), from_time=self.sampling.get("from_time", FROM_TIME))
        return denoiser, noise

    def frames(self, seconds: float) -> int:
        """Raw frames covering `seconds`, of a length the codec takes; ValueError beyond the model's length."""
        frames = self.whole(1 + max(1, round(seconds * self.fps)))
        if frames > self.max_frames or seconds <= 0:
            longest = (self.max_frames - 1) / self.fps
            raise ValueError(
                f"seconds={seconds:g} is beyond this model: it makes up to {self.max_frames} frames at "
                f"{self.fps:.2f} a second; use 0 < seconds <= {int(longest * 100) / 100:g}"
            )
        return frames

    def calls(self, frames: int) -> int:
        """How often `progress` is called for a video of `frames` raw frames: once a step, or once a chunk."""
        from vgr.diffusion.samplers import chunk_bounds
        from vgr.types import Layout

        latents, steps = self._latents(frames), len(self.sampling["sigmas"] or ()) - 1
        steps = self.sampling["steps"] if steps < 0 else steps
        clips = self.codec.clip is not None
        chunks = len(chunk_bounds(Layout.chunked(1, latents, self.chunk or latents, clips=clips)))
        once = {"joint": steps, "chunk_flow": int((chunks - 1) * steps / chunks) + steps}
        return once.get(self.sampling["method"], chunks)

    def _latents(self, frames: int) -> int:
        """Latent frames of a video: just its own, or those of whole clips, of which the end is cut off."""
        return self.codec.latent_frames(frames if self.codec.clip is None else self.whole(frames))

    def __call__(
        self,
        first_frames: np.ndarray | None,
        cameras: Cameras,
        captions: tuple[tuple[str, ...], ...],
        seeds: list[int],
        progress: Callable[[int], None] | None = None,
        watch: Callable[[np.ndarray], None] | None = None,
        shot: Tensor | None = None,
        cuts: bool = True,
    ) -> tuple[np.ndarray, dict[str, float]]:
        """First frames (B,H,W,3) uint8 (None: the model imagines them) to videos (B,F,H,W,3) uint8 and seconds spent.

        cameras: F raw frames, F at most max_frames. seeds: one a video; its noise depends on nothing else. watch:
        hears of frames (B,F,H,W,3) as they are decoded, chunk by chunk where the method streams. shot (B,T): which
        caption each latent frame follows; None: the first. cuts False: captions change without a new shot.
        """
        import torch

        from vgr.diffusion import guidance
        from vgr.metrics import frame_rate
        from vgr.training.conditioning import conditioning

        if cameras.c2w.shape[1] > self.max_frames:
            raise ValueError(f"{cameras.c2w.shape[1]} frames asked; this model makes up to {self.max_frames}")
        start, stages = time.perf_counter(), frame_rate.Stages(self.device)
        batch, frames = cameras.c2w.shape[:2]
        if shot is None:
            shot = torch.zeros(batch, self._latents(frames), dtype=torch.int64)
        pieces: list[np.ndarray] = []
        first_at = start
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            args = (cameras.to(self.device), shot.to(self.device), self.stride, self.chunk)
            cond = conditioning(
                self.text, captions, *args, self.sampling.get("cut_prefix"), cuts, self.codec.clip is not None
            )
            null = self.text(tuple(("",) * len(row) for row in captions))
            stages.mark("text")
            first = None if first_frames is None else self._encode(first_frames, seeds)
            stages.mark("encode")
            denoiser = guidance.guided(self.model, self.sampling["guidance"], null)
            decode = self.codec.stream()
            denoised = self._denoise(denoiser, cond, seeds, first, progress)
            for latents in denoised if self.refine is None else self.refine(denoised, captions):
                stages.mark("denoise")
                for part in (latents,) if pieces else (latents[:, :, :1], latents[:, :, 1:]):
                    if part.shape[2]:
                        pieces.append(self.decoded(decode, part))  # on the host, so the device has finished
                        first_at = time.perf_counter() if len(pieces) == 1 else first_at
                        if watch is not None:
                            watch(pieces[-1])
                stages.mark("decode")
        timings = {"first_frame_s": first_at - start, "total_s": time.perf_counter() - start, "frames": frames}
        timings |= {f"{stage}_s": seconds for stage, seconds in stages.seconds().items()}
        return np.concatenate(pieces, axis=1)[:, :frames], timings

    def _denoise(
        self, denoiser: Denoiser, cond: Conditioning, seeds: list[int], first: Tensor | tuple[Tensor, Tensor] | None,
        progress: Callable[[int], None] | None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Latents by the checkpoint's method, at once or chunk by chunk; `progress` hears of each step or chunk."""
        import torch

        from vgr.diffusion import rollout, samplers
        from vgr.seeding import torch_generator

        height, width = (s // p for s, p in zip(self.size_hw, self.codec.stride[1:]))
        sigmas = self.sigmas
        if self.sampling["method"] in ("stream", "pyramid"):
            denoiser, noise = self._streaming(denoiser, seeds)
            renoise = self.sampling.get("renoise", False)
            begun = isinstance(first, tuple)
            state, first = denoiser.new_state(*(first if begun else ())), None if begun else first
            chunks = rollout.stream(denoiser, state, cond, sigmas, noise, first, renoise=renoise)
            for i, (latents, _) in enumerate(chunks):
                if progress is not None:
                    progress(i)
                yield latents
            return
        shape = (self.codec.channels, len(cond.layout.position), height, width)
        noise = torch.stack([torch.randn(shape, generator=torch_generator(s, "noise")) for s in seeds])
        solve = samplers.euler if self.sampling["method"] == "joint" else samplers.chunk_flow_euler
        yield solve(denoiser, noise.to(self.device), cond, sigmas, first, progress)

    def _encode(self, images: np.ndarray, seeds: list[int]) -> Tensor | tuple[Tensor, Tensor]:
        """Images (B,H,W,3) as first latent frames or, where the codec has clips, as what these go on from."""
        import torch

        from vgr.diffusion.rollout import image_history

        video = torch.from_numpy(images).permute(0, 3, 1, 2).unsqueeze(2).to(self.device).float() / 127.5 - 1.0
        with torch.autocast(self.device, enabled=False):  # the latents of training are fp32
            if self.codec.clip is None:
                return self.codec.encode(video)
            return image_history(self.codec, video, seeds, self._staged()[0])

    def decoded(self, decode: Callable[[Tensor], Tensor], latents: Tensor) -> np.ndarray:
        """Latents (B,C,T,H,W) as videos (B,F,H,W,3) uint8; the codec works outside autocast, as in preparing data."""
        import torch

        with torch.autocast(self.device, enabled=False):
            video = (decode(latents).clamp(-1, 1) + 1) * 127.5
        return video.round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def sample_writer(
    record: dict[str, Any], codec: Any, batch: VideoBatch, seed: int, clips: int = 4
) -> Callable[[Any, Path], None]:
    """A function (module, path, writes) that makes one video: held-out clips, truth left and averaged model right.

    writes False: made, as a split model needs every rank, but left to another rank to write.
    """
    from vgr.data.video import write_video
    from vgr.types import Cameras

    cameras = Cameras(batch.cameras.c2w[:clips], batch.cameras.intrinsics[:clips])
    captions, shot = batch.captions[:clips], batch.shot[:clips]

    def write(module: Any, path: Path, writes: bool = True) -> None:
        parts = {**module.ema, "codec": codec}
        generator = Generator(parts, record, path.stem, "", {}, record["sampling"], module.device.type)
        truth = generator.decoded(codec.decode, batch.latents[:clips].to(module.device))
        made, _ = generator(truth[:, 0], cameras, captions, [seed + i for i in range(len(captions))], shot=shot)
        if writes:  # clips below each other
            pairs = np.concatenate([truth, made], axis=3)
            write_video(path, np.concatenate(list(pairs), axis=1), record["fps"])

    return write

"""vgr-sample: one video along a camera path, from a first frame and a prompt.

vgr-sample checkpoint=runs/world_model/tiny/seed1 path=orbit seconds=8 first_frame=img.png prompt="a dim room"
vgr-sample checkpoint=runs/world_model/tiny/seed1 actions=[w-30,l-20]
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vgr import command

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from vgr.types import Cameras


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
        self.sampling = sampling

    @classmethod
    def load(
        cls, checkpoint: str | Path, device: str = "auto", steps: int | None = None, shift: float | None = None,
        guidance: float | None = None,
    ) -> Generator:  # fmt: skip
        """From a run folder or one of its checkpoints, averaged weights; None keeps the checkpoint's own sampling.

        FileNotFoundError or ValueError name what is missing, damaged or does not fit.
        """
        import torch

        from vgr.models.codec import CosineCodec
        from vgr.models.text import ByteTextEncoder
        from vgr.models.world_model import WorldModel
        from vgr.training import checkpoints

        folder = checkpoints.resolve(Path(checkpoint))
        tensors = checkpoints.read_weights(folder, "ema")
        record = checkpoints.read_generator(folder)
        known = {c.__name__: c for c in (WorldModel, ByteTextEncoder, CosineCodec)}
        parts: dict[str, Any] = {}
        for part in ("model", "text", "codec"):
            if record[part]["class"] not in known:
                raise ValueError(f"{folder} needs a {record[part]['class']}; this version has {', '.join(known)}")
            parts[part] = known[record[part]["class"]](**record[part]["config"])
        for part in ("model", "text"):
            own = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
            checkpoints.match(own, {k: v.shape for k, v in parts[part].state_dict().items()}, folder)
            parts[part].load_state_dict(own)
        digest = checkpoints.weights_hash(folder, "ema")
        given = {"steps": steps, "shift": shift, "guidance": guidance}
        sampling = {**record["sampling"], **{k: v for k, v in given.items() if v is not None}}
        data = checkpoints.read_state(folder)["config"]["data"]
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        name = "/".join(p for p in folder.parts[-4:] if p != "checkpoints")
        data_info = {k: data[k] for k in ("train", "val") if k in data}
        return cls(parts, record, name, digest, data_info, sampling, device)

    def frames(self, seconds: float) -> int:
        """Raw frames covering `seconds`, of a length the codec takes; ValueError beyond the model's length."""
        wanted = max(1, round(seconds * self.fps))
        frames = 1 + -(-wanted // self.stride) * self.stride
        if frames > self.max_frames or seconds <= 0:
            longest = (self.max_frames - 1) / self.fps
            raise ValueError(
                f"seconds={seconds:g} is beyond this model: it makes up to {self.max_frames} frames at "
                f"{self.fps:.2f} a second; use 0 < seconds <= {int(longest * 100) / 100:g}"
            )
        return frames

    def __call__(
        self,
        first_frames: np.ndarray | None,
        cameras: Cameras,
        captions: tuple[tuple[str, ...], ...],
        seeds: list[int],
        progress: Callable[[int], None] | None = None,
    ) -> tuple[np.ndarray, dict[str, float]]:
        """First frames (B,H,W,3) uint8 (None: the model imagines them) to videos (B,F,H,W,3) uint8 and seconds spent.

        cameras: F raw frames, F at most max_frames. seeds: one a video; its noise depends on nothing else.
        """
        import torch

        from vgr.diffusion import guidance, samplers, timesteps
        from vgr.geometry.cameras import group_by_latent
        from vgr.seeding import torch_generator
        from vgr.types import Conditioning, Layout

        if cameras.c2w.shape[1] > self.max_frames:
            raise ValueError(f"{cameras.c2w.shape[1]} frames asked; this model makes up to {self.max_frames}")
        start = self._clock()
        batch, frames = cameras.c2w.shape[:2]
        count = self.codec.latent_frames(frames)
        height, width = (s // p for s, p in zip(self.size_hw, self.codec.stride[1:]))
        shape = (self.codec.channels, count, height, width)
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            text = self.text(captions)
            null = self.text(tuple(("",) * len(row) for row in captions))
            layout = Layout.whole(batch, count, self.device)
            cond = Conditioning(layout, text, group_by_latent(cameras.to(self.device), self.stride))
            first = None if first_frames is None else self._encode(first_frames)
            noise = torch.stack([torch.randn(shape, generator=torch_generator(s, "noise")) for s in seeds])
            sigmas = timesteps.sigma_grid(self.sampling["steps"], self.sampling["shift"])
            denoiser = guidance.guided(self.model, self.sampling["guidance"], null)
            before = self._clock()
            latents = samplers.euler(denoiser, noise.to(self.device), cond, sigmas, first, progress)
            after = self._clock()
        stream = self.codec.stream()
        pieces = [self._to_bytes(stream(latents[:, :, :1]))]
        first_at = self._clock()
        if count > 1:
            pieces.append(self._to_bytes(stream(latents[:, :, 1:])))
        end = self._clock()
        timings = {
            "first_frame_s": first_at - start, "total_s": end - start, "denoise_s": after - before,
            "decode_s": end - after, "frames": frames,
        }  # fmt: skip
        return np.concatenate(pieces, axis=1), timings

    def _encode(self, images: np.ndarray) -> Tensor:
        import torch

        video = torch.from_numpy(images).permute(0, 3, 1, 2).unsqueeze(2).to(self.device)
        return self.codec.encode(video.float() / 127.5 - 1.0)

    def _to_bytes(self, video: Tensor) -> np.ndarray:
        return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()

    def _clock(self) -> float:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    """Entry point of `vgr-sample` and `python -m vgr.sample`."""
    command.run("sample", body)


def body(cfg: DictConfig) -> None:
    """conf/sample.yaml -> a folder with video.mp4, side_by_side.mp4, cameras.npz and sample.json."""
    if cfg.checkpoint is None:
        raise ValueError("checkpoint is not given: checkpoint=<run folder or one of its checkpoints>")
    if (cfg.path is None) == (cfg.actions is None):
        raise ValueError("give either path=<name> or actions=<keys-frames,...>, and not both")
    generator = Generator.load(cfg.checkpoint, cfg.device, cfg.steps, cfg.shift, cfg.guidance)
    cameras, shown = read_path(cfg, generator)
    first = None if cfg.first_frame is None else read_first_frame(Path(cfg.first_frame), generator.size_hw)[None]
    name = cfg.path or "actions"
    out = Path(cfg.out or Path("runs/samples") / f"{name}_{shown / generator.fps:.1f}s_seed{cfg.seed}")
    out.mkdir(parents=True, exist_ok=True)
    with _progress(generator.sampling["steps"]) as step:
        videos, timings = generator(first, cameras, ((cfg.prompt,),), [cfg.seed], step)
    settings = {
        "checkpoint": generator.name, "weights": generator.weights_hash, "path": cfg.path, "actions": str(cfg.actions),
        "prompt": cfg.prompt, "seed": cfg.seed, "fps": generator.fps, "sampling": generator.sampling,
        "first_frame": cfg.first_frame, "timings": timings,
    }  # fmt: skip
    write_sample(out, videos[0, :shown], cameras.frames(0, shown), generator.fps, settings)
    print(out / "side_by_side.mp4")


def read_first_frame(path: Path, size_hw: tuple[int, int]) -> np.ndarray:
    """An image, or the first frame of an mp4 of the model's size, as (H,W,3) uint8. Raises ValueError or OSError."""
    from vgr.data.video import iter_video, read_image

    if path.suffix != ".mp4":
        return read_image(path, size_hw)
    frame = next(iter(iter_video(path)))[0]
    if frame.shape[:2] != size_hw:
        raise ValueError(f"first_frame={path} is {frame.shape[1]}x{frame.shape[0]}; the model makes {size_hw[::-1]}")
    return frame


def read_path(cfg: DictConfig, generator: Generator) -> tuple[Cameras, int]:
    """Cameras (1,F) of the asked path, padded to a length the codec takes by resting at the end; frames to show."""
    import torch

    from vgr.geometry.trajectories import from_actions, named_cameras
    from vgr.types import Cameras

    own = torch.tensor(generator.intrinsics, dtype=torch.float64)
    if cfg.actions is not None:
        text = cfg.actions if isinstance(cfg.actions, str) else ",".join(map(str, cfg.actions))
        c2w = from_actions(text, cfg.dialect)
        shown, k = len(c2w), own.expand(len(c2w), 4)
        generator.frames((shown - 1) / generator.fps)
    else:
        generator.frames(cfg.seconds)
        shown = 1 + max(1, round(cfg.seconds * generator.fps))
        c2w, k = named_cameras(
            cfg.path, shown, generator.fps, intrinsics=own, distance=cfg.distance, angle_deg=cfg.angle_deg,
            turns=cfg.turns,
        )  # fmt: skip
    rest = -(shown - 1) % generator.stride
    c2w, k = (torch.cat([x, x[-1:].expand(rest, *x.shape[1:])]) for x in (c2w, k))
    return Cameras(c2w[None].float(), k[None].float()), shown


def write_sample(out: Path, frames: np.ndarray, cameras: Cameras, fps: float, settings: dict[str, Any]) -> None:
    """Write the video (F,H,W,3), the video beside its path seen from above, the poses and the settings."""
    from vgr.data.video import write_video
    from vgr.report.path_view import beside_path

    c2w, intrinsics = cameras.c2w[0].double().numpy(), cameras.intrinsics[0].double().numpy()
    write_video(out / "video.mp4", frames, fps)
    write_video(out / "side_by_side.mp4", beside_path(frames, c2w, intrinsics), fps)
    np.savez(out / "cameras.npz", c2w=c2w, intrinsics=intrinsics, fps=fps)
    (out / "sample.json").write_text(json.dumps(settings, indent=2) + "\n")


def _progress(steps: int) -> Any:
    from contextlib import contextmanager

    from vgr.bench import progress

    @contextmanager
    def bar() -> Any:
        with progress(steps, "denoising") as done:
            yield lambda _i: done(1)

    return bar()


if __name__ == "__main__":
    main()

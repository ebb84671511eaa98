"""vgr-sample: one video along a camera path, from a first frame and a prompt.

vgr-sample checkpoint=runs/world_model/tiny/seed1 path=orbit seconds=8 first_frame=img.png prompt="a dim room"
vgr-sample checkpoint=runs/world_model/tiny/seed1 actions=[w-30,l-20]
vgr-sample checkpoint=runs/world_model/tiny/seed1 cameras=colmap/sparse/0 scale=0.5 first_frame=img.png
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vgr import command

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from vgr.geometry.formats import CameraFile
    from vgr.types import Cameras, Conditioning, Denoiser


METHODS = ("joint", "chunk_flow", "stream")


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
        self.refine: Callable[..., Iterator[Tensor]] | None = None  # latents on their way to the decoder
        # A student's times have its teacher's guidance trained in.
        self.chunk, self.sampling = record.get("chunk"), sampling | ({"guidance": 1.0} if sampling["sigmas"] else {})
        if sampling["method"] not in METHODS:
            raise ValueError(f"sampling.method={sampling['method']}: choose from {', '.join(METHODS)}")
        if self.chunk is None and sampling["method"] != "joint":
            raise ValueError(
                f"sampling.method={sampling['method']} needs a chunk-causal model; {name} is bidirectional: use joint"
            )

    @classmethod
    def load(
        cls, checkpoint: str | Path, device: str = "auto", steps: int | None = None, shift: float | None = None,
        guidance: float | None = None,
    ) -> Generator:  # fmt: skip
        """From a run folder or one of its checkpoints, averaged weights; None keeps the checkpoint's own sampling.

        FileNotFoundError or ValueError name what is missing, damaged or does not fit.
        """
        import torch

        from vgr.training import checkpoints
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
        parts, digest = rebuild(folder), checkpoints.weights_hash(folder, "ema")
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

    def calls(self, frames: int) -> int:
        """How often `progress` is called for a video of `frames` raw frames: once a step, or once a chunk."""
        from vgr.diffusion.samplers import chunk_bounds
        from vgr.types import Layout

        latents, steps = self.codec.latent_frames(frames), len(self.sampling["sigmas"] or ()) - 1
        steps = self.sampling["steps"] if steps < 0 else steps
        chunks = len(chunk_bounds(Layout.chunked(1, latents, self.chunk or latents)))
        return {"joint": steps, "chunk_flow": int((chunks - 1) * steps / chunks) + steps, "stream": chunks}[
            self.sampling["method"]
        ]

    def __call__(
        self,
        first_frames: np.ndarray | None,
        cameras: Cameras,
        captions: tuple[tuple[str, ...], ...],
        seeds: list[int],
        progress: Callable[[int], None] | None = None,
        watch: Callable[[np.ndarray], None] | None = None,
    ) -> tuple[np.ndarray, dict[str, float]]:
        """First frames (B,H,W,3) uint8 (None: the model imagines them) to videos (B,F,H,W,3) uint8 and seconds spent.

        cameras: F raw frames, F at most max_frames. seeds: one a video; its noise depends on nothing else. watch:
        hears of frames (B,F,H,W,3) as they are decoded, chunk by chunk where the method streams.
        """
        import torch

        from vgr.diffusion import guidance
        from vgr.training.conditioning import conditioning

        if cameras.c2w.shape[1] > self.max_frames:
            raise ValueError(f"{cameras.c2w.shape[1]} frames asked; this model makes up to {self.max_frames}")
        start = mark = self._clock()
        batch, frames = cameras.c2w.shape[:2]
        shot = torch.zeros(batch, self.codec.latent_frames(frames), dtype=torch.int64, device=self.device)
        pieces: list[np.ndarray] = []
        first_at, denoise, told = start, 0.0, 0
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            cond = conditioning(self.text, captions, cameras.to(self.device), shot, self.stride, self.chunk)
            null = self.text(tuple(("",) * len(row) for row in captions))
            first = None if first_frames is None else self._encode(first_frames)
            denoiser = guidance.guided(self.model, self.sampling["guidance"], null)
            decode = self.codec.stream()
            denoised = self._denoise(denoiser, cond, seeds, first, progress)
            for latents in denoised if self.refine is None else self.refine(denoised, captions):
                denoise += self._clock() - mark
                if not pieces:
                    pieces.append(self.decoded(decode, latents[:, :, :1]))
                    latents, first_at = latents[:, :, 1:], self._clock()
                if latents.shape[2]:
                    pieces.append(self.decoded(decode, latents))
                for piece in pieces[told:] if watch is not None else ():
                    watch(piece)
                told, mark = len(pieces), self._clock()
        total = mark - start
        timings = {
            "first_frame_s": first_at - start, "total_s": total, "denoise_s": denoise, "decode_s": total - denoise,
            "frames": frames,
        }  # fmt: skip
        return np.concatenate(pieces, axis=1), timings

    def _denoise(
        self, denoiser: Denoiser, cond: Conditioning, seeds: list[int], first: Tensor | None,
        progress: Callable[[int], None] | None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Latents by the checkpoint's method, at once or chunk by chunk; `progress` hears of each step or chunk."""
        import torch

        from vgr.diffusion import rollout, samplers, timesteps
        from vgr.seeding import torch_generator

        height, width = (s // p for s, p in zip(self.size_hw, self.codec.stride[1:]))
        own, steps, shift = (self.sampling[k] for k in ("sigmas", "steps", "shift"))
        sigmas = torch.tensor(own, dtype=torch.float64) if own else timesteps.sigma_grid(steps, shift)
        if self.sampling["method"] == "stream":
            noise = samplers.frame_noise(seeds, (self.codec.channels, height, width), self.device)
            chunks = rollout.stream(denoiser, denoiser.new_state(), cond, sigmas, noise, first)
            for i, (latents, _) in enumerate(chunks):
                if progress is not None:
                    progress(i)
                yield latents
            return
        shape = (self.codec.channels, len(cond.layout.position), height, width)
        noise = torch.stack([torch.randn(shape, generator=torch_generator(s, "noise")) for s in seeds])
        solve = samplers.euler if self.sampling["method"] == "joint" else samplers.chunk_flow_euler
        yield solve(denoiser, noise.to(self.device), cond, sigmas, first, progress)

    def _encode(self, images: np.ndarray) -> Tensor:
        import torch

        video = torch.from_numpy(images).permute(0, 3, 1, 2).unsqueeze(2).to(self.device)
        with torch.autocast(self.device, enabled=False):  # the latents of training are fp32
            return self.codec.encode(video.float() / 127.5 - 1.0)

    def decoded(self, decode: Callable[[Tensor], Tensor], latents: Tensor) -> np.ndarray:
        """Latents (B,C,T,H,W) as videos (B,F,H,W,3) uint8; the codec works outside autocast, as in preparing data."""
        import torch

        with torch.autocast(self.device, enabled=False):
            video = (decode(latents).clamp(-1, 1) + 1) * 127.5
        return video.round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()

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
    from vgr.data.video import live_video

    if cfg.checkpoint is None:
        raise ValueError("checkpoint is not given: checkpoint=<run folder or one of its checkpoints>")
    given = [way for way in ("path", "actions", "cameras") if cfg[way] is not None]
    if len(given) != 1:
        told = " and ".join(given) or "none"
        raise ValueError(f"give one of path=<name>, actions=<keys-frames,...> and cameras=<pose file>; got {told}")
    file = None if cfg.cameras is None else read_pose_file(cfg)
    generator = Generator.load(cfg.checkpoint, cfg.device, cfg.steps, cfg.shift, cfg.guidance)
    drop = 0 if cfg.refiner is None else 1  # a refiner leaves the first frame as it was
    if drop:
        from vgr.training.refining import Refinement

        streams = generator.sampling["method"] == "stream"
        generator.refine = Refinement(cfg.refiner, generator.codec, generator.fps, streams, generator.device)
    cameras, shown = read_path(cfg, generator, file)
    first = None if cfg.first_frame is None else read_first_frame(Path(cfg.first_frame), generator.size_hw)[None]
    name = cfg.path or (Path(cfg.cameras).stem if cfg.cameras else "actions")
    out = Path(cfg.out or Path("runs/samples") / f"{name}_{shown / generator.fps:.1f}s_seed{cfg.seed}")
    out.mkdir(parents=True, exist_ok=True)
    calls = generator.calls(cameras.c2w.shape[1])
    with command.progress(calls, "denoising") as done, live_video(
        out / "live.mp4", generator.size_hw, generator.fps
    ) as add:
        videos, timings = generator(
            first, cameras, ((cfg.prompt,),), [cfg.seed], lambda _: done(1), lambda video: add(video[0])
        )
    settings = {
        "checkpoint": generator.name, "weights": generator.weights_hash, "path": cfg.path, "actions": str(cfg.actions),
        "cameras": cfg.cameras, "scale": cfg.scale, "intrinsics": str(cfg.intrinsics), "prompt": cfg.prompt,
        "seed": cfg.seed, "fps": generator.fps, "sampling": generator.sampling, "first_frame": cfg.first_frame,
        "refiner": cfg.refiner, "timings": timings,
    }  # fmt: skip
    write_sample(out, videos[0, drop:shown], cameras.frames(drop, shown), generator.fps, settings)
    print(out / "side_by_side.mp4")


def read_first_frame(path: Path, size_hw: tuple[int, int]) -> np.ndarray:
    """An image, or the first frame of an mp4 of the model's size, as (H,W,3) uint8. Raises ValueError or OSError."""
    from vgr.data.video import iter_video, read_image

    if path.suffix != ".mp4":
        return read_image(path, size_hw)
    frame = next((frame for frame, _ in iter_video(path)), None)
    if frame is None:
        raise ValueError(f"first_frame={path} holds no frame; give an image or a whole mp4")
    if frame.shape[:2] != size_hw:
        raise ValueError(f"first_frame={path} is {frame.shape[1]}x{frame.shape[0]}; the model makes {size_hw[::-1]}")
    return frame


def read_path(cfg: DictConfig, generator: Generator, file: CameraFile | None = None) -> tuple[Cameras, int]:
    """Cameras (1,F) of the asked path, padded to a length the codec takes by resting at the end; frames to show.

    ValueError for a path that the model cannot take. A pose file's speeds beyond the trained range are told on stderr.
    """
    import torch

    from vgr.geometry.checks import check_cameras
    from vgr.geometry.trajectories import from_actions, named_cameras
    from vgr.types import Cameras

    own = read_intrinsics(cfg.intrinsics, generator)
    if file is not None:
        c2w, k = follow(file, cfg, generator, own)
        shown = len(c2w)
    elif cfg.actions is not None:
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
    c2w, k = (torch.cat([x, x[-1:].expand(rest, *x.shape[1:])])[None] for x in (c2w, k))
    if file is not None or cfg.intrinsics is not None:
        unusual = check_cameras(Cameras(c2w, k), generator.fps, generator.size_hw, generator.stride)
        for line in unusual if file is not None else ():
            print(f"vgr-sample: warning: {line}", file=sys.stderr)
    return Cameras(c2w.float(), k.float()), shown


def read_pose_file(cfg: DictConfig) -> CameraFile:
    """The file of cameras=, its pictures of first_frame's size where it does not tell. ValueError or OSError."""
    import cv2

    from vgr.geometry.formats import read_cameras

    image = cfg.first_frame
    known = image is not None and not image.endswith(".mp4") and cv2.haveImageReader(image)
    return read_cameras(cfg.cameras, size_hw=cv2.imread(image).shape[:2] if known else None)


def read_intrinsics(value: Any, generator: Generator) -> Tensor:
    """intrinsics= as (4,) float64: the model's own for None, a horizontal field of view, or four numbers."""
    import torch

    from vgr.geometry.cameras import from_fov

    if value is None:
        return torch.tensor(generator.intrinsics, dtype=torch.float64)
    numbers = [value] if isinstance(value, (int, float)) else list(value) if not isinstance(value, str) else []
    if len(numbers) not in (1, 4) or not all(isinstance(x, (int, float)) for x in numbers):
        raise ValueError(
            f"intrinsics={value} must be a horizontal field of view in degrees (intrinsics=60) or [fx,fy,cx,cy] "
            "divided by the picture's width and height; they cannot be estimated from the first frame"
        )
    if len(numbers) == 1:
        height, width = generator.size_hw
        return from_fov(numbers[0], width / height, torch.float64)
    return torch.tensor(numbers, dtype=torch.float64)


def follow(file: CameraFile, cfg: DictConfig, generator: Generator, own: Tensor) -> tuple[Tensor, Tensor]:
    """Poses (F,4,4) from the first one on and intrinsics (F,4) of a pose file, at the model's rate and picture.

    Without times the file's poses are taken one a frame. Its intrinsics follow its pictures when they are cut to the
    model's shape as a first frame is; `own` (4,) stands in where it has none or intrinsics= is given.
    """
    import torch

    from vgr.geometry.cameras import crop_intrinsics, interpolate, relative_to_first
    from vgr.geometry.checks import check_cameras
    from vgr.types import Cameras

    c2w, k, fps = file.c2w[0], file.intrinsics[0], generator.fps
    if file.size_hw is not None:
        (height, width), (h, w) = file.size_hw, generator.size_hw
        scale = min(height / h, width / w)
        k = crop_intrinsics(k, file.size_hw, ((height - h * scale) / 2, (width - w * scale) / 2, h * scale, w * scale))
    if cfg.intrinsics is not None or bool(k.isnan().all()):
        k = own.expand(len(c2w), 4)
    try:  # before poses are taken between the file's: a bad one would get another number, or be hidden
        check_cameras(Cameras(c2w[None], k[None]), fps, generator.size_hw)
    except ValueError as error:
        raise ValueError(f"cameras={cfg.cameras}: {error}") from error
    if not isinstance(cfg.scale, (int, float)) or not math.isfinite(cfg.scale):
        raise ValueError(f"scale={cfg.scale} must be a number, the metres of one unit of the pose file")
    seconds = (len(c2w) - 1) / fps if file.times is None else float(file.times[-1])
    shown = 1 + math.floor(seconds * fps + 1e-6)
    if not 2 <= shown <= generator.max_frames:
        raise ValueError(
            f"cameras={cfg.cameras} holds {len(c2w)} poses over {seconds:.2f} s, {shown} frames at {fps:g} a second; "
            f"this model makes 2 to {generator.max_frames} frames, so cut the file"
        )
    c2w = relative_to_first(c2w)
    c2w[:, :3, 3] *= cfg.scale
    if file.times is not None:
        new = (torch.arange(shown, dtype=torch.float64) / fps).clamp(max=seconds)
        c2w = interpolate(c2w, file.times, new)
        k = torch.from_numpy(np.stack([np.interp(new, file.times, column) for column in k.T], axis=1))
    return c2w, k


def write_sample(out: Path, frames: np.ndarray, cameras: Cameras, fps: float, settings: dict[str, Any]) -> None:
    """Write the video (F,H,W,3), the video beside its path seen from above, the poses and the settings."""
    from vgr.data.files import write_json
    from vgr.data.video import write_video
    from vgr.geometry.formats import write_cameras
    from vgr.report.path_view import beside_path

    c2w, intrinsics = cameras.c2w[0].double().numpy(), cameras.intrinsics[0].double().numpy()
    write_video(out / "video.mp4", frames, fps)
    write_video(out / "side_by_side.mp4", beside_path(frames, c2w, intrinsics), fps)
    write_cameras(out / "cameras.npz", cameras, fps)
    write_json(out / "sample.json", settings)


if __name__ == "__main__":
    main()

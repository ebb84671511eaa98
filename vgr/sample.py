"""vgr-sample: one video along a camera path, from a first frame and a prompt, or a story of shots.

vgr-sample checkpoint=runs/world_model/tiny/seed1 path=orbit seconds=8 first_frame=img.png prompt="a dim room"
vgr-sample checkpoint=runs/world_model/tiny/seed1 actions=[w-30,l-20]
vgr-sample checkpoint=runs/world_model/tiny/seed1 cameras=colmap/sparse/0 scale=0.5 first_frame=img.png
vgr-sample checkpoint=runs/causal_video/multi_shot_story_tiny/seed1 shots=story.yaml
vgr-sample checkpoint=weights/Helios-Distilled preset=warp_adapter/one_video path=static first_frame=img.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vgr import command, story

HFOV_DEG = 60.0  # of a model that never was told of a lens, unless intrinsics= says

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from vgr.generator import Generator
    from vgr.geometry.formats import CameraFile
    from vgr.types import Cameras


def main() -> None:
    """Entry point of `vgr-sample` and `python -m vgr.sample`."""
    command.run("sample", body)


def body(cfg: DictConfig) -> None:
    """conf/sample.yaml -> a folder with video.mp4, side_by_side.mp4, cameras.npz and sample.json."""
    import torch

    from vgr import warped
    from vgr.data.annotators import DepthModel
    from vgr.data.video import live_video

    if cfg.checkpoint is None:
        raise ValueError("checkpoint is not given: checkpoint=<run folder or one of its checkpoints>")
    given = [way for way in ("path", "actions", "cameras", "shots") if cfg[way] is not None]
    if len(given) != 1:
        told = " and ".join(given) or "none"
        ways = "path=<name>, actions=<keys-frames,...>, cameras=<pose file> and shots=<story.yaml>"
        raise ValueError(f"give one of {ways}; got {told}")
    if cfg.shots is not None:
        story.sample(cfg)
        return
    file = None if cfg.cameras is None else read_pose_file(cfg)
    generator = load(cfg, None if cfg.path is None else cfg.seconds)
    drop = 0 if cfg.refiner is None else 1  # a refiner leaves the first frame as it was
    if drop:
        from vgr.training.refining import Refinement

        streams = generator.sampling["method"] == "stream"
        generator.refine = Refinement(cfg.refiner, generator.codec, generator.fps, streams, generator.device)
    cameras, shown = read_path(cfg, generator, file)
    first = None if cfg.first_frame is None else story.read_first_frame(Path(cfg.first_frame), generator.size_hw)[None]
    warped.check(generator, first, cfg.depth, cfg.path, cfg.moving)
    depth_of = None if cfg.depth is None else DepthModel(cfg.depth)
    if cfg.unit not in ("metres", "depth") or (cfg.unit == "depth" and depth_of is None):
        raise ValueError(f"unit={cfg.unit}: metres, or depth, the first frame's median, with depth=<a depth network>")
    if cfg.unit == "depth":
        cameras = warped.in_units_of_depth(cameras, torch.from_numpy(depth_of(first)[0]))
    name = cfg.path or (Path(cfg.cameras).stem if cfg.cameras else "actions")
    out = Path(cfg.out or Path("runs/samples") / f"{name}_{shown / generator.fps:.1f}s_seed{cfg.seed}")
    out.mkdir(parents=True, exist_ok=True)
    if generator.plan is not None:
        print(generator.plan, file=sys.stderr)
    calls = generator.calls(cameras.c2w.shape[1])
    with command.progress(calls, "denoising") as done, live_video(
        out / "live.mp4", generator.size_hw, generator.fps
    ) as add:
        if depth_of is not None:
            args = (generator, first[0], cameras, cfg.prompt, cfg.seed, depth_of, cfg.moving, lambda _: done(1), add)
            videos, timings = warped.follow(*args)[None], {}
        else:
            videos, timings = generator(
                first, cameras, ((cfg.prompt,),), [cfg.seed], lambda _: done(1), lambda video: add(video[0])
            )
    settings = {
        "checkpoint": generator.name, "weights": generator.weights_hash, "path": cfg.path, "actions": str(cfg.actions),
        "cameras": cfg.cameras, "scale": cfg.scale, "intrinsics": str(cfg.intrinsics), "prompt": cfg.prompt,
        "seed": cfg.seed, "fps": generator.fps, "sampling": generator.sampling, "first_frame": cfg.first_frame,
        "refiner": cfg.refiner, "depth": cfg.depth, "unit": cfg.unit, "moving": cfg.moving, "timings": timings,
    }  # fmt: skip
    write_sample(out, videos[0, drop:shown], cameras.frames(drop, shown), generator.fps, settings)
    print(out / "side_by_side.mp4")


def load(cfg: DictConfig, seconds: float | None) -> Generator:
    """What makes the video: a run's checkpoint, or with preset= weights that no run of ours made.

    FileNotFoundError or ValueError name what is missing, damaged or does not fit.
    """
    from vgr.generator import Generator

    if cfg.preset is not None:
        return released(cfg, seconds)
    args = (cfg.checkpoint, cfg.device, cfg.steps, cfg.shift, cfg.guidance, cfg.memory)
    return Generator.load(*args, seconds=seconds)


def released(cfg: DictConfig, seconds: float | None) -> Generator:
    """checkpoint= as the base that preset= starts from: codec, text, size, rate and sampling are the preset's, sizes of
    the networks the weights' own, and how many times to tell them their scheduler's. Nothing is trained."""
    import torch
    from hydra.utils import get_class, instantiate
    from omegaconf import OmegaConf

    from vgr.generator import Generator
    from vgr.geometry.cameras import from_fov
    from vgr.models import helios, weights
    from vgr.training import checkpoints, rebuild

    told = command.compose("train", [f"experiments={cfg.preset}"])
    told.base, source = cfg.checkpoint, told.data.get("source")
    if source is None or told.init_from != cfg.checkpoint or not told.model._target_.endswith(".Helios"):
        raise ValueError(f"preset={cfg.preset} does not say how to sample weights before it is trained; "
                         "warp_adapter/one_video does")  # fmt: skip
    if cfg.memory is not None or cfg.shift is not None:
        raise ValueError("memory= and shift= are not Helios' to take: leave them out")
    if not Path(cfg.checkpoint).is_dir():
        raise FileNotFoundError(f"checkpoint={cfg.checkpoint} is no folder. {helios.HOW_TO_GET}")
    sampling = OmegaConf.to_container(told.sampling, resolve=True)
    sampling["staged"] = sampling.get("staged", {}) | helios.staged(cfg.checkpoint)
    sampling |= {k: cfg[k] for k in ("steps", "guidance") if cfg[k] is not None}
    record, tensors = rebuild.read(cfg.checkpoint)
    own, kind = rebuild.part_of(tensors, "model"), get_class(told.model._target_)
    settings = {k: v for k, v in OmegaConf.to_container(told.model, resolve=True).items() if not k.startswith("_")}
    model = weights.build(kind, {**settings, **record["model"]["config"]})
    weights.check(model, own, cfg.checkpoint)
    there = model.state_dict()
    model.load_state_dict({k: v.to(there[k].dtype) for k, v in own.items()}, assign=True)
    device = "cuda" if cfg.device == "auto" and torch.cuda.is_available() else cfg.device
    device = "cpu" if device == "auto" else device
    told.codec.device = told.text.device = device
    told.text.width = model.config["text_width"]
    height, width = source.size_hw
    about = {
        "fps": source.fps, "max_frames": source.frames, "size_hw": [height, width], "chunk": told.training.chunk,
        "intrinsics": from_fov(source.hfov_deg or HFOV_DEG, width / height).tolist(),
        "evidence": {"threshold": told.training.threshold, "rule": told.training.rule},
    }  # fmt: skip
    parts = {"model": model, "text": instantiate(told.text), "codec": instantiate(told.codec)}
    name, digest = f"{Path(cfg.checkpoint).name}, {cfg.preset}", checkpoints.tensors_hash(tensors)
    generator = Generator(parts, about, name, digest, {}, sampling, device)
    if seconds is not None:
        generator.reach(seconds)
    return generator


def read_path(cfg: DictConfig, generator: Generator, file: CameraFile | None = None) -> tuple[Cameras, int]:
    """Cameras (1,F) of the asked path, padded to a length the codec takes by resting at the end; frames to show.

    ValueError for a path that the model cannot take. A pose file's speeds beyond the trained range are told on stderr.
    """
    import torch

    from vgr.geometry.checks import check_cameras
    from vgr.geometry.formats import follow
    from vgr.geometry.trajectories import from_actions, named_cameras
    from vgr.types import Cameras

    own = read_intrinsics(cfg.intrinsics, generator)
    if file is not None:
        c2w, k = follow(
            file, generator.fps, generator.size_hw, generator.max_frames, own, name=f"cameras={cfg.cameras}",
            scale=cfg.scale, own_lens=cfg.intrinsics is not None,
        )  # fmt: skip
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
    rest = generator.whole(shown) - shown
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

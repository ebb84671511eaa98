"""Stories: shots that one after another direct a streaming model, as `vgr-sample shots=story.yaml` takes them.

A story is a YAML list of shots, or a table with `shots`, a `first_frame` and a `story`, the caption of the whole that
is read before every prompt. A shot has a prompt, its seconds, cut (true for all but the first unless said) and, for
models that take cameras, camera: a named path that goes on from where the shot before ended.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vgr import command

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vgr.diffusion.rollout import Session
    from vgr.generator import Generator
    from vgr.types import Cameras


@dataclass(frozen=True)
class Shot:
    """What a director says: a prompt, its seconds, whether a new shot begins, and a named camera path or none."""

    prompt: str
    seconds: float
    cut: bool
    camera: str | None


def read_story(path: Path) -> tuple[list[Shot], str | None, str]:
    """Shots, path of a first frame, caption of the whole. FileNotFoundError or ValueError name shot and key."""
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"shots={path} does not exist; it is a YAML list of shots with prompt and seconds")
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"shots={path} is no YAML: {str(error).splitlines()[0]}") from error
    table = told if isinstance(told, dict) else {"shots": told}
    rows, unknown = table.get("shots"), sorted(table.keys() - {"shots", "first_frame", "story"})
    if unknown or not isinstance(rows, list) or not rows:
        raise ValueError(f"shots={path} must be a list of shots, or a table: shots, first_frame, story; got {unknown}")
    told = table.get("story", "")
    if not isinstance(told, str) or ("story" in table and not told.strip()):
        raise ValueError(f"shots={path}: story={told!r} must be the caption of the whole; say it or leave it out")
    return [_shot(path, i, row) for i, row in enumerate(rows)], table.get("first_frame"), told


def _shot(path: Path, index: int, row: Any) -> Shot:
    where = f"shots={path}, shot {index + 1}"
    kinds = {"prompt": str, "seconds": (int, float), "cut": bool, "camera": str}
    if not isinstance(row, dict) or row.keys() - kinds or not {"prompt", "seconds"} <= row.keys():
        raise ValueError(f"{where} must have prompt and seconds, and may have cut and camera; got {row}")
    for key, value in row.items():
        if not isinstance(value, kinds[key]) or (isinstance(value, bool) and key == "seconds"):
            raise ValueError(f"{where}: {key}={value!r} is not {'a number' if key == 'seconds' else 'what it takes'}")
    if not row["prompt"].strip():
        raise ValueError(f"{where} has an empty prompt: say what is to be seen")
    return Shot(row["prompt"], float(row["seconds"]), row.get("cut", index > 0), row.get("camera"))


def sample(cfg: DictConfig) -> None:
    """conf/sample.yaml -> a folder with video.mp4 and sample.json; the video can be watched as it is made."""
    from vgr.data.files import write_json
    from vgr.data.video import live_video, write_video
    from vgr.sample import load

    shots, image, told = read_story(Path(cfg.shots))
    generator = load(cfg, sum(shot.seconds for shot in shots))
    image = cfg.first_frame or image
    first = None if image is None else read_first_frame(Path(image), generator.size_hw)
    check(shots, generator, Path(cfg.shots))
    if generator.tells_story not in (None, bool(told)):
        learnt, fix = "on captions of shots alone", "leave story out of"
        if generator.tells_story:
            learnt, fix = "with a caption of the whole before each shot's", "give a story in"
        print(f"vgr-sample: warning: {generator.name} was trained {learnt}: {fix} {cfg.shots}", file=sys.stderr)
    out = Path(cfg.out or Path("runs/samples") / f"{Path(cfg.shots).stem}_seed{cfg.seed}")
    out.mkdir(parents=True, exist_ok=True)
    if generator.plan is not None:
        print(generator.plan, file=sys.stderr)
    with live_video(out / "live.mp4", generator.size_hw, generator.fps) as add:
        frames, record = direct(generator, shots, cfg.seed, first, add, told)
    write_video(out / "video.mp4", frames, generator.fps)
    write_json(out / "sample.json", {
        "checkpoint": generator.name, "weights": generator.weights_hash, "seed": cfg.seed, "fps": generator.fps,
        "sampling": generator.sampling, "first_frame": image, **record,
    })  # fmt: skip
    print(out / "video.mp4")


def check(shots: list[Shot], generator: Generator, path: Path) -> None:
    """ValueError, before anything is made, for shots that this model cannot take."""
    session = generator.session(0)
    for i, shot in enumerate(shots):
        where = f"shots={path}, shot {i + 1}"
        try:
            session.frames_in(shot.seconds)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if shot.cut and (i == 0 or session.cut_prefix is None):
            reason = "the first shot has nothing to cut from" if i == 0 else f"{generator.name} knows no cuts"
            raise ValueError(f"{where} has cut: true, but {reason}; say cut: false")
        if (shot.camera is not None) != generator.takes_cameras:
            raise ValueError(
                f"{where} has camera={shot.camera}, but {generator.name} takes "
                + ("one in every shot" if generator.takes_cameras else "no camera")
            )


def direct(
    generator: Generator, shots: list[Shot], seed: int, first: np.ndarray | None, add: Callable[[np.ndarray], None],
    told: str,
) -> tuple[np.ndarray, dict[str, Any]]:  # fmt: skip
    """Every shot is said when the one before has been made, as a director would: frames (F,H,W,3) and a record.

    add hears of each chunk's frames; told: the story's caption. The record has each shot's frames and latency, from
    saying it to its first frames, and the seconds of each chunk.
    """
    import torch

    session = generator.session(seed, first, told)
    record: list[dict[str, Any]] = []
    pieces: list[np.ndarray] = []
    chunks: list[float] = []
    pose = torch.eye(4, dtype=torch.float64)
    with command.progress(len(shots), "shots") as done:
        autocast = torch.autocast(generator.device, torch.bfloat16, enabled=generator.device == "cuda")
        for shot in shots:
            mark, count, before = time.perf_counter(), session.frames_in(shot.seconds), len(chunks)
            camera = None if shot.camera is None else _camera(generator, session, shot, pose)
            with autocast:
                session.append(shot.prompt, shot.seconds, shot.cut, camera)
                for piece in session.frames():
                    pieces.append(piece.numpy())
                    chunks.append(time.perf_counter() - mark)
                    add(pieces[-1])
                    mark = time.perf_counter()
            if camera is not None:
                pose = camera.c2w[0, -1].double()
            record.append({
                "prompt": shot.prompt, "cut": shot.cut, "camera": shot.camera, "frames": count,
                "latency_s": chunks[before],
            })  # fmt: skip
            done(1)
    return np.concatenate(pieces), {"story": told, "shots": record, "chunk_s": chunks}


def _camera(generator: Generator, session: Session, shot: Shot, pose: Any) -> Cameras:
    """The shot's named path from `pose` (4,4) on, whose first frame is the one before the shot's unless it is new."""
    import torch

    from vgr.geometry.trajectories import named_cameras
    from vgr.types import Cameras

    count, started = session.frames_in(shot.seconds), session.started
    own = torch.tensor(generator.intrinsics, dtype=torch.float64)
    c2w, k = named_cameras(shot.camera, count + started, generator.fps, intrinsics=own)
    return Cameras((pose @ c2w)[None, started:].float(), k[None, started:].float())


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

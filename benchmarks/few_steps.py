"""Does a student reach in its few steps what its teachers do not reach in as many? Paired over held-out clips.

    python -m benchmarks.few_steps runs/world_model/tiny/seed1 runs/world_model/{chunk_causal,ode}_tiny/seed1

All start from the same noise, first frames, cameras and texts. The first run, bidirectional, is the teacher: it solves
its ODE in --steps steps (the long solution) and in as many as a student has. The others stream chunk by chunk: a
student at its own times, a run without any (a teacher, too) down its grid in as many steps. Two measures: mean squared
latent distance to the long solution over generated frames; and Frechet distance of the decoded videos to the true ones
of the same clips (features clipstats48), with, for each student and teacher, how much nearer the student lies.
Writes few_steps.json and the first clips as sheet.png to --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgr.data.files import atomic, write_json
from vgr.data.modules import ShardData
from vgr.data.video import read_video
from vgr.diffusion.rollout import stream
from vgr.diffusion.samplers import euler
from vgr.diffusion.timesteps import sigma_grid
from vgr.metrics import features, fvd
from vgr.metrics.statistics import mean_interval
from vgr.report import media
from vgr.report.measure import cell
from vgr.seeding import normal_like
from vgr.training import checkpoints
from vgr.training.conditioning import conditioning
from vgr.training.rebuild import rebuild
from vgr.types import VideoBatch

WINDOW, SHOWN = 14, 2  # frames of a window of features: two fill the 28 made at tiny size; clips of the sheet


def load(run: Path) -> dict[str, Any]:
    checkpoint = checkpoints.resolve(run)
    record, state = checkpoints.read_generator(checkpoint), checkpoints.read_state(checkpoint)
    return {**record, **{k: v.eval() for k, v in rebuild(checkpoint).items()}, "config": state["config"]}


def joint(run: dict[str, Any], batch: VideoBatch, noise: Tensor, steps: int) -> Tensor:
    cond = conditioning(run["text"], batch.captions, batch.cameras, batch.shot, run["codec"].stride[0], None)
    return euler(run["model"], noise, cond, sigma_grid(steps, run["sampling"]["shift"]), batch.latents[:, :, :1])


def streamed(run: dict[str, Any], batch: VideoBatch, noise: Tensor, few: int) -> Tensor:
    codec, own = run["codec"], run["sampling"]["sigmas"]
    cond = conditioning(run["text"], batch.captions, batch.cameras, batch.shot, codec.stride[0], run["chunk"])
    sigmas = torch.tensor(own, dtype=torch.float64) if own else sigma_grid(few, run["sampling"]["shift"])

    def start(position: Tensor, _step: int) -> Tensor:
        return noise[:, :, position]

    chunks = stream(run["model"], run["model"].new_state(), cond, sigmas, start, batch.latents[:, :, :1])
    return torch.cat([latents for latents, _ in chunks], dim=2)


def videos(codec: Any, latents: Tensor) -> np.ndarray:
    """(B,F,H,W,3) uint8."""
    video = (codec.decode(latents).clamp(-1, 1) + 1) * 127.5
    return video.round().byte().permute(0, 2, 3, 4, 1).numpy()


def described(video: np.ndarray) -> np.ndarray:
    """Features (windows, D) of a video without its given first frame."""
    return np.stack([features.clip_features(w) for w in features.windows(video[1:], WINDOW)])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=20, help="of the teacher's long solution")
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/few_steps"))
    args = parser.parse_args()
    teacher, runs = load(args.teacher), {str(path): load(path) for path in args.runs}
    students = [name for name, run in runs.items() if run["sampling"]["sigmas"]]
    if not students:
        parser.error("none of the runs is a student: a student has times of its own, sampling.sigmas")
    few, data = len(runs[students[0]]["sampling"]["sigmas"]) - 1, teacher["config"]["data"]
    shards = ShardData(data["train"], data["val"], None, 0, 8, 8, data["frames"], val_clips=args.clips)
    index = {key: i for i, key in enumerate(shards.val_shards.keys)}
    distances: dict[str, list[Tensor]] = {}
    found: dict[str, list[np.ndarray]] = {}
    sheet: list[np.ndarray] = []
    for batch in shards.val_batches(8):
        noise = normal_like(batch.latents, 0, "few steps", batch.position)
        long = f"{args.teacher}, {args.steps} steps"
        made = {long: joint(teacher, batch, noise, args.steps), str(args.teacher): joint(teacher, batch, noise, few)}
        made |= {name: streamed(run, batch, noise, few) for name, run in runs.items()}
        for name, latents in made.items():
            distances.setdefault(name, []).append((latents - made[long])[:, :, 1:].square().mean((1, 2, 3, 4)))
        shown = {name: videos(teacher["codec"], latents) for name, latents in made.items()}
        frames = shown[long].shape[1]
        true = [read_video(shards.val_shards.read_video_bytes(index[key]))[0][:frames] for key in batch.keys]
        for name, row in {"truth": true, **shown}.items():
            found.setdefault(name, []).extend(described(video) for video in row)
        if not sheet:
            sheet = [row[i] for i in range(SHOWN) for name, row in {"truth": true, **shown}.items() if name != long]
    write(args.out, distances, found, [str(args.teacher), *(n for n in runs if n not in students)], students)
    with atomic(args.out / "sheet.png") as file:
        file.write(media.png(media.sheet(sheet)))


def write(
    out: Path,
    distances: dict[str, list[Tensor]],
    found: dict[str, list[np.ndarray]],
    teachers: list[str],
    students: list[str],
) -> None:
    """few_steps.json, and the same to read."""
    table = {name: np.stack(rows) for name, rows in found.items()}
    flat = {name: rows.reshape(-1, rows.shape[-1]) for name, rows in table.items()}
    clip = np.repeat(np.arange(len(table["truth"])), table["truth"].shape[1])
    rows, gains = {}, []
    for name, parts in distances.items():
        frechet = fvd.frechet_interval(flat[name], flat["truth"], clip, clip)
        rows[name] = {"distance": cell(mean_interval(torch.cat(parts))), "frechet": cell(frechet)}
        print(f"{name}: distance {torch.cat(parts).mean():.4f}, Frechet distance {frechet.value:.2f}")
    for student in students:
        for teacher in teachers:
            gain = fvd.frechet_gain(table[student], table[teacher], table["truth"])
            gains.append({"student": student, "teacher": teacher, **cell(gain)})
            print(f"{student} nearer than {teacher} by {gain.value:.2f} ({gain.low:.2f} to {gain.high:.2f})")
    write_json(out / "few_steps.json", {"rows": rows, "gains": gains})


if __name__ == "__main__":
    main()

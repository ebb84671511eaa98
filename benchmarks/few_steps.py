"""Does a student reach in its few steps what its teachers do not reach in as many? Paired over held-out clips.

    python -m benchmarks.few_steps runs/world_model/{tiny,chunk_causal_tiny,ode_tiny}/seed1

All start from the same noise, first frames, cameras and texts; a model without cameras (causal video) imagines its
first frame and streams whole stories from their shots' captions. A run with times of its own is a student and is
sampled as it is used. The others are teachers, sampled in as many steps in two ways: down their own grid by Euler
steps, and the way of the first student (its times, and renewed noise where it renews it), which tells distillation
from a lucky sampler. Three measures: mean squared latent distance over generated frames to the first run's solution
in --steps steps; Frechet distance of the decoded videos to the true ones of the same clips (features clipstats48),
with how much nearer to them each student lies than each run before it; and the same to the first run's --steps steps
from other noise, which is what a student is taught and, where the teacher is weak, not the truth. Of stories also how
well cuts are kept (`benchmarks.shots`).
Writes few_steps.json and the first clips as sheet.png to --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.shots import COLUMNS, cut_scores
from vgr.bench import environment
from vgr.command import tracked
from vgr.data.files import atomic, write_json
from vgr.data.modules import ShardData
from vgr.data.video import read_video
from vgr.diffusion.rollout import stream
from vgr.diffusion.samplers import few_step
from vgr.diffusion.timesteps import sigma_grid
from vgr.metrics import features, fvd
from vgr.metrics.statistics import Interval, mean_interval
from vgr.report import media
from vgr.report.summary import cell
from vgr.seeding import normal_like
from vgr.training import checkpoints
from vgr.training.conditioning import conditioning
from vgr.training.rebuild import rebuild
from vgr.types import VideoBatch

WINDOW, SHOWN = 14, 2  # frames of a window of features: two fill the 28 made at tiny size; clips of the sheet
AGAIN = "first run, other noise"


def frechet_gain(a_VWD: np.ndarray, b_VWD: np.ndarray, truth_VWD: np.ndarray, draws: int = 400) -> Interval:
    """How much nearer to the truth a lies than b, FD(b, truth) - FD(a, truth), with a paired interval over videos.

    a_VWD, b_VWD, truth_VWD (V,W,D): W windows of the same V videos. Every draw takes one random half of the videos in
    all three, and the spread of the difference makes the interval, as in `fvd.frechet_interval`. ValueError unless the
    shapes are equal and there are 4 videos or more.
    """
    a, b, truth = (np.asarray(x, dtype=np.float64) for x in (a_VWD, b_VWD, truth_VWD))
    if a.ndim != 3 or not a.shape == b.shape == truth.shape or len(a) < 4:
        raise ValueError(
            f"features have shapes {a.shape}, {b.shape} and {truth.shape}; a paired comparison needs three equal "
            "(videos, windows, features) of 4 videos or more"
        )

    def gain(videos: np.ndarray) -> float:
        ours, others, known = (x[videos].reshape(-1, x.shape[-1]) for x in (a, b, truth))
        return fvd.frechet_distance(others, known) - fvd.frechet_distance(ours, known)

    rng = np.random.default_rng(0)
    value = gain(np.arange(len(a)))
    half = 1.96 * float(np.std([gain(rng.permutation(len(a))[: len(a) // 2]) for _ in range(draws)], ddof=1))
    return Interval(value, value - half, value + half, len(a))


def load(run: Path) -> dict[str, Any]:
    checkpoint = checkpoints.resolve(run)
    record, state = checkpoints.read_generator(checkpoint), checkpoints.read_state(checkpoint)
    return {**record, **{k: v.eval() for k, v in rebuild(checkpoint).items()}, "config": state["config"]}


def made(run: dict[str, Any], batch: VideoBatch, sigmas: Tensor, renoise: bool, seed: int = 0) -> Tensor:
    """Latents down `sigmas` from the clips' noise: chunk by chunk, or all frames at once without chunks."""
    told = (run["text"], batch.captions, batch.cameras, batch.shot, run["codec"].stride[0], run["chunk"])
    cond = conditioning(*told, run["sampling"].get("cut_prefix"))
    first = batch.latents[:, :, :1] if run["model"].takes_cameras else None

    def noise(position: Tensor, step: int) -> Tensor:
        return normal_like(batch.latents, seed, f"few steps {step}", batch.position)[:, :, position]

    if run["chunk"] is None:
        return few_step(run["model"], noise, cond, sigmas, None, first, renoise=renoise)[0]
    chunks = stream(run["model"], run["model"].new_state(), cond, sigmas, noise, first, renoise=renoise)
    return torch.cat([latents for latents, _ in chunks], dim=2)


def ways(runs: dict[str, dict[str, Any]], steps: int) -> dict[str, tuple[dict[str, Any], Tensor, bool]]:
    """Row -> (run, times, renewed noise); the first is the long solution, keys of students are those of `runs`."""
    own = {
        name: (torch.tensor(run["sampling"]["sigmas"], dtype=torch.float64), run["sampling"].get("renoise", False))
        for name, run in runs.items()
        if run["sampling"]["sigmas"]
    }
    if not own:
        raise ValueError("none of the runs is a student, with times of its own (sampling.sigmas)")
    theirs, (first, teacher) = next(iter(own.values())), next(iter(runs.items()))
    rows = {f"{first}, {steps} steps": (teacher, sigma_grid(steps, teacher["sampling"]["shift"]), False)}
    for name, run in runs.items():
        if name in own:
            rows[name] = (run, *own[name])
        else:
            grid = sigma_grid(len(theirs[0]) - 1, run["sampling"]["shift"])
            rows |= {f"{name}, own grid": (run, grid, False), f"{name}, as a student": (run, *theirs)}
    return rows


def videos(codec: Any, latents: Tensor) -> np.ndarray:
    """(B,F,H,W,3) uint8."""
    video = (codec.decode(latents).clamp(-1, 1) + 1) * 127.5
    return video.round().byte().permute(0, 2, 3, 4, 1).numpy()


def described(video: np.ndarray) -> np.ndarray:
    """Features (windows, D) of a video without its first frame, which stands alone and may be given."""
    return np.stack([features.clip_features(w) for w in features.windows(video[1:], WINDOW)])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=20, help="of the first run's long solution")
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/few_steps"))
    args = parser.parse_args()
    runs = {str(path): load(path) for path in args.runs}
    rows = ways(runs, args.steps)
    long, data = next(iter(rows)), next(iter(runs.values()))["config"]["data"]
    shards = ShardData(data["train"], data["val"], None, 0, 8, 8, data["frames"], val_clips=args.clips)
    index = {key: i for i, key in enumerate(shards.val_shards.keys)}
    distances: dict[str, list[Tensor]] = {name: [] for name in rows}
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("truth", AGAIN, *rows)}
    cuts: dict[str, list[dict[str, float]]] = {name: [] for name in ("truth", *rows)}
    sheet: list[np.ndarray] = []
    for batch in tracked(shards.val_batches(8), "batches of clips"):
        latents = {name: made(way[0], batch, *way[1:]) for name, way in rows.items()}
        for name, x in latents.items():
            distances[name].append((x - latents[long])[:, :, 1:].square().mean((1, 2, 3, 4)))
        shown = {name: videos(rows[long][0]["codec"], x) for name, x in latents.items()}
        frames = shown[long].shape[1]
        true = [read_video(shards.val_shards.read_video_bytes(index[key]))[0][:frames] for key in batch.keys]
        again = videos(rows[long][0]["codec"], made(rows[long][0], batch, *rows[long][1:], seed=1))
        found[AGAIN].extend(described(video) for video in again)
        shots = [shards.val_shards.read(index[key]).meta["shots"] for key in batch.keys]
        for name, row in {"truth": true, **shown}.items():
            found[name].extend(described(video) for video in row)
            cuts[name].extend(cut_scores(video, told) for video, told in zip(row, shots) if len(told) > 1)
        sheet = sheet or [
            row[i] for i in range(SHOWN) for name, row in {"truth": true, **shown}.items() if "as a student" not in name
        ]
    students = [name for name in rows if name in runs and runs[name]["sampling"]["sigmas"]]
    write(args.out, distances, found, students, cuts if cuts["truth"] else {})
    with atomic(args.out / "sheet.png") as file:
        file.write(media.png(media.sheet(sheet, COLUMNS if cuts["truth"] else 5)))


def write(
    out: Path,
    distances: dict[str, list[Tensor]],
    found: dict[str, list[np.ndarray]],
    students: list[str],
    cuts: dict[str, list[dict[str, float]]],
) -> None:
    """few_steps.json, and the same to read."""
    table = {name: np.stack(rows) for name, rows in found.items()}
    flat = {name: rows.reshape(-1, rows.shape[-1]) for name, rows in table.items()}
    clip = np.repeat(np.arange(len(table["truth"])), table["truth"].shape[1])
    means = {
        name: {key: cell(mean_interval([row[key] for row in rows])) for key in rows[0]} for name, rows in cuts.items()
    }
    rows, gains = ({"truth": means["truth"]} if means else {}), []
    for name, parts in distances.items():
        frechet = fvd.frechet_interval(flat[name], flat["truth"], clip, clip)
        rows[name] = {"distance": cell(mean_interval(torch.cat(parts))), "frechet": cell(frechet)}
        rows[name]["frechet_taught"] = cell(fvd.frechet_interval(flat[name], flat[AGAIN], clip, clip))
        rows[name] |= means.get(name, {})
        print(f"{name}: distance {torch.cat(parts).mean():.4f}, Frechet distance {frechet.value:.2f}")
    others = list(distances)
    for student in students:
        for other in others[1 : others.index(student)]:
            gain = frechet_gain(table[student], table[other], table["truth"])
            taught = frechet_gain(table[student], table[other], table[AGAIN])
            gains.append({"student": student, "other": other, **cell(gain), "taught": cell(taught)})
            print(f"{student} nearer than {other} by {gain.value:.2f} ({gain.low:.2f} to {gain.high:.2f})")
            print(f"  and nearer to what it was taught by {taught.value:.2f} ({taught.low:.2f} to {taught.high:.2f})")
            if cuts:
                sca = mean_interval([a["sca"] - b["sca"] for a, b in zip(cuts[student], cuts[other])])
                gains[-1]["sca"] = cell(sca)
                print(f"  and its SCA higher by {sca.value:.3f} ({sca.low:.3f} to {sca.high:.3f})")
    write_json(out / "few_steps.json", {**environment(), "rows": rows, "gains": gains})


if __name__ == "__main__":
    main()

"""Does a student land where its teacher does? Distance to the teacher's own long solution, from the same noise.

    python -m benchmarks.few_steps runs/world_model/tiny/seed1 runs/world_model/ode_tiny/seed1

For every held-out clip the teacher solves its ODE in --steps steps from fixed noise: the target. Each student streams
chunk by chunk at its own times (a model without any: its grid in as many steps) from the same noise, and the teacher
walks its grid in as many steps. The mean squared latent distance over generated frames is paired over clips.
Writes JSON to --out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgr.data.modules import ShardData
from vgr.diffusion.rollout import stream
from vgr.diffusion.samplers import euler
from vgr.diffusion.timesteps import sigma_grid
from vgr.seeding import normal_like
from vgr.training import checkpoints
from vgr.training.conditioning import conditioning
from vgr.training.rebuild import rebuild
from vgr.types import VideoBatch


def load(run: Path) -> dict[str, Any]:
    checkpoint = checkpoints.resolve(run)
    record, state = checkpoints.read_generator(checkpoint), checkpoints.read_state(checkpoint)
    return {**record, **{k: v.eval() for k, v in rebuild(checkpoint).items()}, "config": state["config"]}


def condition(run: dict[str, Any], batch: VideoBatch, chunk: int | None) -> Any:
    return conditioning(run["text"], batch.captions, batch.cameras, batch.shot, run["codec"].stride[0], chunk)


def student(run: dict[str, Any], batch: VideoBatch, noise: Tensor, few: int) -> Tensor:
    cond = condition(run, batch, run["chunk"])
    own, shift = run["sampling"]["sigmas"], run["sampling"]["shift"]
    sigmas = torch.tensor(own, dtype=torch.float64) if own else sigma_grid(few, shift)
    first = batch.latents[:, :, :1]

    def start(position: Tensor, _step: int) -> Tensor:
        return noise[:, :, position]

    chunks = stream(run["model"], run["model"].new_state(), cond, sigmas, start, first)
    return torch.cat([latents for latents, _ in chunks], dim=2)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("students", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=20, help="of the teacher's long solution")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    teacher, students = load(args.teacher), {str(path): load(path) for path in args.students}
    config = teacher["config"]
    data = ShardData(config["data"]["train"], config["data"]["val"], None, 0, 8, 8, config["data"]["frames"],
                     val_clips=args.clips)  # fmt: skip
    shift, few = teacher["sampling"]["shift"], len(next(iter(students.values()))["sampling"]["sigmas"]) - 1
    distances: dict[str, list[Tensor]] = {"teacher": [], **{name: [] for name in students}}
    for batch in data.val_batches(8):
        noise = normal_like(batch.latents, 0, "few steps", batch.position)
        cond, first = condition(teacher, batch, None), batch.latents[:, :, :1]
        target = euler(teacher["model"], noise, cond, sigma_grid(args.steps, shift), first)
        made = {"teacher": euler(teacher["model"], noise, cond, sigma_grid(few, shift), first)}
        made |= {name: student(run, batch, noise, few) for name, run in students.items()}
        for name, latents in made.items():
            distances[name].append((latents - target)[:, :, 1:].square().mean((1, 2, 3, 4)))
    rows = {name: torch.cat(parts) for name, parts in distances.items()}
    found: dict[str, Any] = {"steps": args.steps, "few": few, "clips": len(rows["teacher"])}
    for name, values in rows.items():
        gap = rows["teacher"] - values
        half = 1.96 * float(gap.std()) / len(gap) ** 0.5
        found[name] = {"distance": float(values.mean()), "closer_by": float(gap.mean()), "interval": half}
        print(f"{name}: {values.mean():.4f}, closer than the teacher at {few} steps by {gap.mean():.4f} +- {half:.4f}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

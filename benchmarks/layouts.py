"""Does training on many devices take the steps of one? The table of layouts, one column a machine.

    python -m benchmarks.layouts --accelerator cpu --ranks 2 --out benchmarks/results/layouts.json
    python -m benchmarks.layouts --accelerator gpu --ranks 8 --out benchmarks/results/layouts.json     # make gpu8
    python -m benchmarks.layouts --plan --ranks 8 --out benchmarks/results/layouts.json     # composed, on no device

Three trainings of tiny presets (world model, causal video model under teacher forcing, self-forcing with its two
networks), 20 steps each, on one device and in every layout, in fp32: the largest difference of a weight, of a loss
relative to it, samples a second (which say little at this size) and memory. Of a layout that fails the cause is kept.
--plan composes the same at full size for H200s, builds it on the meta device, and the planner tells GB a GPU.
Columns are added to what --out holds, the whole table is printed as Markdown, what was not run stays empty. Runs lie
in --work, a folder for each state of the code, so what was ended goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vgr.command import tracked
from vgr.data.files import write_json
from vgr.training import checkpoints
from vgr.training.code_state import difference, environment

BATCH = 8
SHORT = (f"training.global_batch={BATCH}", f"training.max_samples={20 * BATCH}", f"every.log={BATCH}",
         f"every.validate={20 * BATCH}", f"every.save={20 * BATCH}", "data.val_clips=8",
         "trainer.precision=32-true")  # fmt: skip
WARM = f"training.warmup_samples={2 * BATCH}"
# By name: its preset, and the arguments that make it start from nothing, or from the first one's run.
TRAININGS = {
    "world model": ("world_model/tiny", ("shards=data/worlds", WARM)),
    "causal video": ("causal_video/multi_shot", ("size=story_tiny", "shards=data/stories", "init_from=null", WARM)),
    "self-forcing": ("world_model/self_forcing", ("size=tiny", "shards=data/worlds", "training.critic_steps=2")),
}
# At full size, as the paper trains it or, of a causal model, as Wan makes videos.
PLANNED = {
    "world model": ("experiments=world_model/hybrid", "plan=h200 704x1280"),
    "causal video": ("experiments=causal_video/multi_shot", "init_from=null", "plan=h200 480x832"),
    "self-forcing": ("experiments=world_model/self_forcing", "plan=h200 704x1280"),
}
LAYOUTS = {
    "ddp": ("trainer.strategy=ddp",),
    "fsdp": ("trainer.strategy=fsdp",),
    "hybrid": ("trainer.strategy=fsdp", "fsdp.replicas=2"),
    "context": ("trainer.strategy=fsdp", "fsdp.context=2"),
    "hybrid and context": ("trainer.strategy=fsdp", "fsdp.replicas=2", "fsdp.context=2"),
    "zero2": ("trainer.strategy=zero2",),
    "zero3": ("trainer.strategy=zero3", "model.activation_checkpointing=true"),
}
# ZeRO has one optimizer, so one network that is trained.
ROWS = [(n, x) for n in TRAININGS for x in LAYOUTS if not (n == "self-forcing" and x.startswith("zero"))]


def least_ranks(layout: str) -> int:
    """Ranks below which a layout is another one."""
    return {"hybrid": 2, "context": 2, "hybrid and context": 4}.get(layout, 1)


def call(work: Path, command: str, *arguments: str) -> str | None:
    """A vgr command in `work`; the last line of its error, None if there was none."""
    done = subprocess.run(
        [sys.executable, "-m", f"vgr.{command}", *arguments], cwd=work, capture_output=True, text=True
    )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]


def train(work: Path, name: str, runs: str, *layout: str) -> tuple[Path | None, str | None]:
    """The run folder of a training in a layout, or why there is none."""
    preset, own = TRAININGS[name]
    before = () if name != "self-forcing" else tuple(f"{key}={first(work)}" for key in ("init_from", "teacher"))
    failed = call(work, "train", f"experiments={preset}", f"runs={runs}", *SHORT, *own, *before, *layout)
    found = sorted((work / runs).glob(f"{preset}*/seed1"))
    return (found[0], None) if failed is None else (None, failed)


def first(work: Path) -> Path:
    """The world model's run on one device, from which self-forcing starts."""
    return next((work / "runs/one").glob("world_model/tiny*/seed1")).relative_to(work)


def losses(run: Path) -> dict[int, float]:
    """Training loss by samples seen."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["samples_seen"]: line["train/loss"] for line in lines if "train/loss" in line}


def compared(one: Path, many: Path) -> dict[str, float]:
    """How far a run in a layout ends from the run on one device."""
    own, other = (checkpoints.read_weights(checkpoints.latest(run / "checkpoints"), "weights") for run in (one, many))
    a, b = losses(one), losses(many)
    last = [json.loads(line) for line in (many / "metrics.jsonl").read_text().splitlines() if "perf/" in line][-1]
    return {
        "weights_max": max(float((own[k] - other[k]).abs().max()) for k in own),
        "loss_max_relative": max(abs(a[k] - b[k]) / abs(a[k]) for k in a),
        "samples_per_s": last["perf/samples_per_s"],
        "memory_gib": last["perf/memory_gib"],
    }


def planned(ranks: int, known: dict[str, dict[str, Any]]) -> Iterator[dict[str, dict[str, Any]]]:
    """`known` with one row after another: {"gb": of a GPU of `ranks`}, at full size, or {"failed": why}."""
    rows = dict(known)
    for name, layout in tracked([row for row in ROWS if ", ".join(row) not in known], "planned"):
        words = (*PLANNED[name], *LAYOUTS[layout], f"trainer.devices={ranks}")
        done = subprocess.run([sys.executable, "-m", "vgr.train", *words], capture_output=True, text=True)
        peak = re.search(r"^peak +([\d.]+) GB", done.stdout, re.MULTILINE)
        why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        rows[f"{name}, {layout}"] = {"gb": float(peak[1])} if peak and not done.returncode else {"failed": why}
        yield rows


def measure(work: Path, accelerator: str, ranks: int) -> dict[str, dict[str, Any]]:
    """Rows by `training, layout`: numbers of `compared`, or {"failed": why}."""
    on = f"trainer.accelerator={accelerator}"
    ones: dict[str, Path] = {}
    for name in tracked(list(TRAININGS), "one device"):
        ones[name], failed = train(work, name, "runs/one", on)
        if failed:
            raise RuntimeError(f"{name} on one device: {failed}")
    rows: dict[str, dict[str, Any]] = {}
    for name, layout in tracked([row for row in ROWS if ranks >= least_ranks(row[1])], f"{ranks} ranks"):
        micro = max(1, BATCH // (ranks // (2 if "context" in layout else 1)))
        own = (*LAYOUTS[layout], on, f"trainer.devices={ranks}", f"data.micro_batch={min(micro, 4)}")
        run, failed = train(work, name, f"runs/{layout.replace(' ', '_')}_{ranks}", *own)
        rows[f"{name}, {layout}"] = {"failed": failed} if run is None else compared(ones[name], run)
    return rows


def trained(work: Path, accelerator: str, ranks: int) -> dict[str, dict[str, Any]]:
    """`measure` in the folder of this state of the code, after data was made there."""
    work = work / f"{environment()['commit']}_{hashlib.sha256(difference()).hexdigest()[:8]}"
    work.mkdir(parents=True, exist_ok=True)
    for kind, out in (("worlds_tiny", "worlds"), ("story_tiny", "stories")):
        words = (f"data={kind}", f"out=data/{out}", "train_clips=32", "val_clips=8")
        if failed := call(work, "prepare", *words):
            raise SystemExit(f"vgr-prepare data={kind}: {failed}")
    return measure(work, accelerator, ranks)


def table(columns: dict[str, Any]) -> str:
    """Markdown: a row a training and layout, a column a machine; empty where nothing was run.

    Of a training the largest relative difference of a loss: Adam makes whole steps of a gradient's rounding near zero,
    which weights show and losses do not.
    """
    names = list(columns)
    rows = [f"{name}, {layout}" for name, layout in ROWS]
    lines = ["| losses of 20 steps, against one device | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = []
        for name in names:
            told = columns[name]["rows"].get(row, {})
            number = f"{told['loss_max_relative']:.0e}" if "loss_max_relative" in told else ""
            number = f"{told['gb']} GB" if "gb" in told else number
            cells.append("no" if "failed" in told else number)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--accelerator", choices=("cpu", "gpu"))
    where.add_argument("--plan", action="store_true")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/layouts"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.accelerator == "gpu" and torch.cuda.device_count() < args.ranks:
        parser.error(f"--ranks {args.ranks}: torch finds {torch.cuda.device_count()} GPUs here")
    columns = json.loads(args.out.read_text()) if args.out.is_file() else {}
    if args.plan:
        name, now = f"{args.ranks} x H200, planned", environment()
        known = columns.get(name, {"environment": None})
        for rows in planned(args.ranks, known["rows"] if known["environment"] == now else {}):
            columns[name] = {"rows": rows, "environment": now}
            write_json(args.out, columns)
    else:
        device = torch.cuda.get_device_name() if args.accelerator == "gpu" else "CPU, gloo"
        rows = trained(args.work, args.accelerator, args.ranks)
        columns[f"{args.ranks} x {device}"] = {"rows": rows, "environment": environment()}
        write_json(args.out, columns)
    print(table(columns))


if __name__ == "__main__":
    main()

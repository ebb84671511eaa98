"""Is a run that dies again and again, at any moment, the run that never died?

    python -m benchmarks.kills --kills 200 --out benchmarks/results/kills.json

A small training is started by one command and ended by force, and started again, until `kills` deaths are counted;
each time it comes to its end it begins once more in a new folder. Its disk is a small one in memory (tmpfs: root, or
`unshare -Urm` before the command). Four ways to die, in these shares:

    training   SIGKILL some steps after it went on                                                  0.4
    writing    SIGKILL while a checkpoint is being written, from its first byte to `latest`          0.3
    starting   SIGKILL before its first step                                                        0.1
    full       the disk is filled to fewer free bytes than a checkpoint takes: it ends by itself     0.2

After each death the newest checkpoint is verified and compared, weights, averages and optimizer, with the one that a
training left alone wrote at the same step. Lost is what was trained beyond it: up to an interval, and, while the next
one is written or fails to be, what is trained meanwhile. Each run that came to its end is compared with the one left
alone: tensors, every line of metrics.jsonl but times, validation.json.

Python, torch and Lightning are imported once and each start is a fork of that: what `vgr-train` does is done in full.
SIGKILL leaves what was written in the page cache, so what a power cut would lose of it is not shown. Started again it
goes on where it was, on files in --work.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vgr import train
from vgr.bench import environment
from vgr.data.files import Journal, read_lines, write_json, write_text
from vgr.data.shards import ShardWriter
from vgr.models.codec import CosineCodec
from vgr.training import checkpoints

SHARES = {"training": 0.4, "writing": 0.3, "starting": 0.1, "full": 0.2}
BATCH, STEPS, INTERVAL = 4, 60, 3  # samples a step; steps of a whole run; steps from save to save
PATIENCE_S = 300.0
DISK = "96m"
IMPORTED = ("pytorch_lightning", "vgr.generator", "vgr.data.modules", "vgr.models.world_model", "vgr.training.sharded")
CODEC = {"stride": [4, 8, 8], "luma": [4], "chroma": [0]}
PRESET = f"""# @package _global_
defaults:
  - override /codec: cosine_tiny
shards: shards
data: {{micro_batch: {BATCH}, workers: 0, val_clips: 4}}
model: {{in_channels: 16, raw_frames: 4, width: 32, heads: 2, layers: 2, softmax_every: 2, text_width: 16}}
text: {{width: 16, length: 16, heads: 2}}
codec: {{stride: [4, 8, 8], luma: [4], chroma: [0], latents_mean: null, latents_std: null}}
training: {{global_batch: {BATCH}, max_samples: {BATCH * STEPS}, warmup_samples: 16, lr: 3.0e-3, ema_half_life: 40}}
every: {{log: {BATCH}, validate: {BATCH * 20}, sample: 0, save: {BATCH * INTERVAL}}}
trainer: {{accelerator: cpu}}
"""


def make_project(folder: Path) -> None:
    """Shards of noise and the preset `kills`."""
    rng = np.random.default_rng(0)
    intrinsics, c2w = np.tile([0.5, 0.6, 0.5, 0.5], (17, 1)), np.tile(np.eye(4), (17, 1, 1))
    fingerprint = CosineCodec(**CODEC).fingerprint
    for split, clips in (("train", 40), ("val", 4)):
        meta = {"shots": [{"start": 0, "end": 17, "caption": "noise"}], "source": {}, "metric_scale": True}
        out = folder / "shards" / split
        with ShardWriter(out, "CosineCodec", fingerprint, (4, 8, 8), 16, (32, 32), 8.0, "CC0") as writer:
            for i in range(clips):
                latents = rng.normal(size=(16, 5, 4, 4)).astype(np.float16)
                writer.add(f"{split}{i}", latents, c2w, intrinsics, {**meta, "split": split})
    write_text(folder / "own/experiments/kills.yaml", PRESET)


def start(disk: Path, runs: str, *more: str) -> int:
    """`vgr-train` on the disk, forked; its process id. What it prints goes to <disk>/<runs>.log."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # dies with this process
        os.chdir(disk)
        log = os.open(f"{runs}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["vgr-train", "--config-dir", "own", "experiments=kills", f"runs={runs}", *more]
        train.main()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    finally:
        os._exit(code)


def ended(child: int, until: Callable[[], bool]) -> int | None:
    """Wait for `until` or the child's end, whose exit code (minus the signal) is returned; RuntimeError if neither."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if until():
            return None
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise RuntimeError(f"nothing happened in {PATIENCE_S:g} s; the log beside the run's folder may say why")


def told(kind: str, code: int | None, disk: Path, runs: str) -> str:
    """What became of a training that should not have ended so."""
    return f"{kind}: ended with {code}: {(disk / f'{runs}.log').read_text()[-2000:]}"


def digest(checkpoint: Path) -> str:
    """One hash of weights, averages and optimizer."""
    return " ".join(checkpoints.weights_hash(checkpoint, part)[:16] for part in ("weights", "ema", "optimizer"))


def result(run: Path) -> dict[str, Any]:
    """What two equal runs have in common at their end."""
    lines = read_lines(run / "metrics.jsonl")
    lines = [{k: v for k, v in x.items() if k != "time_s" and not k.startswith(("perf/", "system/"))} for x in lines]
    last = checkpoints.latest(run / "checkpoints")
    validation = (run / "validation.json").read_text()
    return {"step": last.name, "tensors": digest(last), "lines": lines, "validation": validation}


class Killed:
    """The training in `<disk>/<runs>`, and how it dies."""

    def __init__(self, disk: Path, runs: str, whole: dict[str, Any]) -> None:
        self.disk, self.runs, self.whole = disk, runs, whole
        self.run = disk / runs / "kills/seed1"
        self.saves, self.lines = self.run / "checkpoints", self.run / "metrics.jsonl"

    def seen(self) -> int:
        """Samples of the last step that was told of."""
        return max((x["samples_seen"] for x in read_lines(self.lines)), default=0)

    def saved(self) -> int:
        """Samples of the newest checkpoint."""
        newest = checkpoints.latest(self.saves)
        return 0 if newest is None else checkpoints.read_state(newest)["samples_seen"]

    def _writing(self) -> bool:
        return any(self.saves.glob(".saving_*"))

    def die(self, kind: str, rng: random.Random) -> dict[str, Any] | None:
        """Start it and end it; what was lost and found, or None if it came to its end before."""
        before, old = self.saved(), self.lines.stat().st_ino if self.lines.exists() else 0
        stale = {p.stat().st_ino for p in self.saves.glob(".saving_*")}
        child = start(self.disk, self.runs)
        stop_at = before + BATCH * rng.randint(1, 2 * INTERVAL)
        skip = rng.randint(0, 1)

        def went_on() -> bool:  # the lines beyond the checkpoint are gone, and the next one is there
            return self.lines.exists() and self.lines.stat().st_ino != old and self.seen() > before

        if kind == "starting":
            end = time.monotonic() + rng.uniform(0, self.whole["start_s"])
            code = ended(child, lambda: time.monotonic() > end)
        else:
            code = ended(child, went_on)
        if code is None and kind == "training":
            code = ended(child, lambda: self.seen() >= stop_at)
            pause = rng.uniform(0, self.whole["step_s"])
        elif code is None and kind == "writing":
            for _ in range(skip):
                code = ended(child, self._writing) if code is None else code
                code = ended(child, lambda: not self._writing()) if code is None else code
            code = ended(child, self._writing) if code is None else code
            pause = rng.uniform(0, 1.2 * self.whole["write_s"])
        else:
            pause = 0.0
        ballast = self.disk / "ballast"
        if code is None and kind == "full":
            with ballast.open("wb") as file:
                free = os.statvfs(self.disk)
                left = int(rng.uniform(0, self.whole["bytes"]))
                os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - left))
            code = ended(child, lambda: False)
        elif code is None:
            time.sleep(pause)
            os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ballast.unlink(missing_ok=True)
        if code == 0:
            return None
        if code != (2 if kind == "full" else -signal.SIGKILL):
            raise RuntimeError(told(kind, code, self.disk, self.runs))
        return self.found(kind, old, stale)

    def found(self, kind: str, old: int = 0, stale: Collection[int] = ()) -> dict[str, Any]:
        """What a death left: `lost` samples, whether the newest checkpoint is whole and as it should be.

        old and stale: inodes of the lines and the half-written folders that an earlier death left; not this one's.
        """
        newest, saved = checkpoints.latest(self.saves), self.saved()
        seen = self.seen() if self.lines.exists() and self.lines.stat().st_ino != old else saved
        wrong = None if newest is None else checkpoints.damage(newest)
        equal = newest is None or (wrong is None and digest(newest) == self.whole["digests"][newest.name])
        half = [p for p in self.saves.glob(".saving_*") if p.stat().st_ino not in stale]
        half += [p for p in self.saves.glob("step_*") if newest is not None and p.name > newest.name]
        return {
            "kind": kind, "run": self.runs, "seen": seen, "saved": saved, "lost": max(0, seen - saved),
            "writing": bool(half), "damaged": wrong, "equal": equal,
        }  # fmt: skip


def undisturbed(disk: Path) -> dict[str, Any]:
    """The run left alone: its result, the hash of every checkpoint, and how long things take here."""
    whole = Killed(disk, "whole", {})
    began, marks = time.monotonic(), {"first": 0.0, "open": 0.0, "writes": []}

    def watch() -> bool:
        now = time.monotonic()
        if not marks["first"] and whole.lines.exists() and whole.seen():
            marks["first"] = now
        if whole._writing():
            marks["open"] = marks["open"] or now
        elif marks["open"]:
            marks["writes"].append(now - marks["open"])
            marks["open"] = 0.0
        return False

    code = ended(start(disk, "whole", f"keep={STEPS // INTERVAL + 4}"), watch)
    if code != 0:
        raise RuntimeError(told("left alone", code, disk, "whole"))
    folders = sorted(whole.saves.glob("step_*"))
    found = {
        "result": result(whole.run),
        "digests": {p.name: digest(p) for p in folders},
        "bytes": sum(f.stat().st_size for f in folders[-1].rglob("*") if f.is_file()),
        "start_s": marks["first"] - began,
        "step_s": (time.monotonic() - marks["first"]) / STEPS,
        "write_s": float(np.median(marks["writes"])),
    }
    shutil.rmtree(disk / "whole")
    return found


def mounted(disk: Path) -> None:
    """A small disk in memory; RuntimeError where that may not be made."""
    if disk.is_mount():
        return
    disk.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "kills", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{done.stderr.strip()}: run as root, or with `unshare -Urm` before the command")


def kill(work: Path, kills: int, seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The deaths, and the results of the runs that came to their end compared with the one left alone."""
    disk = work / "disk"
    mounted(disk)
    if not (disk / "own").exists():
        make_project(disk)
    if not (work / "whole.json").exists():
        shutil.rmtree(disk / "whole", ignore_errors=True)
        write_json(work / "whole.json", undisturbed(disk))
    whole = json.loads((work / "whole.json").read_text())
    journal = Journal(work, "kills.jsonl")
    deaths = [x for x in journal.known.values() if "kind" in x]
    ends = {x["id"]: x["equal"] for x in journal.known.values() if "kind" not in x}
    bar = tqdm(total=kills, initial=len(deaths), unit="kill", file=sys.stderr)
    while len(deaths) < kills or not ends:
        one = Killed(disk, f"run{len(ends)}", whole)
        rng = random.Random(f"{seed}-{len(deaths)}-{one.seen()}")
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        if len(deaths) < kills:
            death = one.die(kind, rng)
        elif (code := ended(start(disk, one.runs), lambda: False)) == 0:
            death = None
        else:
            raise RuntimeError(told("the last start", code, disk, one.runs))
        if death is None:
            ends[one.runs] = result(one.run) == whole["result"] and not list(one.saves.glob(".*"))
            journal.add({"id": one.runs, "equal": ends[one.runs]})
            shutil.rmtree(disk / one.runs)
        else:
            journal.add({"id": f"death{len(deaths)}", **death})
            deaths.append(death)
            bar.update()
            wrong = sum(not x["equal"] for x in deaths)
            bar.set_postfix_str(f"{len(ends)} runs ended, {wrong} wrong, most lost {max(x['lost'] for x in deaths)}")
    bar.close()
    subprocess.run(["umount", str(disk)], check=False)
    about = {k: whole[k] for k in ("bytes", "start_s", "step_s", "write_s")}
    return deaths, {"ended": len(ends), "equal": sum(ends.values()), **about}


def table(deaths: list[dict[str, Any]]) -> dict[str, Any]:
    """By way to die: how often, while a checkpoint was half written, and what was lost in samples."""
    interval = BATCH * INTERVAL
    rows = {}
    for kind in [*SHARES, "all"]:
        of = [x for x in deaths if kind in (x["kind"], "all")]
        rows[kind] = {
            "deaths": len(of),
            "while_writing": sum(x["writing"] for x in of),
            "lost_mean": float(np.mean([x["lost"] for x in of])) if of else 0.0,
            "lost_most": max((x["lost"] for x in of), default=0),
            "beyond_interval": sum(x["lost"] > interval for x in of),
            "beyond_interval_not_writing": sum(
                x["lost"] > interval and not x["writing"] and x["kind"] != "full" for x in of
            ),
            "beyond_two_intervals": sum(x["lost"] > 2 * interval for x in of),
            "damaged_newest": sum(x["damaged"] is not None for x in of),
            "other_tensors": sum(not x["equal"] for x in of),
        }
    return rows


def main() -> None:
    """Entry point of `python -m benchmarks.kills`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the ways and moments")
    parser.add_argument("--work", type=Path, default=Path("runs/kills"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # also: no threads yet that a fork would lose
    for name in IMPORTED:
        importlib.import_module(name)
    began = time.monotonic()
    deaths, runs = kill(args.work.resolve(), args.kills, args.seed)
    rows = table(deaths)
    write_json(
        args.out,
        {
            **environment(), "seed": args.seed, "interval": BATCH * INTERVAL, "batch": BATCH,
            "seconds": round(time.monotonic() - began), "runs": runs, "rows": rows,
        },
    )  # fmt: skip
    print(json.dumps({"runs": runs, "rows": rows}, indent=1))
    good = runs["equal"] == runs["ended"] and not rows["all"]["damaged_newest"] + rows["all"]["other_tensors"]
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

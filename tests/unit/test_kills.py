"""benchmarks.kills sees what a death has broken; the deaths themselves are its own run, a few of them here (slow)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kills
from vgr.training import checkpoints, saving

ROOT = Path(kills.__file__).parents[1]


@pytest.fixture
def dead(tmp_path):
    """A run that died at 28 samples, 20 of them saved at step 5, 12 at step 3."""
    one = kills.Killed(tmp_path, "run0", {"digests": {}})
    for step, samples in ((3, 12), (5, 20)):
        parts = {part: {"a": torch.full((4,), float(step))} for part in ("weights", "ema", "optimizer")}
        path = saving.save(one.saves, step, parts, {"samples_seen": samples}, {})
        one.whole["digests"][path.name] = kills.digest(path)
    one.lines.write_text("".join(json.dumps({"samples_seen": x}) + "\n" for x in (20, 24, 28)) + '{"samples_se')
    return one


def test_what_was_lost_is_counted_from_the_newest_checkpoint(dead):
    found = dead.found("training")
    assert (found["seen"], found["saved"], found["lost"]) == (28, 20, 8)
    assert found["equal"] and found["damaged"] is None and not found["writing"]
    (dead.saves / ".saving_step_00000007").mkdir()
    assert dead.found("training")["writing"]
    earlier = [p.stat().st_ino for p in (dead.lines, dead.saves / ".saving_step_00000007")]
    found = dead.found("starting", earlier[0], earlier[1:])
    assert found["lost"] == 0 and not found["writing"]


def test_a_damaged_or_another_checkpoint_is_seen(dead):
    path = checkpoints.latest(dead.saves)
    dead.whole["digests"][path.name] = "another"
    assert not dead.found("training")["equal"]
    file = next((path / "optimizer").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    found = dead.found("full")
    assert file.name in found["damaged"] and not found["equal"]


def test_the_table_counts_by_way_to_die():
    told = {"run": "run0", "damaged": None, "equal": True, "writing": False}
    lost = [
        ("training", 8, {}),
        ("training", 16, {"writing": True}),
        ("full", 20, {}),
        ("writing", 28, {"equal": False}),
    ]
    rows = kills.table([{"kind": kind, "lost": x, **told, **more} for kind, x, more in lost])
    assert rows["training"]["deaths"] == 2 and rows["training"]["while_writing"] == 1
    assert rows["all"]["lost_most"] == 28 and rows["all"]["other_tensors"] == 1 and rows["starting"]["deaths"] == 0
    assert rows["all"]["beyond_interval"] == 3 and rows["all"]["beyond_two_intervals"] == 1
    assert rows["all"]["beyond_interval_not_writing"] == 1


@pytest.mark.slow
def test_a_few_deaths(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", "5", "--work", str(tmp_path / "work")]
    if os.geteuid():
        command = ["unshare", "-Urm", *command]
    out = tmp_path / "kills.json"
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=900)
    if "as root, or with" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"no small disk can be mounted: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(out.read_text())
    assert told["rows"]["all"]["deaths"] == 5 and told["runs"]["equal"] == told["runs"]["ended"] > 0

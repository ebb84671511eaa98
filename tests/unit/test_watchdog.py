"""A hang is told of by rank, host and place; what is only long goes on, and what is well leaves nothing."""

import json
import subprocess
import sys
import time

import pytest

from vgr.training.watchdog import Watchdog

# Rank 0 of two is at the next step; rank 1 sleeps before it, in a call that keeps the interpreter's lock.
RANK = """
import ctypes, sys, time
from pathlib import Path
from vgr.training.watchdog import Watchdog

def loading_a_shard():
    ctypes.PyDLL(None).sleep(60)

rank = int(sys.argv[2])
dog = Watchdog(Path(sys.argv[1]), 1.0, rank, 2, lambda line: print(line, flush=True))
dog.beat(7, "data")
time.sleep(0.5)  # a heartbeat of it
if rank == 1:
    loading_a_shard()
dog.beat(7, "step")
time.sleep(60)
"""


def test_the_rank_that_is_behind_is_named_with_its_stack(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in (1, 0)
    ]
    try:
        stacks, line = tmp_path / "rank00001.txt", ranks[1].stdout.readline()
        end = time.monotonic() + 60
        while "loading_a_shard" not in stacks.read_text() and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    at = json.loads((tmp_path / "rank00001.json").read_text())
    assert f"rank 1 on {at['host']} (process {at['pid']}) is behind: data after step 7" in line
    assert "1 of 2 ranks are at: step after step 7" in line and "Nothing was stopped" in line
    assert "loading_a_shard" in stacks.read_text()


def test_long_work_is_told_of_and_goes_on(tmp_path):
    said = []
    dog = Watchdog(tmp_path / "hangs", 0.2, 0, 1, said.append)
    dog.beat(3, "validate")
    end = time.monotonic() + 60
    while not (said and any(p.stat().st_size for p in (tmp_path / "hangs").glob("*.txt"))) and time.monotonic() < end:
        time.sleep(0.02)
    dog.beat(3, "save")
    dog.close()
    assert "1 of 1 ranks are at: validate after step 3" in said[0] and "behind" not in said[0]
    (stacks,) = (tmp_path / "hangs").iterdir()
    assert "test_long_work_is_told_of_and_goes_on" in stacks.read_text()


@pytest.mark.parametrize("limit_s", [60.0, 0.0])
def test_what_is_well_or_not_watched_leaves_nothing(tmp_path, limit_s):
    dog = Watchdog(tmp_path / "hangs", limit_s, 0, 1, pytest.fail)
    for step in range(3):
        dog.beat(step, "step")
    dog.close()
    dog.close()
    assert list(tmp_path.iterdir()) == []

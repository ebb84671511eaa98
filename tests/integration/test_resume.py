"""Killed at any moment and started again, a run ends with the weights of a run never interrupted, bit for bit."""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from small_training import command, environment, make_project, metrics, train

from vgr.training import checkpoints


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("resume"))
    done = train(folder, "runs=whole")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, folder / "whole/mini/seed1"


def tensors(run):
    checkpoint = checkpoints.latest(run / "checkpoints")
    checkpoints.verify(checkpoint)
    parts = {part: checkpoints.read_weights(checkpoint, part) for part in ("weights", "ema", "optimizer")}
    return {f"{part}/{k}": v for part, values in parts.items() for k, v in values.items()}


def assert_equal_runs(one, other):
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert (one / "validation.json").read_text() == (other / "validation.json").read_text()
    assert metrics(one) == metrics(other)  # no line lost, none twice


def kill_when(process, happened, patience=240.0):
    end = time.monotonic() + patience
    while process.poll() is None and not happened() and time.monotonic() < end:
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read()[-2000:]
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_kill_9_while_stepping_and_while_saving(undisturbed):
    folder, whole = undisturbed
    run = folder / "killed/mini/seed1"
    saves = run / "checkpoints"

    def start():
        arguments = command("runs=killed")
        pipe = subprocess.PIPE
        return subprocess.Popen(arguments, cwd=folder, env=environment(), stdout=pipe, stderr=pipe, text=True)

    pause = random.Random(7).uniform(0.0, 0.2)
    first = start()
    kill_when(first, lambda: (saves / "latest").is_file() and time.sleep(pause) is None)
    position = checkpoints.read_state(checkpoints.latest(saves))["samples_seen"]
    second = start()
    kill_when(second, lambda: any(p.name > f".saving_step_{position // 8:08d}" for p in saves.glob(".saving_*")))
    checkpoints.verify(checkpoints.latest(saves))
    done = train(folder, "runs=killed")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_equal_runs(whole, run)


def test_sigterm_saves_and_stops_and_goes_on(undisturbed):
    folder, whole = undisturbed
    run = folder / "stopped/mini/seed1"
    process = subprocess.Popen(
        command("runs=stopped", "every.save=1000"), cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    lines = run / "metrics.jsonl"
    while process.poll() is None and not (lines.is_file() and lines.stat().st_size > 300):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM and "the same command continues" in errors
    assert checkpoints.latest(run / "checkpoints") is not None
    assert train(folder, "runs=stopped", "every.save=1000").returncode == 0
    assert_equal_runs(whole, run)


def test_from_a_damaged_checkpoint_the_one_before_is_continued_and_told(undisturbed):
    folder, whole = undisturbed
    run = folder / "damaged/mini/seed1"
    shutil.copytree(whole, run, symlinks=True)
    (run / "validation.json").unlink()
    latest = checkpoints.latest(run / "checkpoints")
    file = next((latest / "weights").iterdir())
    file.write_bytes(file.read_bytes()[:-10])
    refused = train(folder, "runs=damaged", f"resume={latest}")
    assert refused.returncode == 2 and file.name in refused.stderr and len(refused.stderr.splitlines()) == 1
    earlier = Path(refused.stderr.split("resume=")[1].split()[0])
    done = train(folder, "runs=damaged")
    told = [line for line in done.stderr.splitlines() if line.startswith("vgr-train: warning: ")]
    assert done.returncode == 0 and len(told) == 1 and file.name in told[0] and earlier.name in told[0]
    assert_equal_runs(whole, run)
    best = checkpoints.resolve(run / "checkpoints/best")
    losses = [line["val/loss"] for line in metrics(run) if "val/loss" in line]
    assert checkpoints.validation_loss(best) == min(losses)


def test_micro_batches_change_nothing_but_rounding(undisturbed):
    """The same global batches, noise and dropout in halves: losses agree to fp32 rounding over the first steps."""
    folder, whole = undisturbed
    assert train(folder, "runs=halves", "data.micro_batch=2").returncode == 0
    a, b = metrics(whole), metrics(folder / "halves/mini/seed1")
    first = [(x["train/loss"], y["train/loss"]) for x, y in zip(a, b) if "train/loss" in x][:5]
    assert all(x == pytest.approx(y, rel=1e-4) for x, y in first)

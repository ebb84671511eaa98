"""Two ranks take the steps of one: same batches, noise and dropout, so the same losses and weights to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vgr.training import checkpoints

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from small_training import command, environment, make_project, metrics, train  # noqa: E402

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param(
        "gpu",
        marks=[
            pytest.mark.multigpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_two_ranks_equal_one(tmp_path, device):
    folder = make_project(tmp_path)
    on = (f"trainer.accelerator={device}", "trainer.precision=32-true")
    assert train(folder, "runs=one", *on).returncode == 0
    arguments = command("runs=two", *on, "trainer.devices=2", "trainer.strategy=ddp", "data.micro_batch=2")
    done = subprocess.run(arguments, cwd=folder, env={**os.environ, **environment()}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = folder / "one/mini/seed1", folder / "two/mini/seed1"
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-4) for k in a)
    single, double = (checkpoints.read_weights(checkpoints.latest(r / "checkpoints")) for r in (one, two))
    assert all(torch.allclose(single[k], double[k], atol=1e-4) for k in single)

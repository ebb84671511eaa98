"""Two ranks take the steps of one: same batches, noise and dropout, so the same losses and weights to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vgr.training import checkpoints

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from small_training import PRESET, command, environment, make_project, metrics, train  # noqa: E402

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


# Self-forcing from that run and with it as the teacher: two networks and a judge, a backward pass for each chunk.
FORCING = PRESET.replace("defaults:\n", "defaults:\n  - override /training: self_forcing\n").replace(
    "max_samples: 160, warmup_samples: 16, ",
    "max_samples: 48, critic_steps: 2, chunk: 2, adversarial: 0.01, "
    "judge: {_target_: vgr.models.critic.Judge, width: 32, layers: [0, 1], inner: 16, heads: 2}, ",
) + "student_times: [1.0, 0.75, 0.0]\ninit_from: one/mini/seed1\nteacher: one/mini/seed1\n"


@pytest.mark.parametrize("preset", ["mini", "forcing"])
@pytest.mark.parametrize("device", DEVICES)
def test_two_ranks_equal_one(tmp_path, device, preset):
    folder = make_project(tmp_path)
    (folder / "own/experiments/forcing.yaml").write_text(FORCING)
    on = (f"trainer.accelerator={device}", "trainer.precision=32-true")
    for name in dict.fromkeys(("mini", preset)):
        assert train(folder, "runs=one", f"experiments={name}", *on).returncode == 0
    two = (f"experiments={preset}", "runs=two", "trainer.devices=2", "trainer.strategy=ddp", "data.micro_batch=2")
    arguments = [*command()[:-1], *two, *on]
    done = subprocess.run(arguments, cwd=folder, env={**os.environ, **environment()}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = folder / f"one/{preset}/seed1", folder / f"two/{preset}/seed1"
    for a, b in zip(metrics(one), metrics(two), strict=True):
        alike = {k: a[k] for k in a if not k.endswith("_ratio")}  # of a micro-batch's spread, which depends on its size
        assert a.keys() == b.keys() and alike == pytest.approx({k: b[k] for k in alike}, rel=1e-3, abs=1e-4)
    single, double = (checkpoints.read_weights(checkpoints.latest(r / "checkpoints")) for r in (one, two))
    # Self-forcing's many backward passes: Adam turns the rounding of a gradient near zero into a part of a step (3e-3).
    bound = {"mini": 1e-4, "forcing": 3e-4}[preset]
    assert all(torch.allclose(single[k], double[k], atol=bound) for k in single)

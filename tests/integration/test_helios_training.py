"""The warp adapter's base by the usual command: trains, resumes to the same weights, is rebuilt and makes videos."""

import json

import numpy as np
import pytest
import torch
from small_training import make_project, metrics, train

SMALL = [
    "experiments=warp_adapter/base_tiny", "shards=shards", "trainer.accelerator=cpu", "data.val_clips=8",
    "codec={stride: [4, 8, 8], luma: [4], chroma: [0], latents_mean: null, latents_std: null}", "text.length=16",
    "model={in_channels: 16, heads: 2, head_dim: 12, layers: 2, text_length: 16, "
    "options: {ffn_dim: 32, rope_dim: [4, 4, 4]}}",
    "training={chunk: 2, global_batch: 8, max_samples: 48, warmup_samples: 8}",
    "every={log: 8, validate: 24, save: 24}", "sampling.steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("helios"))
    done = train(folder, *SMALL)
    assert done.returncode == 0, done.stderr
    return folder


def run_of(project):
    return next((project / "runs" / "warp_adapter").glob("*/seed1"))


def test_it_is_measured_by_what_history_is_worth(project):
    summary = json.loads((run_of(project) / "validation.json").read_text())["summary"]
    assert {"val/loss_stage0", "val/loss_stage1", "val/gain_over_no_history_low"} <= summary.keys()


def test_resumed_weights_and_other_micro_batches_are_the_same(project, tmp_path):
    from vgr.training import checkpoints

    whole = checkpoints.read_weights(checkpoints.resolve(run_of(project)), "weights")
    other = make_project(tmp_path)
    assert train(other, *SMALL, "data.micro_batch=2").returncode == 0
    for mine, own in zip(metrics(run_of(other)), metrics(run_of(project)), strict=True):
        assert mine == pytest.approx(own, rel=1e-3, abs=1e-4)
    first = sorted((run_of(project) / "checkpoints").glob("step_*"))[0].relative_to(project)
    assert train(project, *SMALL, f"resume={first}").returncode == 0
    again = checkpoints.read_weights(checkpoints.resolve(run_of(project)), "weights")
    assert checkpoints.tensors_hash(again) == checkpoints.tensors_hash(whole)


def test_generator_rolls_out_chunk_by_chunk(project):
    from vgr.generator import Generator
    from vgr.types import Cameras

    generator = Generator.load(run_of(project), device="cpu")
    cameras = Cameras(torch.eye(4).expand(1, 17, 4, 4), torch.ones(1, 17, 4))
    first = np.full((1, 32, 32, 3), 90, np.uint8)
    videos, _ = generator(first, cameras, (("a room",),), [3])
    assert videos.shape == (1, 17, 32, 32, 3) and generator.calls(17) == 2
    assert np.abs(videos[:, 0].astype(int) - 90).max() <= 3  # its first frame is the given one
    again, _ = generator(first, cameras, (("a room",),), [3])
    assert (videos == again).all()
    assert generator(None, cameras, (("a room",),), [3])[0].shape == videos.shape

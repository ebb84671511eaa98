"""Golden losses: the first steps of the tiny preset on procedural clips. A change here is a change of numerics and
belongs into CHANGELOG.md; regenerate with `python -m tests.numerics.test_golden`."""


import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from vgr import command
from vgr.data.modules import collate
from vgr.data.prepare import encode
from vgr.data.shards import Sample
from vgr.data.worlds import WorldSource
from vgr.seeding import derive_seed

GOLDEN = [1.78133, 1.72016, 1.63556, 1.52984]


def losses() -> list[float]:
    cfg = command.compose("train", ["experiments=world_model/tiny"])
    codec = instantiate(cfg.codec)
    torch.manual_seed(derive_seed(1, "init"))
    text, model = instantiate(cfg.text), instantiate(cfg.model)
    module = instantiate(cfg.training, model=model, text=text, codec=codec, seed=1)
    source = WorldSource(frames=33, size_hw=(48, 64))
    clips = [clip for visit in range(2) for clip in source.capture(1, "train", visit)][:4]
    samples = [
        Sample(x.astype(np.float32), c.c2w, c.intrinsics, c.fps, {"shots": c.shots}, f"clip{i}")
        for i, (c, x) in enumerate((c, encode(codec, c.frames[None])[0]) for c in clips)
    ]
    optimizer = module.configure_optimizers()
    found = []
    for step in range(4):
        batch = collate(samples, [4 * step + i for i in range(len(samples))])
        loss = module.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def test_first_steps_of_the_tiny_preset():
    # Threads and processors round differently; anything beyond is another model, other data or other noise.
    assert losses() == pytest.approx(GOLDEN, rel=2e-3)


if __name__ == "__main__":
    print([round(x, 5) for x in losses()])

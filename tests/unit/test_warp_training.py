"""Adapters beside warps: what is trained, under which past, and that reading warps is learnt."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.unit.tiny_helios import helios
from vgr.diffusion.objectives import next_chunk
from vgr.diffusion.pyramid import pyramid_flow
from vgr.models.causal_video import CausalVideo
from vgr.nn import lora
from vgr.training.warp_adapter import WarpAdapterTraining, past
from vgr.types import Cameras, TextStates, VideoBatch, Warp

STRIDE, FRAMES, GRID, CHANNELS, CHUNK = (2, 8, 8), 9, (8, 8), 16, 4
CODEC = SimpleNamespace(stride=STRIDE, clip=None)
TARGETS = {"helios": ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"], "causal": ["attn.qkv", "attn.proj"]}


class Text(torch.nn.Module):
    width = 32

    def forward(self, captions):
        return TextStates(torch.ones(len(captions), 1, 6, 32), torch.ones(len(captions), 1, 6, dtype=torch.bool))


def base(kind):
    if kind == "helios":
        return helios(stage_times=[999.0, 500.0, 0.999], truncate_times=False)
    torch.manual_seed(0)
    model = CausalVideo(CHANNELS, 32, 2, 2, 64, 32, 6)
    torch.nn.init.normal_(model.final.weight, std=0.2)
    return model


def objective(kind, batch=2):
    if kind == "helios":
        return partial(pyramid_flow, global_batch=batch, ratio=(1, 0), text=0.0, corruption=0.0, fill=False)
    return partial(next_chunk, shift=5.0, global_batch=batch)


def training(kind, batch=2, **settings):
    model = base(kind)
    lora.add(model, 4, 4, TARGETS[kind])
    plain = dict(seed=1, global_batch=batch, max_samples=100, chunk=CHUNK, text_dropout=0.0, lr=3e-3, ema_half_life=1.0)
    return WarpAdapterTraining(model, Text().requires_grad_(False), CODEC, objective=objective(kind, batch),
                               **{**plain, **settings})  # fmt: skip


def clips(batch=2, first=0):
    """Latents that jump from frame to frame, which no past foretells, and warps that show them but for a corner."""
    g = torch.Generator().manual_seed(7)
    latents = torch.randn(batch, CHANNELS, FRAMES, 1, 1, generator=g).expand(-1, -1, -1, *GRID).clone()
    count = 1 + (FRAMES - 1) * STRIDE[0]
    visible = torch.ones(batch, count, *(n * 8 for n in GRID), dtype=torch.bool)
    visible[:, :, :16, :16] = False
    c2w = torch.eye(4).expand(batch, count, 4, 4)
    cameras = Cameras(c2w, torch.ones(batch, count, 4))
    return VideoBatch(latents, cameras, torch.full((batch,), 8.0), (("",),) * batch,
                      torch.zeros(batch, FRAMES, dtype=torch.int64), tuple("ab"[:batch]),
                      torch.arange(first, first + batch), Warp(latents.clone(), visible))  # fmt: skip


@pytest.mark.parametrize("kind", TARGETS)
def test_adapters_start_without_effect_and_alone_are_trained(kind):
    module, batch = training(kind), clips()
    found = module.validate([batch])
    assert torch.equal(found.loss_N3[:, 1], found.loss_N3[:, 2])
    assert (found.loss_N3[:, 0] != found.loss_N3[:, 1]).all()  # the frozen model reads the warp already
    module._sample_losses(batch).mean().backward()
    graded = {name for name, p in module.named_parameters() if p.grad is not None}
    assert graded == {name for name, p in module.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in graded)
    assert set(module.weights()) == {name for name in graded if name.startswith("model.")}


@pytest.mark.parametrize("kind", TARGETS)
def test_reading_warps_is_learnt(kind):
    """Frames that nothing else foretells: adapters trained on them beat the frozen model with and without a warp."""
    module = training(kind)
    optimizer = torch.optim.Adam([p for p in module.model.parameters() if p.requires_grad], 1e-2)
    for step in range(60):
        optimizer.zero_grad()
        module._sample_losses(clips(first=2 * step)).mean().backward()
        optimizer.step()
    module.ema["model"].load_state_dict(module.model.state_dict())
    told = module.validate([clips()]).metrics()
    assert told["val/loss"] < 0.9 * min(told["val/loss_frozen"], told["val/loss_zero_shot"]), told


@pytest.mark.parametrize("kind", TARGETS)
def test_losses_are_functions_of_positions(kind):
    """Samples one by one are those of the batch, and a restart's are the run's."""
    module, both = training(kind), clips(first=6)
    whole = module._sample_losses(both)
    parts = []
    for i in range(2):
        row = slice(i, i + 1)
        warp = Warp(both.warp.latents[row], both.warp.visible[row])
        parts.append(module._sample_losses(VideoBatch(
            both.latents[row], Cameras(both.cameras.c2w[row], both.cameras.intrinsics[row]), both.fps[row],
            both.captions[row], both.shot[row], both.keys[row], both.position[row], warp)))  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)
    assert not torch.equal(module._sample_losses(clips(first=8)), whole)
    with pytest.raises(ValueError, match="global batches"):
        module._sample_losses(clips(first=7))


def test_the_past_is_committed_by_the_frozen_model():
    module, batch = training("causal"), clips()
    cond = module._cond(module.text, batch.captions, batch)
    before = past(module.model, batch.latents[:, :, :5], cond)
    with torch.no_grad():
        for name, p in module.model.named_parameters():
            if ".lora_B" in name:
                p.normal_()
    after = past(module.model, batch.latents[:, :, :5], cond)
    frozen = past(base("causal"), batch.latents[:, :, :5], cond)
    for other in (after, frozen):
        for a, b in zip(before.blocks, other.blocks, strict=True):
            assert all(torch.equal(x.k, y.k) and torch.equal(x.v, y.v) for x, y in zip(a.layers, b.layers, strict=True))


def test_the_first_chunk_is_given_its_first_frame_and_late_times_alone():
    batch, chunk_T, seen = clips(), torch.tensor([0] * 5 + [1] * 4), set()
    for number in range(40):
        noised = next_chunk(batch.latents, torch.tensor([2 * number, 2 * number + 1]), chunk_T, 1, shift=5.0,
                            global_batch=2, from_time=0.74)  # fmt: skip
        seen.add(noised.frames)
        first = noised.frames == (0, 5)
        assert noised.context.shape[2] == noised.frames[0]
        assert (noised.t[:, 0] == 0).all() == first and (noised.weight[:, 0] == 0).all() == first
        assert noised.t[:, 1:].min() >= 0.74 and noised.t.max() <= 1
    assert seen == {(0, 5), (5, 9)}


def test_shards_without_warps_are_refused():
    batch = clips()
    plain = VideoBatch(batch.latents, batch.cameras, batch.fps, batch.captions, batch.shot, batch.keys, batch.position)
    with pytest.raises(ValueError, match="hold no warps; give data.video"):
        training("causal")._sample_losses(plain)

"""Dropped history tokens are in no layer (warp adapter, spec 8.1): equalities on a tiny random Helios, fp32."""

import copy
import dataclasses

import pytest
import torch
from tiny_helios import conditioning, helios

from vgr.diffusion.pyramid import history_blocks
from vgr.types import HistoryBlock, TextStates

GRIDS = {"prefix": (1, 4, 8), "short": (1, 4, 8), "mid": (1, 2, 4), "long": (4, 1, 2)}


@pytest.fixture(scope="module")
def model():
    return helios()


def latents(frames, batch=2, seed=5, size=(8, 16)):
    return torch.randn(batch, 16, frames, *size, generator=torch.Generator().manual_seed(seed))


def evidence(batch=2, keep=None, frames=9, first=40, **changes):
    """Aligned frames at the target's positions."""
    return HistoryBlock(latents(frames, batch, 9), torch.arange(first, first + frames), "short", keep, **changes)


def history(batch=2):
    past = latents(20, batch)
    return history_blocks(past, 40, past[:, :, :1])


def run(model, blocks, batch=2, x=None, **fields):
    cond = conditioning(batch, history=tuple(blocks), **fields)
    x = latents(9, batch, 3, (2, 4)) if x is None else x
    return model(x, torch.full(x.shape[:1] + x.shape[2:3], 0.5), cond)[0]


def keeping(blocks, share, seed=0, equal=True):
    """Blocks with a random keep each; equal: the same for all samples."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for block in blocks:
        t = block.latents.shape[2] if block.tier in ("short", "prefix") else GRIDS[block.tier][0]
        keep = torch.rand(1 if equal else len(block.latents), t, *GRIDS[block.tier][1:], generator=g) < share
        made.append(dataclasses.replace(block, keep=keep))
    return made


def test_keeping_all_is_the_stock_model_bit_for_bit(model):
    blocks = [*history(), evidence()]
    stock = run(model, blocks)
    assert torch.equal(run(model, keeping(blocks, 2.0)), stock)
    assert not model.transformer.blocks[0]._forward_pre_hooks


def test_whole_short_frames_dropped_are_frames_left_out(model):
    keep = torch.ones(2, 9, 4, 8, dtype=torch.bool)
    keep[:, [1, 4, 5]] = False
    whole, left = evidence(keep=keep), [0, 2, 3, 6, 7, 8]
    out = HistoryBlock(whole.latents[:, :, left], whole.position[left], "short")
    assert torch.equal(run(model, [*history(), whole]), run(model, [*history(), out]))
    nothing = dataclasses.replace(whole, keep=torch.zeros_like(keep))
    assert torch.equal(run(model, [*history(), nothing]), run(model, history()))


@pytest.mark.parametrize("tier", ["mid", "long"])
def test_a_tier_dropped_is_a_tier_left_out(model, tier):
    blocks = history()
    none = torch.zeros(1, *GRIDS[tier], dtype=torch.bool)
    dropped = [dataclasses.replace(b, keep=none) if b.tier == tier else b for b in blocks]
    assert torch.equal(run(model, dropped), run(model, [b for b in blocks if b.tier != tier]))


def test_any_tokens_dropped_equal_keys_at_minus_infinity(model):
    blocks = keeping([*history(), evidence()], 0.6)
    dropped = run(model, blocks)
    order = sorted(blocks, key=lambda b: ("long", "mid", "prefix", "short").index(b.tier))
    keep = torch.cat([b.keep.flatten() for b in order])
    n = 9 * 1 * 2
    mask = torch.cat([keep, torch.ones(n, dtype=torch.bool)])[None, None, None]
    processors = [block.attn1.processor for block in model.transformer.blocks]

    def masked(processor):
        def call(attn, hidden, text, attention_mask, rotary, length):
            return processor(attn, hidden, text, mask.expand(1, 1, hidden.shape[1], -1), rotary, length)

        return call

    try:
        for block, processor in zip(model.transformer.blocks, processors):
            block.attn1.processor = masked(processor)
        expected = run(model, [dataclasses.replace(b, keep=None) for b in blocks])
    finally:
        for block, processor in zip(model.transformer.blocks, processors):
            block.attn1.processor = processor
    assert not torch.allclose(dropped, run(model, [dataclasses.replace(b, keep=None) for b in blocks]), atol=1e-3)
    assert (dropped - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())


def test_latents_under_dropped_tokens_do_not_matter(model):
    keep = torch.rand(1, 9, 4, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    block = evidence(keep=keep)
    cells = keep.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None]
    other = dataclasses.replace(block, latents=torch.where(cells, block.latents, 1e3))
    assert torch.equal(run(model, [*history(), block]), run(model, [*history(), other]))


@pytest.mark.parametrize("equal", [True, False])
def test_a_batch_equals_its_samples(model, equal):
    g = torch.Generator().manual_seed(4)
    keep = torch.rand(4, 9, 4, 8, generator=g).flatten(1)
    counts = torch.tensor([100] * 4 if equal else [100, 37, 100, 0])
    keep = (keep.argsort(1).argsort(1) < counts[:, None]).view(4, 9, 4, 8)
    blocks = [*history(4), evidence(4, keep)]
    x = latents(9, 4, 3, (2, 4))
    cond = conditioning(2, history=tuple(blocks))
    text = TextStates(cond.text.states.repeat(2, 1, 1, 1), cond.text.mask.repeat(2, 1, 1))
    layout = dataclasses.replace(cond.layout, shot=cond.layout.shot.repeat(2, 1))
    cond = dataclasses.replace(cond, text=text, layout=layout)
    together = model(x, torch.full((4, 9), 0.5), cond)[0]
    for i in range(4):
        row = slice(i, i + 1)
        own = [dataclasses.replace(b, latents=b.latents[row]) for b in blocks]
        own[-1] = dataclasses.replace(own[-1], keep=keep[row])
        one = dataclasses.replace(
            cond, history=tuple(own), text=TextStates(text.states[row], text.mask[row]),
            layout=dataclasses.replace(layout, shot=layout.shot[row]),
        )  # fmt: skip
        alone = model(x[row], torch.full((1, 9), 0.5), one)[0]
        assert (together[row] - alone).abs().max() <= 1e-6 * max(1.0, alone.abs().max().item())


def test_only_relative_positions_count_and_alignment_does(model):
    blocks = [*history(), evidence()]
    moved = [dataclasses.replace(b, position=b.position + 13 * (b.tier != "prefix")) for b in blocks]
    assert torch.equal(run(model, moved, first=53), run(model, blocks))
    behind = [*blocks[:-1], dataclasses.replace(blocks[-1], position=blocks[-1].position - 9)]
    assert (run(model, behind) - run(model, blocks)).abs().max() > 1e-2


def test_small_stages_can_stand_on_the_full_grid(model):
    """With positions spread, a target cell is nearest to the history it covers; the last stage is as released."""
    spread = helios(spread_stages=True)
    lines = []
    for stage, size in ((0, (2, 4)), (2, (8, 16))):
        x = latents(9, 2, 3, size)
        own, other = (run(m, history(), x=x, stage=stage) for m in (model, spread))
        assert torch.equal(own, other) == (stage == 2)
        lines.append(spread.transformer.rope._get_spatial_meshgrid(size[0] // 2, size[1] // 2, "cpu"))
    assert lines[0][0].flatten().tolist() == [1.5, 1.5] and lines[0][1].flatten().tolist() == [1.5, 5.5]
    assert torch.equal(lines[1][1][0], torch.arange(8.0))
    assert copy.deepcopy(spread)._grid is not spread._grid


def test_hooks_go_with_the_call_also_after_an_error(model):
    blocks = keeping([*history(), evidence()], 0.5)
    broken = model.transformer.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, blocks)
    broken.remove()
    assert not any(block._forward_pre_hooks for block in model.transformer.blocks)


def test_gradients_are_the_same_when_blocks_are_made_again():
    blocks = keeping([*history(), evidence()], 0.5, equal=False)
    made = []
    for again in (False, True):
        model = helios(activation_checkpointing=again)
        own = [dataclasses.replace(b, latents=b.latents.clone().requires_grad_()) for b in blocks]
        v = run(model, own)
        v.square().mean().backward()
        made.append([v.detach(), *(p.grad for p in model.parameters()), *(b.latents.grad for b in own)])
    for plain, checkpointed in zip(*made):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)


def test_refusals(model):
    short, mid = (next(b for b in history() if b.tier == tier) for tier in ("short", "mid"))
    half = dataclasses.replace(mid, latents=mid.latents[:, :, :1], position=mid.position[:1])
    for blocks, words in (
        ([mid], "give their grid"),
        ([short, half, mid], "multiple of 2"),
        ([dataclasses.replace(short, keep=torch.ones(1, 1, 3, 8, dtype=torch.bool))], r"tokens, \(2, 1, 4, 8\)"),
    ):
        with pytest.raises(ValueError, match=words):
            run(model, blocks)
    with pytest.raises(ValueError, match="stages 0 to 2"):
        run(model, [], stage=3)
    with pytest.raises(ValueError, match="pyramid.Streamed"):
        model(latents(9, 2, 3, (2, 4)), torch.full((2, 9), 0.5), conditioning(), commit=True)

"""Packed attention in one fused product: the blocks it walks, and the same outputs and gradients as chunk by chunk."""

import dataclasses

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_block_mask

from tests.float64 import Float64, wide  # noqa: F401
from tests.unit.test_causal_video import FRAMES, POLICIES, cached, close, make_clips, random_model
from vgr.models.causal_video import CausalVideo
from vgr.nn import causal_attention
from vgr.nn.flex import frame_attention, frame_mask
from vgr.types import Conditioning, Layout, TextStates


def unequal(cond):
    """The same frames in chunks of one, five, two, ... and a short last."""
    sizes = torch.tensor([1, 5, 2, 3, 3, 4, 3, 1])
    chunk = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    shot = torch.stack([(chunk >= 2).long() + (chunk >= 6), (chunk >= 3).long() + (chunk >= 4)])
    return dataclasses.replace(cond, layout=dataclasses.replace(cond.layout, chunk=chunk, shot=shot))


@pytest.fixture
def backward_on_cpu(monkeypatch):
    """Torch refuses a backward pass on a CPU, where its kernels have none; the plain form it falls back on has one."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("cells", [3, 50, 128, 200])
def test_the_blocks_are_those_of_the_token_mask(cells):
    generator = torch.Generator().manual_seed(cells)
    seen = torch.rand(2, 9, 13, generator=generator) < 0.4
    seen[0, 2:6, 3:9] = True
    ours = frame_mask(seen, cells)
    rule = create_block_mask(
        lambda b, h, q, k: seen[b, q // cells, k // cells], 2, None, 9 * cells, 13 * cells, device="cpu"
    )
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, expected = (getattr(mask, f"{name}_num_blocks") for mask in (ours, rule))
        assert torch.equal(counts, expected)
        indices, right = (getattr(mask, f"{name}_indices") for mask in (ours, rule))
        used = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(indices[used], right[used])
    assert ours.seq_lengths == rule.seq_lengths and ours.BLOCK_SIZE == rule.BLOCK_SIZE
    q, k, v = (torch.randn(2, n, cells, 3, 16, generator=generator) for n in (9, 13, 13))
    with torch.no_grad():
        torch._dynamo.reset()
        out = frame_attention(q, k, v, ours)
    dense = seen.repeat_interleave(cells, 1).repeat_interleave(cells, 2)[:, None]
    flat = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=dense).transpose(1, 2)
    close(out.flatten(1, 2), expected.nan_to_num())


@pytest.mark.slow
def test_a_kernel_that_walks_the_blocks_gives_the_same():
    """Compiled, here for the CPU: what eager scores show of the rule, this shows of the lists of blocks."""
    own, role = (torch.arange(12) // 3).repeat(2), torch.arange(24) // 12
    older = (role == 0) & (own < own[:, None])
    seen = (older | ((own == own[:, None]) & (role == role[:, None]))).repeat(2, 1, 1)
    q, k, v = torch.randn(3, 2, 3, 24 * 60, 16, generator=torch.Generator().manual_seed(0))
    dense = seen.repeat_interleave(60, 1).repeat_interleave(60, 2)[:, None]
    with torch.no_grad():
        out = torch.compile(torch_flex.flex_attention)(q, k, v, block_mask=frame_mask(seen, 60))
    close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense))


@pytest.mark.parametrize("layout", ["thirds", "unequal"])
@pytest.mark.parametrize("name", POLICIES)
def test_outputs_and_gradients_are_those_of_chunk_by_chunk(backward_on_cpu, wide, name, layout):  # noqa: F811
    """In float64: in fp32 either form's gradients of queries that hardly choose are 1.5e-5 of their range off."""
    x, noisy, t, cond = make_clips()
    cond = cond if layout == "thirds" else unequal(cond)
    times = t[:, :1] + 0.03 * cond.layout.chunk
    found = []
    for backend in ("torch", "flex"):
        with Float64():
            model = random_model(layers=2, **POLICIES[name], attention_backend=backend)
            out, _ = model(torch.cat([x, noisy], 2), torch.cat([0 * t, times], 1), cond.packed())
            loss = out[:, :, FRAMES:].square().sum()
            found.append((out.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    for ours, theirs in zip(found[1], found[0]):
        assert ours.dtype == torch.float64
        close(ours, theirs, 1e-11)


@pytest.mark.parametrize("name", POLICIES)
def test_gradients_of_blocks_computed_twice_are_the_same_to_the_bit(backward_on_cpu, name):
    x, noisy, t, cond = make_clips()
    cond, model, found = unequal(cond), random_model(layers=2, **POLICIES[name], attention_backend="flex"), []
    times = t[:, :1] + 0.03 * cond.layout.chunk
    for model.activation_checkpointing in (False, True):
        out, _ = model(torch.cat([x, noisy], 2), torch.cat([0 * t, times], 1), cond.packed())
        found.append(torch.autograd.grad(out[:, :, FRAMES:].square().sum(), list(model.parameters())))
    assert all(torch.equal(once, twice) for once, twice in zip(*found))


@pytest.mark.parametrize("name", POLICIES)
def test_outputs_in_fp32_are_those_of_chunk_by_chunk(name):
    x, noisy, t, cond = make_clips()
    models = [random_model(layers=2, **POLICIES[name], attention_backend=backend) for backend in ("torch", "flex")]
    torch._dynamo.reset()
    with torch.no_grad():
        given = torch.cat([x, noisy], 2), torch.cat([0 * t, t], 1), cond.packed()
        expected, actual = (model(*given)[0] for model in models)
    close(actual, expected)


@pytest.mark.parametrize("name", ["full", "shot sink", "routed"])
def test_chunks_that_read_each_other_as_they_are_too(name):
    """Not packed: frames of one role, each chunk over those before it in the same call."""
    x, _, t, cond = make_clips()
    models = [random_model(**POLICIES[name], attention_backend=backend) for backend in ("torch", "flex")]
    torch._dynamo.reset()
    with torch.no_grad():
        expected, actual = (model(x, t, cond)[0] for model in models)
    close(actual, expected)


def test_the_mask_is_the_rule_written_out():
    """Window 2 with a sink of two frames and, in each sample, of its own shot's first: pair by pair of frames."""
    _, _, _, cond = make_clips()
    model = random_model(window=2, sink=2, shot_sink=1, relative=False, attention_backend="flex")
    layout = cond.layout.packed()
    kept = []
    model.blocks[0].attn.register_forward_pre_hook(lambda m, args: kept.append(args[1].mask))
    with torch.no_grad():
        model(torch.randn(2, 4, 2 * FRAMES, 4, 6), torch.zeros(2, 2 * FRAMES), cond.packed())
    b, q, k = torch.meshgrid(torch.arange(2), *[torch.arange(2 * FRAMES)] * 2, indexing="ij")
    own, role, position = layout.chunk, layout.role, layout.position
    clean = torch.tensor([[min(p for p, s in enumerate(row[:FRAMES].tolist()) if s == shot) for shot in row.tolist()]
                          for row in layout.shot])  # fmt: skip
    near = (own[k] >= own[q] - 2) | (position[k] < 2) | (position[k] == clean[b, q])
    older = (role[k] == 1) & (own[k] < own[q]) & near
    expected = older | ((own[k] == own[q]) & (role[k] == role[q]))
    assert torch.equal(kept[0].mask_mod(b, None, q * 6 + 5, k * 6), expected)


def test_only_calls_of_several_chunks_without_a_memory_are_fused(monkeypatch):
    """Streaming takes one chunk at a time, where nothing is hidden: the same numbers by the same path."""
    x, noisy, t, cond = make_clips()
    monkeypatch.setattr(causal_attention, "frame_attention", None)
    outputs = []
    for backend in ("torch", "flex"):
        model = random_model(window=1, routed=2, attention_backend=backend)
        with torch.no_grad():
            outputs.append(cached(model, x, noisy, t, cond)[0])
            whole = dataclasses.replace(cond, layout=dataclasses.replace(cond.layout, chunk=0 * cond.layout.chunk))
            model(x, t, whole)
    assert torch.equal(*outputs)


def test_a_gradient_on_a_cpu_is_refused():
    model = CausalVideo(4, width=32, heads=2, layers=1, ffn_width=32, text_width=8, text_length=4,
                        attention_backend="flex")  # fmt: skip
    cond = Conditioning(Layout.chunked(1, 7, 3), TextStates(torch.randn(1, 1, 2, 8), torch.ones(1, 1, 2).bool()))
    with pytest.raises(ValueError, match="attention_backend=flex has no backward pass on cpu: use torch"):
        model(torch.randn(1, 4, 14, 4, 4), torch.zeros(1, 14), cond.packed())

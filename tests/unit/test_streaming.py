"""The chunk-causal world model: masked in one call and streaming chunk by chunk are the same function."""

import dataclasses

import pytest
import torch

from tests.unit.test_world_model import _inputs, _model
from vgr.nn.attention import Chunks, DualAttention, SoftmaxMemory
from vgr.types import Layout

FRAMES, CHUNK = 11, 3
VARIANTS = [
    {},
    {"window": 1, "sink": 1},
    {"window": 0},
    {"window": 1, "sink": 2, "cam_filter_isolated": True},
    {"mixer": "linear", "softmax_every": 0},
    {"cam_renorm_gdn": True, "softmax_bf16": True},
]


def _chunked(frames=FRAMES, **changes):
    model = _model(layers=3, **changes)
    x, t, cond = _inputs("orbit", frames)
    cond = dataclasses.replace(cond, layout=Layout.chunked(2, frames, CHUNK))
    t = torch.rand(2, frames, generator=torch.Generator().manual_seed(3))
    return model, x, t, cond


def _ends(cond):
    sizes = cond.layout.chunk.bincount().tolist()
    return [sum(sizes[: i + 1]) for i in range(len(sizes))]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("camera", [True, False])
def test_streaming_equals_masked(changes, camera):
    model, x, t, cond = _chunked(**changes)
    cond = cond if camera else dataclasses.replace(cond, cameras=None)
    with torch.no_grad():
        masked, _ = model(x, t, cond)
        state, start = model.new_state(), 0
        for end in _ends(cond):
            part = (x[:, :, start:end], t[:, start:end], cond.frames(start, end))
            asked, same = model(*part, state)
            assert same is state
            v, state = model(*part, state, commit=True)
            assert torch.equal(asked, v)
            # Chunk and whole round to bfloat16 in an order of their own, which the processor chooses: half its spacing.
            scale = 2**-9 if model.blocks[-1].attn.softmax_bf16 else 1e-5
            torch.testing.assert_close(v, masked[:, :, start:end], atol=scale * float(masked.abs().max()), rtol=0)
            start = end
    assert state.frames == FRAMES and start == FRAMES


@pytest.mark.parametrize("sink,window", [(0, None), (1, 1), (0, 0), (2, 0), (0, 2)])
def test_softmax_blocks_read_sink_window_and_own_chunk(sink, window):
    """Against one product under a dense mask built from the rule, key by key."""
    g = torch.Generator().manual_seed(0)
    attention = DualAttention(16, 2, "softmax", sink=sink, window=window)
    sizes, cells = (4, 1, 3, 2), 3
    q, k, v = (torch.randn(2, 10, cells, 2, 8, generator=g) for _ in range(3))
    owner = torch.arange(4).repeat_interleave(torch.tensor(sizes)).repeat_interleave(cells)
    query, key = owner[:, None], owner[None]
    reach = torch.full_like(key, True).bool() if window is None else key >= query - window
    mask = (key <= query) & ((key < sink) | reach)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=0.3
    )
    stored = [attention._stored(x) for x in (k, v)]
    actual = attention._attend(q, *stored, 0.3, Chunks((0, 1, 2, 3), sizes), (), [])
    torch.testing.assert_close(actual.flatten(1, 2), expected.transpose(1, 2).flatten(2), atol=1e-6, rtol=1e-5)


def test_several_chunks_can_be_committed_at_once():
    model, x, t, cond = _chunked(window=1, sink=1)
    ends = _ends(cond)
    with torch.no_grad():
        masked, _ = model(x, t, cond)
        cut, state, parts = ends[1], model.new_state(), []
        for part in (slice(0, cut), slice(cut, FRAMES)):
            v, state = model(x[:, :, part], t[:, part], cond.frames(part.start, part.stop), state, commit=True)
            parts.append(v)
    torch.testing.assert_close(torch.cat(parts, 2), masked, atol=1e-5 * float(masked.abs().max()), rtol=0)


@pytest.mark.parametrize("changes", [{}, {"window": 1, "sink": 1}], ids=str)
def test_the_future_is_not_seen_and_the_own_chunk_is(changes):
    model, x, t, cond = _chunked(**changes)
    end = _ends(cond)[1]
    with torch.no_grad():
        base, _ = model(x, t, cond)
        later, own = x.clone(), x.clone()
        later[:, :, end:] += 1.0
        own[:, :, end - 1] += 1.0
        after_later, after_own = model(later, t, cond)[0], model(own, t, cond)[0]
    assert torch.equal(after_later[:, :, :end], base[:, :, :end])
    first_of_chunk = _ends(cond)[0]
    assert (after_own[:, :, first_of_chunk] - base[:, :, first_of_chunk]).abs().max() > 1e-3
    assert torch.equal(after_own[:, :, :first_of_chunk], base[:, :, :first_of_chunk])


def test_one_chunk_is_the_bidirectional_model():
    model, x, t, cond = _chunked()
    whole = dataclasses.replace(cond, layout=Layout.chunked(2, FRAMES, FRAMES))
    plain = dataclasses.replace(cond, layout=Layout.whole(2, FRAMES))
    with torch.no_grad():
        assert torch.equal(model(x, t, whole)[0], model(x, t, plain)[0])


def test_gradients_of_masked_and_streaming_agree_when_the_graph_is_kept():
    model, x, t, cond = _chunked(window=1, sink=1)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    grads = []
    for streaming in (False, True):
        model.zero_grad()
        if streaming:
            state, start, parts = model.new_state(detach=False), 0, []
            for end in _ends(cond):
                v, state = model(
                    x[:, :, start:end], t[:, start:end], cond.frames(start, end), state, commit=True
                )
                parts.append(v)
                start = end
            v = torch.cat(parts, 2)
        else:
            v, _ = model(x, t, cond)
        (v * weight).sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, masked in grads[0].items():
        assert (grads[1][name] - masked).norm() <= 1e-3 * masked.norm() + 1e-5, name


def test_commits_are_detached_unless_asked():
    model, x, t, cond = _chunked()
    end = _ends(cond)[0]
    part = (x[:, :, :end], t[:, :end], cond.frames(0, end))
    for detach in (True, False):
        _, state = model(*part, model.new_state(detach=detach), commit=True)
        (attention, last), *_ = state.blocks
        assert attention.state.requires_grad != detach and last.requires_grad != detach


def test_memory_is_constant_with_a_window():
    model, x, t, cond = _chunked(frames=22, window=1, sink=1)
    sizes, state, start = [], model.new_state(), 0
    with torch.no_grad():
        for end in _ends(cond):
            _, state = model(x[:, :, start:end], t[:, start:end], cond.frames(start, end), state, commit=True)
            start = end
            softmax = [past for past, _ in state.blocks if isinstance(past, SoftmaxMemory)]
            sizes.append(sum(x.numel() for past in softmax for block in past.blocks for x in block))
    assert sizes[0] < sizes[2] and len(set(sizes[2:])) == 1


def test_states_refuse_what_does_not_continue_them():
    model, x, t, cond = _chunked()
    end = _ends(cond)[0]
    _, state = model(x[:, :, :end], t[:, :end], cond.frames(0, end), model.new_state(), commit=True)
    with pytest.raises(ValueError, match="committed 4 frames in 1 chunks"):
        model(x[:, :, :end], t[:, :end], cond.frames(0, end), state)
    with pytest.raises(ValueError, match="one whole chunk unless it commits"):
        model(x[:, :, end:], t[:, end:], cond.frames(end, FRAMES), state)
    context = dataclasses.replace(cond, layout=dataclasses.replace(cond.layout, role=torch.ones(FRAMES).long()))
    with pytest.raises(ValueError, match="packed"):
        model(x, t, context)

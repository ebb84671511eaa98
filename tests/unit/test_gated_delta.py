"""The chunked scan equals the recurrence as written, forward and backward, in float64."""

import pytest
import torch

from vgr.nn.gated_delta import delta_rule_reference, frame_states, frame_summaries


def _inputs(frames, heads=3, tokens=5, width=4, target=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    q, k = draw(frames, heads, tokens, width), 0.3 * draw(frames, heads, tokens, width)
    v = draw(frames, heads, tokens, target)
    beta = torch.sigmoid(draw(frames, heads, tokens))
    decay = torch.exp(-torch.rand(frames, heads, generator=g, dtype=torch.float64))
    return q, k, v, beta, decay


@pytest.mark.parametrize("frames", [1, 2, 3, 13])
def test_bidirectional_equals_recurrence(frames):
    q, k, v, beta, decay = (x.requires_grad_() for x in _inputs(frames))
    fast = q @ frame_states(*frame_summaries(k, v, beta, decay))[0]
    slow = delta_rule_reference(q, k, v, beta, decay) + delta_rule_reference(q, k, v, beta, decay, reverse=True)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    weight = torch.randn(fast.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = (q, k, v, beta, decay)
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in (fast, slow)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_normaliser_stream_has_target_one():
    q, k, v, beta, decay = _inputs(4)
    ones = torch.ones_like(v[..., :1])
    fast = q @ frame_states(*frame_summaries(k, None, beta, decay))[0]
    slow = delta_rule_reference(q, k, ones, beta, decay) + delta_rule_reference(q, k, ones, beta, decay, reverse=True)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


def test_scan_passes_gradcheck():
    g = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    a = torch.randn(4, 2, 3, 2, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(frame_states, (g, a))


def test_state_stays_bounded_with_scaled_keys():
    """Keys scaled by 1/sqrt(D S) keep the transition a contraction (section 3.2); unscaled keys diverge."""
    g = torch.Generator().manual_seed(0)
    frames, tokens, width = 60, 48, 16
    k = torch.relu(torch.randn(frames, 1, tokens, width, generator=g))
    v = torch.randn(frames, 1, tokens, width, generator=g)
    beta, decay = torch.full((frames, 1, tokens), 0.99), torch.full((frames, 1), 0.993)
    norms = []
    for scale in ((width * tokens) ** -0.5, 1.0):
        scan, a = frame_summaries(k * scale, v, beta, decay)
        norms.append(frame_states(scan, a)[0][-1].norm())
    assert norms[0] < 1e3
    assert not norms[1] < 1e30


def _chunked_reference(q, k, v, beta, decay, chunks):
    """Global forward recurrence; the reverse one runs inside each chunk alone (spec 3.8)."""
    out, start = delta_rule_reference(q, k, v, beta, decay), 0
    for n in chunks:
        part = slice(start, start + n)
        own = (x[part] for x in (q, k, v, beta, decay))
        out = torch.cat([out[:start], out[part] + delta_rule_reference(*own, reverse=True), out[start + n :]])
        start += n
    return out


@pytest.mark.parametrize("chunks", [(7,), (1, 6), (3, 2, 2), (1, 1, 1, 1, 1, 1, 1), (4, 3)])
def test_chunks_cut_the_reverse_scan(chunks):
    inputs = [x.requires_grad_() for x in _inputs(7)]
    q, k, v, beta, decay = inputs
    fast = q @ frame_states(*frame_summaries(k, v, beta, decay), chunks)[0]
    slow = _chunked_reference(*inputs, chunks)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    weight = torch.randn(fast.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (fast, slow))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("linear", [False, True])
def test_a_scan_continues_from_the_state_it_returned(linear):
    """Chunk by chunk equals one call, gradients through the handed-over state included."""
    q, k, v, beta, decay = _inputs(7)
    maps = frame_summaries(k, v, *((None, None) if linear else (beta, decay)))
    g, a = (None if x is None else x.requires_grad_() for x in maps)
    inputs = [x for x in (g, a) if x is not None]
    chunks, pieces, state, start = (3, 2, 2), [], None, 0
    for n in chunks:
        part = slice(start, start + n)
        read, state = frame_states(None if g is None else g[part], a[part], None, state)
        pieces.append(read)
        start += n
    whole, last = frame_states(g, a, chunks)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)
    weight = torch.randn(whole.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = [(x * weight).sum() + y.square().sum() for x, y in ((torch.cat(pieces), state), (whole, last))]
    for x, y in zip(*(torch.autograd.grad(loss, inputs) for loss in losses)):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_continued_scan_passes_gradcheck():
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    torch.manual_seed(0)
    inputs = draw(5, 2, 3, 3), draw(5, 2, 3, 2), draw(2, 3, 2)
    assert torch.autograd.gradcheck(lambda g, a, s: frame_states(g, a, (2, 3), s), inputs)


def test_without_gates_it_is_linear_attention():
    """beta = 1 and decay = 1 with the erasing part left out: every frame reads the sum over its chunk's past."""
    q, k, v, _, _ = _inputs(5)
    fast = q @ frame_states(*frame_summaries(k, v, None, None), (3, 2))[0]
    for t, end in enumerate((3, 3, 3, 5, 5)):
        expected = q[t] @ (k[:end].mT @ v[:end]).sum(0)
        torch.testing.assert_close(fast[t], expected, rtol=1e-12, atol=1e-12)

"""The chunked scan equals the recurrence as written, forward and backward, in float64."""

import pytest
import torch

from vgr.nn.gated_delta import bidirectional_states, delta_rule_reference, frame_summaries


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
    fast = q @ bidirectional_states(*frame_summaries(k, v, beta, decay))
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
    fast = q @ bidirectional_states(*frame_summaries(k, None, beta, decay))
    slow = delta_rule_reference(q, k, ones, beta, decay) + delta_rule_reference(q, k, ones, beta, decay, reverse=True)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


def test_scan_passes_gradcheck():
    g = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    a = torch.randn(4, 2, 3, 2, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(bidirectional_states, (g, a))


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
        norms.append(bidirectional_states(scan, a)[-1].norm())
    assert norms[0] < 1e3
    assert not norms[1] < 1e30

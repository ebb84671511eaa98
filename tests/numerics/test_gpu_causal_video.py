"""On a CUDA device: the causal video model's forms agree with each other and with the CPU, history in either place."""

import pytest
import torch

from tests.unit.test_causal_video import POLICIES, cached, close, make_clips, random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_fp32_forms_equal_the_cpu(name):
    torch.set_float32_matmul_precision("highest")
    x, noisy, t, cond = make_clips()
    model = random_model(**POLICIES[name])
    expected, _ = model(torch.cat([x, noisy], 2), torch.cat([0 * t, t], 1), cond.packed())
    model.cuda()
    x, noisy, t, cond = x.cuda(), noisy.cuda(), t.cuda(), cond.to("cuda")
    packed, _ = model(torch.cat([x, noisy], 2), torch.cat([0 * t, t], 1), cond.packed())
    denoised, committed, _ = cached(model, x, noisy, t, cond)
    close(packed.cpu(), expected, 1e-4)
    close(torch.cat([committed, denoised], 2).cpu(), expected, 1e-4)


@torch.no_grad()
def test_pinned_history_gives_the_same_and_leaves_the_device():
    x, noisy, t, cond = (y.to("cuda") for y in make_clips())
    here, there = (random_model(window=1, routed=2, place=place).cuda() for place in ("device", "pinned"))
    expected, _, _ = cached(here, x, noisy, t, cond)
    actual, _, state = cached(there, x, noisy, t, cond)
    close(actual, expected, 1e-5)
    places = [(kv.k.device.type, kv.k.is_pinned()) for block in state.blocks for kv in block.layers[:1]]
    assert places[:-1] == [("cpu", True)] * (len(places) - 1) and places[-1][0] == "cuda"


@torch.no_grad()
def test_bf16_weights_stay_close():
    x, noisy, t, cond = (y.to("cuda") for y in make_clips())
    model = random_model(window=1, routed=2).cuda()
    expected, _, _ = cached(model, x, noisy, t, cond)
    actual, _, _ = cached(model.bfloat16(), x, noisy, t, cond)
    assert (actual - expected).square().mean() <= 0.05 * expected.square().mean()

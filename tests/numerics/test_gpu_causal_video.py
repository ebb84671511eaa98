"""On a CUDA device: the causal video model's forms agree with each other and with the CPU, history in either place."""

import pytest
import torch

from tests.unit.test_causal_video import FRAMES, POLICIES, cached, close, make_clips, random_model, story
from vgr.models.causal_video import CausalVideo

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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_fused_packed_attention_equals_chunk_by_chunk(name, checkpointing):
    """Compiled, over blocks that are hidden, whole and in part: 198 cells a frame; outputs and gradients."""
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(1)
    x, noisy = torch.randn(2, 2, 4, FRAMES, 22, 36, device="cuda")
    cond = story().to("cuda")
    t = torch.rand(2, 1, device="cuda").expand(2, FRAMES)
    found = []
    for backend in ("torch", "flex"):
        torch.manual_seed(0)
        sizes = {"width": 96, "heads": 3, "layers": 2, "ffn_width": 96, "text_width": 10, "text_length": 9}
        model = CausalVideo(4, **sizes, **POLICIES[name], attention_backend=backend).cuda().train()
        model.activation_checkpointing = checkpointing
        for p in model.parameters():
            torch.nn.init.normal_(p, mean=0.0 if p.dim() > 1 else 0.4, std=0.15)
        out, _ = model(torch.cat([x, noisy], 2), torch.cat([0 * t, t], 1), cond.packed())
        found.append((out.detach(), *torch.autograd.grad(out[:, :, FRAMES:].square().sum(), list(model.parameters()))))
    for ours, theirs in zip(*found):
        close(ours, theirs, 1e-4)


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

"""On a CUDA device: the model gives the CPU's numbers in fp32 and stays close in bf16, forward and backward."""

import pytest
import torch

pytest.importorskip("diffusers")
from benchmarks.speed.sana_port import Inputs, from_port, make_inputs, make_port

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _both():
    model = from_port(make_port(64, 2, 4, 4, 4, 24, 8, 0))
    inputs = make_inputs(2, 4, 9, (4, 6), 24, 8, 1)
    return model, inputs, Inputs(inputs.x.cuda(), inputs.t.cuda(), inputs.cond.to("cuda"))


def test_fp32_output_and_gradient_equal_cpu():
    torch.set_float32_matmul_precision("highest")
    model, cpu, gpu = _both()
    expected = model(cpu.x, cpu.t, cpu.cond)[0]
    expected.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.cuda()
    actual = model(gpu.x, gpu.t, gpu.cond)[0]
    actual.square().mean().backward()
    assert (actual.cpu() - expected).abs().max() < 1e-4 * (expected.max() - expected.min())
    for name, p in model.named_parameters():
        assert (p.grad.cpu() - grads[name]).norm() <= 1e-3 * grads[name].norm() + 1e-6, name


def test_bf16_autocast_keeps_scans_and_times_in_fp32():
    model, cpu, gpu = _both()
    with torch.no_grad():
        expected = model(cpu.x, cpu.t, cpu.cond)[0]
        with torch.autocast("cuda", torch.bfloat16):
            actual = model.cuda()(gpu.x, gpu.t, gpu.cond)[0]
    assert actual.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(actual.cpu().flatten(), expected.flatten(), 0) > 0.999

"""Latent frames split over ranks: scan, filters, softmax blocks and the whole model are what they are on one rank."""

import dataclasses
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.unit.test_streaming import FRAMES, VARIANTS, _chunked
from vgr.nn.gated_delta import frame_states
from vgr.nn.temporal import mix_frames, symmetric_filter
from vgr.parallel.context import ContextShard
from vgr.types import Layout, TextStates

# One frame a rank, chunks on several ranks, chunks that end with a rank's frames, several chunks in a rank.
CHUNKS = [(4,), (1, 2, 1), (11,), (4, 3, 4), (2, 8, 1), (1,) * 11, (6, 5)]


def _device():
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _draw(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(_device())


def _summed(grad):
    """Over ranks; strides may differ between them, and collectives see memory only."""
    grad = grad.contiguous()
    dist.all_reduce(grad)
    return grad


def _compare(whole, split, inputs, dims, shard, total):
    """split() of this rank's slice of the inputs equals its slice of whole(); so do gradients, summed where shared.

    dims: the frame axis of each input, None for one that every rank holds. Outputs have frames in the first input's.
    """
    a, b = shard.frames(total)
    results = []
    for fn, cut in ((whole, False), (split, True)):
        own = [x.narrow(d, a, b - a) if cut and d is not None else x for x, d in zip(inputs, dims)]
        own = [x.detach().clone().requires_grad_() for x in own]
        out = fn(*own)
        weight = _draw(7, *inputs[0].shape[: dims[0]], total, *out.shape[dims[0] + 1 :])
        weight = weight.narrow(dims[0], a, b - a) if cut else weight
        grads = torch.autograd.grad((out * weight).sum(), own)
        if cut:
            grads = [_summed(grad) if d is None else grad for grad, d in zip(grads, dims)]
        results.append((out, *grads))
    for w, s, d in zip(*results, (dims[0], *dims)):
        w = w if d is None else w.narrow(d, a, b - a)
        torch.testing.assert_close(s, w, rtol=1e-11, atol=1e-12)


def check_operations(shard):
    total, rank = 7, shard.rank
    spans = [shard.frames(total, r) for r in range(shard.size)]
    assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]] and spans[0][0] == 0 and spans[-1][1] == total
    a, b = spans[rank]
    x, weight = _draw(0, 3, total, 2), _draw(1, shard.size, 3, total, 2)
    own = x[:, a:b].clone().requires_grad_()
    joined = shard.all_gather(own, 1, total)
    assert torch.equal(joined, x)
    (grad,) = torch.autograd.grad((joined * weight[rank]).sum(), own)
    torch.testing.assert_close(grad, weight.sum(0)[:, a:b])
    for reach in (1, 3, 9):
        lo, hi = max(a - reach, 0), min(b + reach, total)
        wide = shard.halo(own, reach, total)
        assert torch.equal(wide, x[:, lo:hi])
        (grad,) = torch.autograd.grad((wide * weight[rank][:, lo:hi]).sum(), own)
        expected = torch.zeros_like(x)
        for w, (start, end) in zip(weight, spans):
            read = slice(max(start - reach, 0), end + reach)
            expected[:, read] += w[:, read]
        torch.testing.assert_close(grad, expected[:, a:b])
    mine = torch.tensor(rank + 1.0, device=_device(), requires_grad=True)
    summed = shard.all_reduce(mine)
    (grad,) = torch.autograd.grad(summed * (rank + 1), mine)
    assert summed == grad == shard.size * (shard.size + 1) / 2
    c, h = _draw(2, shard.size, 2, 3, 3), _draw(3, shard.size, 2, 3, 4)
    for reverse in (False, True):
        state = torch.zeros_like(h[0])
        for r in range(shard.size - 1, rank, -1) if reverse else range(rank):
            state = c[r] @ state + h[r]
        torch.testing.assert_close(shard.prefix(c[rank], h[rank], reverse), state)


def check_scan(shard):
    for chunks in CHUNKS:
        total = sum(chunks)
        g, a = 0.5 * _draw(0, total, 2, 3, 3), _draw(1, total, 2, 3, 4)
        scan = lambda g, a, shard=None, chunks=chunks: frame_states(g, a, chunks, None, shard)[0]  # noqa: E731
        _compare(scan, lambda g, a, scan=scan: scan(g, a, shard), (g, a), (0, 0), shard, total)
        sums = lambda a, scan=scan: scan(None, a)  # noqa: E731
        _compare(sums, lambda a, scan=scan: scan(None, a, shard), (a,), (0,), shard, total)


def check_filters(shard):
    for chunks in CHUNKS:
        total = sum(chunks)
        x, taps, weight = _draw(0, 2, total, 3, 8), _draw(1, 8, 1, 4), _draw(2, 8, 8, 3, 1)
        for isolated in (False, True):
            fn = lambda x, w, s=None, c=chunks, i=isolated: symmetric_filter(x, w, c, None, i, s)  # noqa: E731
            _compare(fn, lambda x, w, fn=fn: fn(x, w, shard), (x, taps), (1, None), shard, total)
        fn = lambda x, w, s=None, c=chunks: mix_frames(x, w, c, None, s)  # noqa: E731
        _compare(fn, lambda x, w, fn=fn: fn(x, w, shard), (x, weight), (1, None), shard, total)


def check_model(shard):
    a, b = shard.frames(FRAMES)
    for changes in (*VARIANTS, {"activation_checkpointing": True}):
        plain = not changes or "mixer" in changes  # the other variants differ in what several chunks do
        for camera, chunked in ((True, True), (True, False), (False, True), (False, False))[: 4 if plain else 1]:
            model, x, t, cond = (y.to(_device()) for y in _chunked(**changes))
            model.train(changes.get("activation_checkpointing", False))
            layout = cond.layout if chunked else Layout.whole(2, FRAMES, _device())
            layout = dataclasses.replace(layout, shot=(layout.position > 5).long().expand(2, -1))
            text = TextStates(torch.cat([cond.text.states, -cond.text.states], 1), cond.text.mask.repeat(1, 2, 1))
            cond = dataclasses.replace(cond, layout=layout, text=text, cameras=cond.cameras if camera else None)
            whole, grads = _velocity(model, (x, t, cond), None)
            assert whole[:, :, a:b].std() > 0.1
            split, own = _velocity(model, (x[:, :, a:b], t[:, a:b], cond.frames(a, b)), shard)
            scale = 1e-3 if changes.get("softmax_bf16") else 1e-5
            case = f"{changes}, camera={camera}, chunked={chunked}"
            assert (split - whole[:, :, a:b]).abs().max() < scale * whole.abs().max(), case
            for name, grad in own.items():
                assert (_summed(grad) - grads[name]).norm() <= 30 * scale * grads[name].norm() + 1e-5, f"{case}: {name}"


def _velocity(model, call, shard):
    model.zero_grad()
    v, state = model(*call, shard=shard)
    assert state is None
    v.square().sum().backward()
    return v.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_refusals(shard):
    model, x, t, cond = (y.to(_device()) for y in _chunked())
    a, b = shard.frames(FRAMES)
    with pytest.raises(ValueError, match="give shard or state"):
        model(x[:, :, a:b], t[:, a:b], cond.frames(a, b), model.new_state(), shard=shard)
    a, b = (0, 9) if shard.rank == 0 else (9, 10)  # every rank refuses, whoever is wrong
    with pytest.raises(ValueError, match=r"hold \[9, 1.* latent frames; of .* must hold \[\(0, "):
        model(x[:, :, a:b], t[:, a:b], cond.frames(a, b), shard=shard)
    with pytest.raises(ValueError, match="successive target frames"):
        model(x[:, :, :2], t[:, :2], cond.frames(0, 2), shard=shard)


PARTS = (check_operations, check_scan, check_filters)
MODEL = (check_refusals, check_model)


def _rank(rank, ranks, store, backend, checks):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.backends.cudnn.allow_tf32 = False
    limit = timedelta(seconds=100)  # a rank that leaves a collective out must not hold the others for long
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=limit)
    for check in checks:
        check(ContextShard())
    dist.destroy_process_group()
    # Gloo's threads may still drop tensors of Python's; one that does while the interpreter ends aborts the process.
    os._exit(0)


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
CASES = [
    pytest.param(2, "gloo", MODEL, id="model-2"),
    pytest.param(4, "gloo", PARTS, id="parts-4"),  # only three ranks and more hand a state through one
    pytest.param(4, "gloo", MODEL, id="model-4", marks=pytest.mark.slow),
    pytest.param(2, "nccl", PARTS + MODEL, id="nccl-2", marks=[pytest.mark.multigpu, TWO_GPUS]),
]


@pytest.mark.parametrize("ranks,backend,checks", CASES)
def test_ranks_equal_one(tmp_path, ranks, backend, checks):
    mp.spawn(_rank, (ranks, str(tmp_path / "store"), backend, checks), nprocs=ranks)

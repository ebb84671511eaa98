"""Heads of the causal video model split over ranks: outputs, gradients, memory and routing are those of one rank."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.unit.test_causal_video import FRAMES, cached, close, random_model, story
from vgr.parallel.context import ContextShard

POLICIES = ({}, {"window": 2, "sink": 2}, {"window": 1, "routed": 2})


def check_rollout(shard):
    torch.manual_seed(1)
    x, noisy = torch.randn(2, 2, 4, FRAMES, 4, 10)  # ten cells: three ranks hold unequally many
    cond = story()
    t = torch.rand(2, int(cond.layout.chunk.max()) + 1)[:, cond.layout.chunk]
    for policy in POLICIES:
        model = random_model(**policy)

        def split(*args, model=model, **kwargs):
            return model(*args, shard=shard, **kwargs)

        split.new_state = model.new_state
        with torch.no_grad():
            whole, parts = cached(model, x, noisy, t, cond), cached(split, x, noisy, t, cond)
        close(parts[0], whole[0])
        close(parts[1], whole[1])
        part, t_one = cond.frames(FRAMES - 3, FRAMES), t[:, -3:]
        with torch.no_grad():  # the choices themselves, of a chunk whose history is long
            states = [model.new_state(), model.new_state()]
            upto = FRAMES - 3
            for i, call in enumerate((model, split)):
                _, states[i] = call(x[:, :, :upto], 0 * t[:, :upto], cond.frames(0, upto), states[i], commit=True)
                _, states[i] = call(noisy[:, :, upto:], t_one, part, states[i])
        one, many = (state.choices for state in states)
        assert one.keys() == many.keys() and all(torch.equal(one[k], many[k]) for k in one)
        heads = {kv.k.shape[3] for block in states[1].blocks for kv in block.layers}
        a, b = shard.frames(model.heads)
        assert heads == {b - a}
        packed, times = torch.cat([x, noisy], 2), torch.cat([0 * t, t], 1)
        grads = []
        for call, share in ((model, 1), (split, shard.size)):
            out, _ = call(packed, times, cond.packed())
            loss = out[:, :, FRAMES:].square().sum() / share  # every rank has the whole output
            grads.append(torch.autograd.grad(loss, list(model.parameters())))
        model.attention_backend = "flex"
        with torch.no_grad():
            close(split(packed, times, cond.packed())[0], out)
        for own, summed in zip(*grads):
            summed = summed.contiguous()
            dist.all_reduce(summed)
            torch.testing.assert_close(summed, own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))


def check_refusals(shard):
    model, cond = random_model(), story()
    x, t = torch.randn(2, 4, FRAMES, 2, 2), torch.rand(2, FRAMES)
    with pytest.raises(ValueError, match="3 heads and 1 cells .* context ranks, 1 at most"):
        model(x, t, cond, shard=shard)


def _rank(rank, ranks, store):
    torch.set_num_threads(1)
    limit = timedelta(seconds=100)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=limit)
    for check in (check_rollout, check_refusals):
        check(ContextShard())
    dist.destroy_process_group()
    # Gloo's threads may still drop tensors of Python's; one that does while the interpreter ends aborts the process.
    os._exit(0)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one(tmp_path, ranks):
    """Three heads: one each, and one and two."""
    mp.spawn(_rank, (ranks, str(tmp_path / "store")), nprocs=ranks)

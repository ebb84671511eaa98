"""A checkpoint saved by two ranks that each hold a part is read whole by one rank and in parts by four."""

import os
import socket
import subprocess
import sys

import torch
from torch import nn

from vgr.training import checkpoints, optim

RANK_PROGRAM = """
import os, sys, torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from vgr.training import checkpoints
sys.path.insert(0, sys.argv[3])
from test_sharded_checkpoints import adamw, network, whole
dist.init_process_group("gloo")
model = network(0 if sys.argv[1] == "save" else 5)
fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
optimizer = adamw(model)
folder = Path(sys.argv[2])
weights = dict(model.state_dict())
average = {k: v * 2 for k, v in weights.items()}
if sys.argv[1] == "save":
    for p in model.parameters():
        p.grad = p.detach().clone()
    optimizer.step()
    average = {k: v * 2 for k, v in model.state_dict().items()}
    parts = {"weights": weights, "ema": average, "optimizer": checkpoints.optimizer_tensors(model, [optimizer])}
    checkpoints.save(folder, 1, parts, {"samples_seen": 1}, {})
else:
    checkpoints.verify(checkpoints.latest(folder))
    checkpoints.restore(checkpoints.latest(folder), weights, average, model, [optimizer])
    for p in model.parameters():  # one more step shows that the optimizer's state came along
        p.grad = p.detach().clone()
    optimizer.step()
    result = whole(model.state_dict())
    if dist.get_rank() == 0:
        torch.save(result, folder / f"after_{dist.get_world_size()}")
dist.barrier()
dist.destroy_process_group()
# Gloo's threads may still drop tensors of Python's; one that does while the interpreter ends aborts the process.
os._exit(0)
"""


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def adamw(model):
    return optim.adamw(model, 1e-2, 0.1, (0.9, 0.99), 1e-8)


def whole(tensors):
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in tensors.items()}


def launch(ranks, mode, folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    here = os.path.dirname(os.path.abspath(__file__))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, mode, str(folder), here],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]


def test_saved_at_two_ranks_loaded_at_one_and_four(tmp_path):
    launch(2, "save", tmp_path)
    path = checkpoints.latest(tmp_path)
    assert len(list((path / "weights").iterdir())) == 2  # really one file a rank

    reference = network(0)
    optimizer = adamw(reference)

    def step(model, optimizer):
        for p in model.parameters():
            p.grad = p.detach().clone()
        optimizer.step()

    step(reference, optimizer)
    first = {k: v.clone() for k, v in reference.state_dict().items()}
    step(reference, optimizer)

    read = checkpoints.read_weights(path, "weights")
    assert all(torch.equal(read[k], first[k]) for k in first)
    alone = network(5)
    fresh = adamw(alone)
    average = {k: torch.zeros_like(v) for k, v in alone.state_dict().items()}
    checkpoints.restore(path, alone.state_dict(), average, alone, [fresh])
    assert all(torch.equal(average[k], 2 * first[k]) for k in first)
    step(alone, fresh)
    assert all(torch.equal(v, reference.state_dict()[k]) for k, v in alone.state_dict().items())

    launch(4, "load", tmp_path)
    four = torch.load(tmp_path / "after_4", weights_only=True)
    assert all(torch.equal(v, reference.state_dict()[k]) for k, v in four.items())

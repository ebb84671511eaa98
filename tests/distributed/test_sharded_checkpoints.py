"""What two ranks save, each a part of two networks with an optimizer each, one rank reads whole and four in parts."""

import os
import socket
import subprocess
import sys

import torch
from torch import nn

from vgr.training import checkpoints, optim

RANK_PROGRAM = """
import os, resource, signal, sys, torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from vgr.training import checkpoints, saving
sys.path.insert(0, sys.argv[3])
from test_sharded_checkpoints import networks, optimizers, parts, step, whole
dist.init_process_group("gloo")
mode, folder, rank = sys.argv[1], Path(sys.argv[2]), dist.get_rank()
model = networks(5 if mode == "load" else 0)
fully_shard(model["student"], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))  # the critic is whole on each
both = optimizers(model)
if mode == "save":
    step(model, both, critic_alone=True)
    step(model, both)
    saver = saving.Saver(folder, {}, 2)
    saver.save(1, parts(model, both), {"samples_seen": 1})
    step(model, both)  # goes on, with collectives of its own, while that is written
    dist.all_reduce(torch.zeros(1000))
    saver.wait()
elif mode == "full":
    saver = saving.Saver(folder, {}, 2)
    saver.save(1, parts(model, both), {"samples_seen": 1})
    saver.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == int(sys.argv[4]):  # the disk of one rank alone is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    saver.save(2, parts(model, both), {"samples_seen": 2})
    try:
        saver.save(3, parts(model, both), {"samples_seen": 3})
    except OSError as error:
        print("told", error, flush=True)
else:
    weights, average = dict(model.state_dict()), {k: v * 2 for k, v in model.state_dict().items()}
    checkpoints.restore(checkpoints.newest_good(folder)[0], weights, average, model, both)
    step(model, both)  # shows that the optimizers' states came along
    result = whole(model.state_dict())
    if rank == 0:
        torch.save(result, folder / f"after_{dist.get_world_size()}")
dist.barrier()
dist.destroy_process_group()
# Gloo's threads may still drop tensors of Python's; one that does while the interpreter ends aborts the process.
os._exit(0)
"""


def networks(seed):
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    return nn.ModuleDict({"student": student, "critic": nn.Linear(5, 2)})


def optimizers(model):
    settings = {"student": (1e-2, 0.1, (0.9, 0.99)), "critic": (4e-3, 0.0, (0.0, 0.999))}
    return [optim.adamw(model[name], *told, 1e-8) for name, told in settings.items()]


def step(model, both, critic_alone=False):
    for p in model.parameters():
        p.grad = p.detach().clone()
    for optimizer in both[1:] if critic_alone else both:
        optimizer.step()


def parts(model, both):
    weights = dict(model.state_dict())
    average = {k: v * 2 for k, v in weights.items()}
    return {"weights": weights, "ema": average, "optimizer": checkpoints.optimizer_tensors(model, both)}


def whole(tensors):
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in tensors.items()}


def launch(ranks, mode, folder, *told):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    here = os.path.dirname(os.path.abspath(__file__))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, mode, str(folder), here, *told],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = []
    for process in processes:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
        said.append(out)
    return said


def test_saved_at_two_ranks_loaded_at_one_and_four(tmp_path):
    launch(2, "save", tmp_path)
    path = checkpoints.latest(tmp_path)
    assert len(list((path / "weights").iterdir())) == 2  # really one file a rank

    reference = networks(0)
    both = optimizers(reference)
    step(reference, both, critic_alone=True)
    step(reference, both)
    first = {k: v.clone() for k, v in reference.state_dict().items()}
    step(reference, both)

    read = checkpoints.read_weights(path, "weights")
    assert read.keys() == first.keys() and all(torch.equal(read[k], first[k]) for k in first)
    alone = networks(5)
    fresh = optimizers(alone)
    average = {k: torch.zeros_like(v) for k, v in alone.state_dict().items()}
    checkpoints.restore(path, alone.state_dict(), average, alone, fresh)
    assert all(torch.equal(average[k], 2 * first[k]) for k in first)
    steps = {name: fresh[i].state[next(alone[name].parameters())]["step"] for i, name in enumerate(alone)}
    assert steps == {"student": 1, "critic": 2}
    step(alone, fresh)
    assert all(torch.equal(v, reference.state_dict()[k]) for k, v in alone.state_dict().items())

    launch(4, "load", tmp_path)
    four = torch.load(tmp_path / "after_4", weights_only=True)
    assert all(torch.equal(v, reference.state_dict()[k]) for k, v in four.items())


def test_what_fails_on_one_rank_is_told_on_both(tmp_path):
    for rank in "01":
        folder = tmp_path / rank
        said = launch(2, "full", folder, rank)
        assert all("File too large" in out for out in said), said
        assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000001"]
        checkpoints.verify(checkpoints.latest(folder))

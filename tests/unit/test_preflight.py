"""What is wrong on any rank ends all of them before the first step, told once with rank and host."""

import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vgr.training import preflight

CPU = torch.device("cpu")
SMALL = {"weight": torch.zeros(4)}


def folder(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    return tmp_path


def test_a_machine_that_is_well_passes(tmp_path):
    preflight.check(folder(tmp_path), CPU, tmp_path / "checkpoints", 4, SMALL)


def test_checkpoints_need_room_less_what_they_have(tmp_path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    wide = {"weight": torch.empty(free // 16 // 4, device="meta")}  # a quarter of it, with average and moments 4 bytes
    saves = tmp_path / "checkpoints"
    with pytest.raises(OSError, match=r"rank 0 on .*GiB free for .* make room"):
        preflight.check(folder(tmp_path), CPU, saves, 6, wide)
    for step in range(4):
        (saves / f"step_{step:08d}").mkdir(parents=True)
    preflight.check(folder(tmp_path), CPU, saves, 6, wide)


def test_two_ranks_on_one_gpu_and_other_versions_are_told():
    well = {"host": "a", "torch": "2.15.0", "gpu": "GPU-1", "wrong": []}
    assert preflight.complaints([well, {**well, "gpu": "GPU-2"}, {**well, "gpu": None}, {**well, "gpu": None}]) == []
    told = preflight.complaints([well, {**well, "host": "b"}, {**well, "gpu": "GPU-3", "torch": "2.14.0"}])
    assert told == [
        "rank 1 on b has the GPU of rank 0: one task a GPU, all of them visible",
        "rank 2 on a runs torch 2.14.0, rank 0 2.15.0",
    ]


def _rank(rank, where):
    torch.set_num_threads(1)
    limit = timedelta(seconds=100)
    dist.init_process_group("gloo", init_method=f"file://{where}/store", rank=rank, world_size=2, timeout=limit)
    preflight.check(where / "run", CPU, where / "none", 4, SMALL)
    preflight.PATIENCE_S = 0.0
    try:
        preflight.check(where / ("run" if rank == 0 else "elsewhere"), CPU, where / "none", 4, SMALL)
    except (OSError, SystemExit) as error:
        (where / f"told{rank}").write_text(f"{type(error).__name__} {error}")
    dist.destroy_process_group()
    os._exit(0)


def test_a_folder_that_one_node_does_not_see_ends_all_ranks(tmp_path):
    (tmp_path / "run").mkdir()
    folder(tmp_path / "run")
    mp.spawn(_rank, (tmp_path,), nprocs=2)
    first, second = ((tmp_path / f"told{rank}").read_text() for rank in range(2))
    assert first.startswith(f"OSError rank 1 on {socket.gethostname()}: {tmp_path}/elsewhere is not the first rank's")
    assert second == "SystemExit 2"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_that_is_well_passes(tmp_path):
    preflight.check(folder(tmp_path), torch.device("cuda:0"), tmp_path / "checkpoints", 4, SMALL)

"""Writing a run's checkpoints: complete or not pointed to, while training goes on.

A save goes to a temporary folder, is synced to disk, renamed, and only then `latest` is replaced: whatever
moment a run dies at, `latest` names a complete checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from vgr.data.files import sync_folder, write_text
from vgr.training.checkpoints import FORMAT, best, distributed, latest, point_latest, sha256s


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    generator: dict[str, Any],
    keep: int = 2,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write checkpoints/step_<step> under `folder` and point `latest` to it; all ranks call this together.

    tensors: one dict (plain or DTensor values) for each of weights, ema, optimizer; the newest `keep`
    checkpoints stay, and the best. group: what ranks agree over. Raises OSError on all of them, for example on a
    full disk, with the previous checkpoint untouched and nothing half-written left.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".saving_{final.name}"

    def begin() -> None:
        for left in [*folder.glob(".saving_*"), *folder.glob(".removing_*")]:  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)

    def publish() -> None:
        _publish(temporary, final, state, generator)
        _prune(final, keep)

    try:
        _first_rank(begin, group)
        for part, values in tensors.items():
            writer = dcp.HuggingFaceStorageWriter(str(temporary / part), save_distributed=True)
            dcp.save(values, storage_writer=writer, process_group=group, no_dist=not distributed())
        _first_rank(publish, group)
    except (OSError, dcp.api.CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        failures = [failure for failure, _trace in getattr(error, "failures", {}).values()]
        # A full disk arrives wrapped, one failure a rank.
        raise next((f for f in failures if isinstance(f, OSError)), error) from None
    return final


class Saver:
    """Writes checkpoints of a run while its training goes on, one at a time; all ranks call it at the same steps.

    A thread of each rank writes that rank's part of a copy, and the ranks' threads agree over a group of their own:
    ranks reach a save at different times, so calls over training's group would meet those of steps. Not
    `dcp.async_save`: that writes one dictionary, and here three belong together and are published after.
    """

    def __init__(self, folder: Path, generator: dict[str, Any], keep: int) -> None:
        self.folder, self.generator, self.keep = folder, generator, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        self._group: dist.ProcessGroup | None = None

    def save(
        self, step: int, tensors: dict[str, dict[str, Tensor | Callable[[], Tensor]]], state: dict[str, Any]
    ) -> None:
        """`save` of the tensors as they are now, begun; the one before is waited for. Raises OSError of that one.

        A function among them gathers a tensor that no rank holds whole; all call it.
        """
        self.wait()
        if distributed() and self._group is None:
            self._group = dist.new_group(backend="gloo")
        copies = {part: _snapshot(x) for part, x in tensors.items()}
        told = (copies, state, self.generator, self.keep, self._group)
        self._writing = self._thread.submit(save, self.folder, step, *told)

    def failed(self) -> bool:
        """Whether the save begun last has ended without a checkpoint; `wait` says why."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Until the save begun last is on disk and pointed to. Raises OSError, as `save` does."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Let a save that has begun end, well or not."""
        self._thread.shutdown()


def _snapshot(tensors: dict[str, Tensor | Callable[[], Tensor]]) -> dict[str, Tensor]:
    """What this rank has to write of the tensors as they are now, in CPU memory, pinned where it comes from a GPU.

    Sharded tensors (DTensor) stay so; of those that every rank holds, or can hold for a moment if all call what stands
    for it, each rank copies its share.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
    copies = {}
    for i, (name, x) in enumerate(tensors.items()):
        x = x() if callable(x) else x
        if i % ranks == rank or isinstance(x, DTensor):
            x = x.detach()
            copies[name] = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x, non_blocking=True)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copies


def _first_rank(work: Callable[[], None], group: dist.ProcessGroup | None) -> None:
    """`work` on the first rank while the others wait; what it raises is raised on all of them."""
    failure: list[Exception | None] = [None]
    if not distributed() or dist.get_rank() == 0:
        try:
            work()
        except Exception as error:
            failure = [error]
    if distributed():
        dist.broadcast_object_list(failure, src=0, group=group)
    if failure[0] is not None:
        raise failure[0]


def _publish(temporary: Path, final: Path, state: dict[str, Any], generator: dict[str, Any]) -> None:
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    (temporary / "generator.json").write_text(json.dumps(generator, indent=1))
    paths = sorted(p for p in temporary.rglob("*") if p.is_file())
    for path in paths:
        with open(path, "rb") as f:
            os.fsync(f.fileno())
    for path in temporary.rglob("*/"):
        sync_folder(path)
    names = [path.relative_to(temporary).as_posix() for path in paths]
    files = {name: {"sha256": digest} for name, digest in zip(names, sha256s(paths))}
    write_text(temporary / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=1))
    if final.exists():  # a complete folder that an interrupted run never pointed to
        shutil.rmtree(final)
    os.rename(temporary, final)
    try:
        sync_folder(final.parent)
        point_latest(final)
    except OSError:
        if latest(final.parent) != final:
            shutil.rmtree(final, ignore_errors=True)
        raise


def _prune(newest: Path, keep: int) -> None:
    folder, best_one = newest.parent, best(newest.parent)
    if best_one is not None:
        link = folder / ".best"
        link.unlink(missing_ok=True)
        link.symlink_to(best_one.name)
        link.replace(folder / "best")
    for path in sorted(p for p in folder.glob("step_*") if p.name <= newest.name)[:-keep]:
        if path != best_one:
            doomed = path.with_name(f".removing_{path.name}")  # never a half-removed folder under a good name
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

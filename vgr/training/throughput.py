"""How fast training goes (samples, tokens, frames, the loader's share, MFU), and a trace of a few steps when asked."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import Profiler

from vgr.metrics.frame_rate import known_peak
from vgr.training.step_cost import step_flops
from vgr.types import VideoBatch

SKIPPED, WARMUP, TRACED = 2, 1, 3  # steps of a trace
_log = logging.getLogger(__name__)


class Throughput(Profiler):
    """Counts the micro-batches of this rank between two log lines, and the time spent waiting and pausing.

    As Lightning's profiler it hears when the loader is asked and when it has answered, which no callback does: until
    the next step starts the batch is also copied to the device, behind all work that is queued there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._flops: dict[tuple[int, ...], float] = {}  # of a clip, by the shape of its latents
        self._asked: float | None = None
        self.begin()

    def know(self, module: pl.LightningModule, batches: Sequence[VideoBatch]) -> None:
        """Count the FLOP of clips of these shapes, for MFU, where the GPU's peak is known; before module is sharded."""
        if not torch.cuda.is_available() or known_peak(torch.cuda.get_device_name()) is None:
            return
        try:
            for shape, batch in {tuple(batch.latents.shape[1:]): batch for batch in batches}.items():
                self._flops[shape] = step_flops(module, batch) / len(batch.latents)
        except Exception as error:  # what tells of a run must not stop it
            _log.warning("no MFU: its FLOP cannot be counted (%s)", error)

    def begin(self) -> None:
        """Start counting anew."""
        self._since, self._waited, self._paused = time.perf_counter(), 0.0, 0.0
        self._samples = self._tokens = self._frames = 0
        self._work = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._asked = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._waited += time.perf_counter() - self._asked

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is no training: validation, samples, measuring, saving."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def count(self, module: pl.LightningModule, batch: VideoBatch) -> None:
        """A micro-batch that this rank is about to train on."""
        clips, _, frames, height, width = batch.latents.shape
        self._samples += clips
        self._tokens += clips * frames * (height // module.model.patch) * (width // module.model.patch)
        self._frames += clips * batch.cameras.c2w.shape[1]
        # A shape that is not known leaves the MFU of its interval unknown.
        self._work += clips * self._flops.get(tuple(batch.latents.shape[1:]), math.nan)

    def told(self, samples: int, device: torch.device, world_size: int) -> dict[str, float]:
        """Of `samples` by all ranks since `begin`, which is called again; pauses are told apart and not counted.

        Tokens are latent patches, frames raw ones, of the data (a packed call holds more). Ranks' micro-batches of a
        global batch are of one size, so this rank's stand for all.
        """
        taken = max(time.perf_counter() - self._since - self._paused, 1e-9)
        rate = samples / max(self._samples, 1) / taken
        values = {
            "perf/samples_per_s": samples / taken,
            "perf/tokens_per_s": self._tokens * rate,
            "perf/frames_per_s": self._frames * rate,
            "perf/pause_s": self._paused,
        }
        if self._asked is not None:
            values["perf/data_wait"] = self._waited / taken
        if device.type == "cuda" and self._work > 0:
            values["perf/mfu"] = self._work * rate / world_size / known_peak(torch.cuda.get_device_name(device))
        self.begin()
        return values


def trace(folder: Path, rank: int, told: Callable[[str], None]) -> torch.profiler.profile:
    """A profiler whose `step` follows every optimizer step: it writes three, after three, to folder/rank<k>.*.

    json.gz is a trace for chrome://tracing or Perfetto, txt a table of what took longest; `told` hears where.
    """
    on_gpu = torch.cuda.is_available()
    kinds = torch.profiler.ProfilerActivity
    sort = "self_device_time_total" if on_gpu else "self_cpu_time_total"

    def write(found: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(folder / f"rank{rank}.json.gz"))
        table = found.key_averages().table(sort_by=sort, row_limit=25, max_name_column_width=60)
        (folder / f"rank{rank}.txt").write_text(table + "\n", encoding="utf-8")
        told(f"trace of {TRACED} steps: {folder}/rank*.json.gz (ui.perfetto.dev), the longest operations rank*.txt")

    return torch.profiler.profile(
        activities=[kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU],
        schedule=torch.profiler.schedule(wait=SKIPPED, warmup=WARMUP, active=TRACED, repeat=1),
        on_trace_ready=write,
    )

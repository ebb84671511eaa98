"""What happens between steps, at intervals of samples_seen: log, validate, sample, save, show progress."""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from vgr.data.files import write_text
from vgr.training import checkpoints
from vgr.training.self_forcing import SelfForcing
from vgr.training.tracking import Record
from vgr.training.validation import Validation
from vgr.training.world_model import WorldModelTraining
from vgr.types import VideoBatch

Training = WorldModelTraining | SelfForcing


def due(module: Training, every: int) -> bool:
    """True if the step just taken crossed a multiple of `every` samples, or was the last; 0 means never."""
    seen, before = module.samples_seen, module.samples_seen - module.global_batch
    return every > 0 and (seen // every > before // every or seen >= module.max_samples)


def memory_gib() -> float:
    """Peak memory in GiB: of the GPU in use, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def write_validation(path: Path, result: Validation) -> None:
    """The last validation as JSON: summary, noise levels, and for each clip its losses with both cameras."""
    clips = [{"key": key, "loss": own} for key, own in zip(result.keys, result.own_NL.tolist())]
    if result.shuffled_NL is not None:
        for clip, shuffled in zip(clips, result.shuffled_NL.tolist()):
            clip["loss_shuffled_camera"] = shuffled
    record = {"summary": result.metrics(), "levels": result.levels, "clips": clips}
    write_text(path, json.dumps(record, indent=1))


def _optimizers(module: Training) -> list[torch.optim.Optimizer]:
    found = module.optimizers(use_pl_optimizer=False)
    return found if isinstance(found, list) else [found]


class BetweenSteps(pl.Callback):
    """Restores `checkpoint` at the start; after each optimizer step does what is due, the save last.

    every: samples between two of each of log, validate, sample, bench, save; the last step also validates, in any
    case. config and generator go into the checkpoints, of which the newest `keep` stay. batches: held-out
    clips. write_sample(module, path) writes an mp4; bench(module, folder, (rank, ranks)) measures a share of a
    protocol and gives its numbers to the one that has all. On SIGTERM or SIGUSR1 to any rank the run saves and stops
    after the step at hand; `signal` says so on all of them.
    """

    def __init__(
        self,
        run_dir: Path,
        checkpoint: Path | None,
        record: Record,
        every: Mapping[str, int],
        keep: int,
        config: dict[str, Any],
        generator: dict[str, Any],
        batches: Sequence[VideoBatch],
        write_sample: Callable[[Training, Path], None],
        bench: Callable[[Training, Path, tuple[int, int]], dict[str, float]] | None = None,
    ) -> None:
        self.run_dir, self.checkpoint, self.record, self.every, self.keep = run_dir, checkpoint, record, every, keep
        self.config, self.generator, self.batches, self.write_sample = config, generator, batches, write_sample
        self.bench = bench
        self.signal: int | None = None
        self._losses: list[float] = []
        self._bar: Any = None

    def on_train_start(self, trainer: pl.Trainer, module: Training) -> None:
        if self.checkpoint is not None:
            checkpoints.restore(
                self.checkpoint, module.weights(), module.ema_weights(), module, _optimizers(module)
            )
        for number in (signal.SIGTERM, signal.SIGUSR1):  # Lightning puts the old handlers back at the end
            signal.signal(number, self._on_signal)
        self._seen, self._time = module.samples_seen, time.monotonic()

    def _on_signal(self, number: int, _frame: Any) -> None:
        self.signal = number

    def on_train_batch_end(self, trainer: pl.Trainer, module: Training, *_: Any) -> None:
        if module.samples_seen == self._seen:
            return  # an accumulated micro-batch, no step yet
        self._seen = module.samples_seen
        self._log(module)
        if due(module, self.every["validate"]) or module.samples_seen >= module.max_samples:
            with trainer.precision_plugin.forward_context():
                result = module.validate(self.batches)
            self.record.log({"step": module.step, **result.metrics()}, module.samples_seen)
            if trainer.is_global_zero:
                write_validation(self.run_dir / "validation.json", result)
        if due(module, self.every["sample"]) and trainer.is_global_zero:
            path = self.run_dir / "samples" / f"{module.samples_seen:08d}.mp4"
            path.parent.mkdir(exist_ok=True)
            self.write_sample(module, path)
            self.record.log_video(path, module.samples_seen)
        if self.bench is not None and due(module, self.every["bench"]):
            self._measure(trainer, module, self.run_dir / "bench" / f"{module.samples_seen:08d}")
        # Ranks hear of a signal at different steps, and saving is for all of them together.
        stop = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
        if due(module, self.every["save"]) or stop:
            self._save(module)
        if stop:
            self.signal = self.signal or signal.SIGTERM
            trainer.should_stop = True
        if trainer.is_global_zero:
            self._show(module)

    def _measure(self, trainer: pl.Trainer, module: Training, out: Path) -> None:
        """Every rank makes and measures its share; then the first finds all of it and writes the results."""
        if trainer.world_size > 1:
            self.bench(module, out, (trainer.global_rank, trainer.world_size))
            trainer.strategy.barrier("shares measured")
        if trainer.is_global_zero:
            self.record.log({"step": module.step, **self.bench(module, out, (0, 1))}, module.samples_seen)
        trainer.strategy.barrier("measured")

    def _log(self, module: Training) -> None:
        self._losses.append(module.last_step["train/loss"])
        if not due(module, self.every["log"]):
            return
        now = time.monotonic()
        values = {
            "step": module.step,
            **module.last_step,
            "train/loss": sum(self._losses) / len(self._losses),  # the mean since the last line
            "perf/samples_per_s": len(self._losses) * module.global_batch / max(now - self._time, 1e-9),
            "perf/memory_gib": memory_gib(),
        }
        self.record.log(values, module.samples_seen)
        self._losses, self._time = [], now

    def _save(self, module: Training) -> None:
        state = {
            "samples_seen": module.samples_seen,
            "step": module.step,
            "time_s": self.record.seconds(),
            "config": self.config,
        }
        tensors = {
            "weights": module.weights(),
            "ema": module.ema_weights(),
            "optimizer": checkpoints.optimizer_tensors(module, _optimizers(module)),
        }
        folder = self.run_dir / "checkpoints"
        checkpoints.save(folder, module.step, tensors, state, self.generator, self.keep)

    def _show(self, module: Training) -> None:
        """One bar over all restarts; without a terminal a plain line every 10 s."""
        if self._bar is None:
            from tqdm import tqdm

            line = "{n_fmt}/{total_fmt} samples, {rate_fmt}{postfix}, {remaining} left\n"
            plain = {} if sys.stderr.isatty() else {"bar_format": line, "mininterval": 10.0, "leave": False}
            before = module.samples_seen - module.global_batch
            self._bar = tqdm(
                total=module.max_samples, initial=before, unit="sample", file=sys.stderr, dynamic_ncols=True, **plain
            )
        status = f"loss {module.last_step['train/loss']:.4f}, {memory_gib():.1f} GiB"
        self._bar.set_postfix_str(status, refresh=False)
        self._bar.update(module.samples_seen - self._bar.n)
        if module.samples_seen >= module.max_samples:
            self._bar.refresh()
            self._bar.close()

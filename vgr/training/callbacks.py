"""What happens between steps, at intervals of samples_seen: log, validate, sample, save, show progress.

Each action is a plain callable (trainer, module); `EveryStep` runs them in order after each optimizer step.
The order matters: validation comes before the save that records its loss.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from vgr.training import checkpoints
from vgr.training.tracking import JsonlLogger, WandbLogger
from vgr.training.world_model import Validation, WorldModelTraining
from vgr.types import VideoBatch

Action = Callable[[pl.Trainer, WorldModelTraining], None]


def due(module: WorldModelTraining, every: int) -> bool:
    """True if the step just taken crossed a multiple of `every` samples, or was the last; 0 means never."""
    seen, before = module.samples_seen, module.samples_seen - module.global_batch
    return every > 0 and (seen // every > before // every or seen >= module.max_samples)


def log(trainer: pl.Trainer, module: WorldModelTraining, values: dict[str, float]) -> None:
    """Send values to every logger under the current samples_seen."""
    for logger in trainer.loggers:
        logger.log_metrics({"step": module.step, **values}, step=module.samples_seen)


def memory_gib() -> float:
    """Peak memory in GiB: of the GPU in use, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class EveryStep(pl.Callback):
    """Restores `checkpoint`, then runs the actions and `save` after every optimizer step.

    On SIGTERM or SIGUSR1 the run saves and stops after the step at hand; `signal` says so.
    """

    def __init__(self, actions: Sequence[Action], save: SaveEvery, checkpoint: Path | None) -> None:
        self.actions, self.save, self.checkpoint = [*actions, save], save, checkpoint
        self.signal: int | None = None
        self._seen = -1
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: WorldModelTraining) -> None:
        self._seen = module.samples_seen
        if self.checkpoint is not None:
            optimizer = module.optimizers(use_pl_optimizer=False)
            checkpoints.restore(self.checkpoint, module.weights(), module.ema_weights(), module, optimizer)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def teardown(self, trainer: pl.Trainer, module: WorldModelTraining, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _on_signal(self, number: int, _frame: Any) -> None:
        self.signal = number

    def on_train_batch_end(self, trainer: pl.Trainer, module: WorldModelTraining, *_: Any) -> None:
        if module.samples_seen == self._seen:
            return  # an accumulated micro-batch, no step yet
        self._seen = module.samples_seen
        for action in self.actions:
            action(trainer, module)
        if self.signal is not None:
            self.save.now(module)
            trainer.should_stop = True


class LogEvery:
    """train/loss (mean since the last line), train/grad_norm, train/lr and perf/samples_per_s."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._losses: list[float] = []
        self._time = time.monotonic()

    def __call__(self, trainer: pl.Trainer, module: WorldModelTraining) -> None:
        self._losses.append(module.last_step["train/loss"])
        if not due(module, self.every):
            return
        now = time.monotonic()
        rate = len(self._losses) * module.global_batch / max(now - self._time, 1e-9)
        values = {**module.last_step, "train/loss": sum(self._losses) / len(self._losses)}
        log(trainer, module, {**values, "perf/samples_per_s": rate, "perf/memory_gib": memory_gib()})
        self._losses, self._time = [], now


class ValidateEvery:
    """Validation on fixed held-out clips with the averaged weights; the last one is the final validation."""

    def __init__(self, every: int, batches: Sequence[VideoBatch]) -> None:
        self.every, self.batches = every, batches

    def __call__(self, trainer: pl.Trainer, module: WorldModelTraining) -> None:
        if due(module, self.every) and module.samples_seen < module.max_samples:
            values = run_validation(trainer, module, self.batches).metrics()
            module.validation = (module.samples_seen, values["val/loss"])
            log(trainer, module, values)


def run_validation(trainer: pl.Trainer, module: WorldModelTraining, batches: Sequence[VideoBatch]) -> Validation:
    """`module.validate` in the precision of training."""
    with trainer.precision_plugin.forward_context():
        return module.validate(batches)


def write_validation(path: Path, result: Validation) -> None:
    """The final validation as JSON: summary, noise levels, and for each clip its losses with both cameras."""
    clips = [
        {"key": key, "loss": own, "loss_shuffled_camera": shuffled}
        for key, own, shuffled in zip(result.keys, result.own_NL.tolist(), result.shuffled_NL.tolist())
    ]
    record = {"summary": result.metrics(), "levels": result.levels, "clips": clips}
    checkpoints.write_atomic(path, json.dumps(record, indent=1))


class SampleEvery:
    """Calls `write(module, path)` for samples/<samples_seen>.mp4; handed over by the command."""

    def __init__(self, every: int, folder: Path, write: Callable[[WorldModelTraining, Path], None]) -> None:
        self.every, self.folder, self.write = every, folder, write

    def __call__(self, trainer: pl.Trainer, module: WorldModelTraining) -> None:
        if not (due(module, self.every) and trainer.is_global_zero):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{module.samples_seen:08d}.mp4"
        with trainer.precision_plugin.forward_context():
            self.write(module, path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_video(path, module.samples_seen)


class SaveEvery:
    """Checkpoints at intervals and at the end; keeps the newest `keep` and the best validated one."""

    def __init__(
        self,
        every: int,
        folder: Path,
        config: dict[str, Any],
        generator: dict[str, Any],
        clock: JsonlLogger,
        keep: int = 2,
    ) -> None:
        self.every, self.folder, self.keep = every, folder, keep
        self.config, self.generator, self.clock = config, generator, clock

    def __call__(self, trainer: pl.Trainer, module: WorldModelTraining) -> None:
        if due(module, self.every):
            self.now(module)

    def now(self, module: WorldModelTraining) -> Path:
        """Save at the current position. Raises OSError."""
        at, loss = module.validation or (-1, None)
        state = {
            "samples_seen": module.samples_seen,
            "step": module.step,
            "time_s": self.clock.seconds(),
            "val_loss": loss if at == module.samples_seen else None,
            "config": self.config,
        }
        tensors = {
            "weights": module.weights(),
            "ema": module.ema_weights(),
            "optimizer": checkpoints.optimizer_tensors(module, module.optimizers(use_pl_optimizer=False)),
        }
        path = checkpoints.save(self.folder, module.step, tensors, state, self.generator)
        checkpoints.prune(self.folder, self.keep)
        return path


class Progress:
    """One bar on the first rank, counting samples over all restarts; without a terminal a line every 10 s."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self._bar: Any = None
        self._first = self._last = 0.0
        self._start = 0

    def __call__(self, trainer: pl.Trainer, module: WorldModelTraining) -> None:
        if not trainer.is_global_zero:
            return
        seen, loss = module.samples_seen, module.last_step["train/loss"]
        status = f"loss {loss:.4f}, {memory_gib():.1f} GiB"
        if sys.stderr.isatty():
            self._show_bar(module, status)
            return
        now = time.monotonic()
        if not self._first:
            self._first, self._last, self._start = now, 0.0, seen
        last = seen >= module.max_samples
        if now - self._last < self.seconds and not last:
            return
        rate = (seen - self._start) / max(now - self._first, 1e-9)
        left = f"{(module.max_samples - seen) / rate / 60:.1f} min left" if rate > 0 else "timing"
        line = f"{seen}/{module.max_samples} samples, {rate:.1f} samples/s, {status}, {left}"
        print(line, file=sys.stderr, flush=True)
        self._last = now

    def _show_bar(self, module: WorldModelTraining, status: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            before = module.samples_seen - module.global_batch
            self._bar = tqdm(total=module.max_samples, initial=before, unit="sample", dynamic_ncols=True)
        self._bar.set_postfix_str(status, refresh=False)
        self._bar.update(module.samples_seen - self._bar.n)
        if module.samples_seen >= module.max_samples:
            self._bar.close()

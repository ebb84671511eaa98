"""What happens between steps, at intervals of samples_seen: log, validate, sample, save, show progress."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from vgr.data.files import write_text
from vgr.training import checkpoints, preflight, saving
from vgr.training.self_forcing import SelfForcing
from vgr.training.sharded import is_split
from vgr.training.throughput import Throughput, trace
from vgr.training.tracking import Record
from vgr.training.validation import Validation
from vgr.training.watchdog import Watchdog
from vgr.training.world_model import WorldModelTraining
from vgr.training.zero import ZeroStrategy
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


def forget_peak() -> None:
    """`memory_gib` is of what comes from here on: an earlier run of the same process has its own."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # only Linux can
        Path("/proc/self/clear_refs").write_text("5")


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
    case, and a validation better than all before also saves. config and generator go into the checkpoints, of which
    the newest `keep` and the best stay; they are written while training goes on. batches: held-out
    clips. write_sample(module, path, writes) makes an mp4; bench(module, folder, (rank, ranks)) measures a share of a
    protocol and gives its numbers to the one that has all. On SIGTERM or SIGUSR1 to any rank the run saves and stops
    after the step at hand; `signal` says so on all of them. profile: a trace of a few steps in <run_dir>/profile.
    watchdog_s: seconds at one thing after which a rank says so in <run_dir>/hangs.
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
        write_sample: Callable[[Training, Path, bool], None],
        bench: Callable[[Training, Path, tuple[int, int]], dict[str, float]] | None = None,
        profile: bool = False,
        watchdog_s: float = 0.0,
    ) -> None:
        self.run_dir, self.checkpoint, self.record, self.every = run_dir, checkpoint, record, every
        self.config, self.batches, self.write_sample, self.bench = config, batches, write_sample, bench
        self.saver = saving.Saver(run_dir / "checkpoints", generator, keep)
        self.signal: int | None = None
        self.profile, self.pace, self.watchdog_s = profile, Throughput(), watchdog_s
        self.watchdog: Watchdog | None = None
        self._handlers: dict[int, Any] = {}
        self._losses: list[float] = []
        self._trace: torch.profiler.profile | None = None
        self._bar: Any = None

    def setup(self, trainer: pl.Trainer, module: Training, stage: str) -> None:
        trainer.profiler = self.pace
        self._handlers = {n: signal.signal(n, self._on_signal) for n in (signal.SIGTERM, signal.SIGUSR1)}
        place = (trainer.global_rank, trainer.world_size)
        self.watchdog = Watchdog(self.run_dir / "hangs", self.watchdog_s, *place, self._say)

    def on_train_start(self, trainer: pl.Trainer, module: Training) -> None:
        # Lightning's own handlers, which came in between, would requeue under Slurm, or stop without a save.
        for number in self._handlers:
            signal.signal(number, self._on_signal)
        trainer._signal_connector.received_sigterm = False  # ours heard it too
        self._beat(module, "checks")
        saves = self.saver.keep + 2 if self.every["save"] else 1  # with the best, and one in the making
        preflight.check(self.run_dir, module.device, self.saver.folder, saves, module.weights())
        self._beat(module, "restore")
        if self.checkpoint is not None and isinstance(trainer.strategy, ZeroStrategy):
            trainer.strategy.restore(self.checkpoint)
        elif self.checkpoint is not None:
            checkpoints.restore(self.checkpoint, module.weights(), module.ema_weights(), module, _optimizers(module))
        best = checkpoints.best(self.saver.folder)
        self._best = math.inf if best is None else checkpoints.validation_loss(best)
        self._seen = module.samples_seen
        forget_peak()
        self.pace.begin()
        if self.profile:
            self._trace = trace(self.run_dir / "profile", trainer.global_rank, self._say)
            self._trace.start()

    def _on_signal(self, number: int, _frame: Any) -> None:
        self.signal = number

    def _beat(self, module: Training, phase: str) -> None:
        if self.watchdog is not None:
            self.watchdog.beat(module.step, phase)

    def on_exception(self, trainer: pl.Trainer, module: Training, exception: BaseException) -> None:
        if self.watchdog is not None:
            self.watchdog.close()
        self.saver.close()  # what is being written is whole, whatever became of training
        if isinstance(exception, FloatingPointError):
            self.record.log({"diverged": module.step + 1}, module.samples_seen)
        self.teardown(trainer, module, "fit")  # Lightning does not, and a sweep goes on

    def on_train_batch_start(self, trainer: pl.Trainer, module: Training, batch: VideoBatch, batch_idx: int) -> None:
        self._beat(module, "step")
        self.pace.count(module, batch)

    def on_train_end(self, trainer: pl.Trainer, module: Training) -> None:
        if self._trace is not None:
            self._trace.stop()
        self.watchdog.close()

    def teardown(self, trainer: pl.Trainer, module: Training, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Training, *_: Any) -> None:
        self._beat(module, "data")
        if module.samples_seen == self._seen:
            return  # an accumulated micro-batch, no step yet
        self._seen = module.samples_seen
        if self._trace is not None:
            self._trace.step()
        self._log(trainer, module)
        loss: float | None = None
        if due(module, self.every["validate"]) or module.samples_seen >= module.max_samples:
            self._beat(module, "validate")
            with self.pace.pause(), trainer.precision_plugin.forward_context():
                result = module.validate(self.batches)
            values = result.metrics()
            loss = values["val/loss"]
            self.record.log({"step": module.step, **values}, module.samples_seen)
            if trainer.is_global_zero:
                write_validation(self.run_dir / "validation.json", result)
        if due(module, self.every["sample"]):
            self._beat(module, "sample")
            self._sample(trainer, module)
        if self.bench is not None and due(module, self.every["bench"]):
            self._beat(module, "bench")
            with self.pace.pause():
                self._measure(trainer, module, self.run_dir / "bench" / f"{module.samples_seen:08d}")
        # Ranks hear of a signal, and of a failed save, at different steps, and saving is for all of them together.
        self._beat(module, "signals")
        stop = self.signal is not None or self.saver.failed()
        stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        better = loss is not None and self.every["save"] > 0
        better = better and trainer.strategy.reduce_boolean_decision(loss < self._best, all=False)
        if better:
            self._best = loss
        if due(module, self.every["save"]) or stop or better:
            self._beat(module, "save")
            with self.pace.pause():
                self._save(module, loss)
        if stop or module.samples_seen >= module.max_samples:
            self.saver.wait()
        if stop:
            self.signal = self.signal or signal.SIGTERM
            trainer.should_stop = True
        if trainer.is_global_zero:
            self._show(module)
        self._beat(module, "data")

    def _sample(self, trainer: pl.Trainer, module: Training) -> None:
        if trainer.is_global_zero or is_split(trainer.strategy):
            path = self.run_dir / "samples" / f"{module.samples_seen:08d}.mp4"
            path.parent.mkdir(exist_ok=True)
            with self.pace.pause():
                self.write_sample(module, path, trainer.is_global_zero)
            self.record.log_video(path, module.samples_seen)

    def _measure(self, trainer: pl.Trainer, module: Training, out: Path) -> None:
        """Every rank makes and measures its share; then the first finds all of it and writes the results."""
        if trainer.world_size > 1:
            self.bench(module, out, (trainer.global_rank, trainer.world_size))
            trainer.strategy.barrier("shares measured")
        if trainer.is_global_zero:
            self.record.log({"step": module.step, **self.bench(module, out, (0, 1))}, module.samples_seen)
        trainer.strategy.barrier("measured")

    def _log(self, trainer: pl.Trainer, module: Training) -> None:
        self._losses.append(module.last_step["train/loss"])
        if not due(module, self.every["log"]):
            return
        values = {
            "step": module.step,
            **module.last_step,
            "train/loss": sum(self._losses) / len(self._losses),  # the mean since the last line
            **self.pace.told(len(self._losses) * module.global_batch, module.device, trainer.world_size),
            "perf/memory_gib": memory_gib(),
        }
        self.record.log(values, module.samples_seen)
        self._losses = []

    def _save(self, module: Training, loss: float | None) -> None:
        state = {
            "samples_seen": module.samples_seen,
            "step": module.step,
            "time_s": self.record.seconds(),
            "validation_loss": loss if loss is not None and math.isfinite(loss) else None,
            "config": self.config,
        }
        if isinstance(module.trainer.strategy, ZeroStrategy):
            tensors = module.trainer.strategy.tensors()
        else:
            optimizer = checkpoints.optimizer_tensors(module, _optimizers(module))
            tensors = {"weights": module.weights(), "ema": module.ema_weights(), "optimizer": optimizer}
        self.saver.save(module.step, tensors, state)

    def _say(self, line: str) -> None:
        """A line that leaves the bar whole."""
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)

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

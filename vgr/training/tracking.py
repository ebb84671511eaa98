"""Where numbers go: metrics.jsonl always (the record), Weights & Biases when chosen."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from vgr.training.checkpoints import write_atomic


def versions() -> dict[str, str]:
    """Versions of the packages that decide results, and the commit of the checkout if there is one."""
    found = {}
    for name in ("vgr", "torch", "pytorch-lightning", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        answer = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
        found["commit"] = answer.stdout.strip() or "unknown"
    except OSError:
        found["commit"] = "unknown"
    return found


class JsonlLogger(Logger):
    """Appends one JSON object a line, flushed at once: samples_seen, time_s over all restarts, the values."""

    def __init__(self, path: Path, seconds_before: float = 0.0) -> None:
        super().__init__()
        self.path = path
        self._start = time.monotonic() - seconds_before
        self._file: TextIO | None = None

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    def seconds(self) -> float:
        """Wall-clock seconds this run has taken, earlier starts included as far as they were kept."""
        return time.monotonic() - self._start

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration stands in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        line = {"samples_seen": step, "time_s": round(self.seconds(), 3), **metrics}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    @rank_zero_only
    def close(self) -> None:
        """Close the file; a later line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @rank_zero_only
    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keep only complete lines that `keep` accepts: after a restart, those up to the checkpoint."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line a killed process was writing
            if keep(record):
                kept.append(line + "\n")
        write_atomic(self.path, "".join(kept))


class WandbLogger(Logger):
    """Weights & Biases, offline unless a key is set; one run per run folder over all restarts.

    mode: "auto", "online" or "offline". `open` is called once the run folder and configuration are known.
    """

    def __init__(self, project: str = "vgr", entity: str | None = None, mode: str = "auto") -> None:
        super().__init__()
        if mode not in ("auto", "online", "offline"):
            raise ValueError(f"logger.mode={mode}: choose auto, online or offline")
        self.project, self.entity, self.mode = project, entity, mode
        self._run: Any = None

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return self._run.id if self._run else ""

    @rank_zero_only
    def open(self, run_dir: Path, config: dict[str, Any]) -> None:
        """Start or continue the W&B run of run_dir. Raises ValueError if wandb is not installed."""
        try:
            import wandb
        except ImportError as error:
            raise ValueError("logger=wandb needs the wandb package: pip install wandb, or logger=none") from error
        if self.mode == "auto":
            has_key = os.environ.get("WANDB_API_KEY") or wandb.api.api_key
            self.mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        id_file = run_dir / "wandb_id"
        if not id_file.is_file():
            write_atomic(id_file, uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=run_dir.as_posix(),
            dir=str(run_dir),
            id=id_file.read_text().strip(),
            resume="allow",
            mode=self.mode,
            config={**config, "versions": versions()},
        )
        self._run.define_metric("samples_seen")
        self._run.define_metric("*", step_metric="samples_seen")

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration was given to `open`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._run.log({"samples_seen": step, **metrics})

    @rank_zero_only
    def log_video(self, path: Path, step: int) -> None:
        """A sample video (mp4 file)."""
        import wandb

        self._run.log({"samples_seen": step, "samples": wandb.Video(str(path), format="mp4")})

    @rank_zero_only
    def close(self) -> None:
        """End the W&B run; Lightning's own end of training comes before the final validation."""
        if self._run is not None:
            self._run.finish()
            self._run = None

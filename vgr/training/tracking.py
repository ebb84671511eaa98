"""Where numbers go: metrics.jsonl always (the record), Weights & Biases when chosen."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_only

from vgr.data.files import read_lines, write_text


class Record:
    """metrics.jsonl of a run: one JSON object a line with samples_seen, time_s over all restarts, the values.

    seconds_before: what earlier starts took; wandb_run: an open W&B run that is told the same. Only the first
    rank writes.
    """

    def __init__(self, path: Path, seconds_before: float = 0.0, wandb_run: Any = None) -> None:
        self.path, self.wandb_run = path, wandb_run
        self._start = time.monotonic() - seconds_before

    def seconds(self) -> float:
        """Wall-clock seconds this run has taken, earlier starts included as far as they were kept."""
        return time.monotonic() - self._start

    @rank_zero_only
    def log(self, values: dict[str, float], samples_seen: int) -> None:
        """Append one line. Raises OSError."""
        line = {"samples_seen": samples_seen, "time_s": round(self.seconds(), 3), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.wandb_run is not None:
            self.wandb_run.log({"samples_seen": samples_seen, **values})

    @rank_zero_only
    def log_video(self, path: Path, samples_seen: int) -> None:
        """A sample video (mp4 file), for W&B only."""
        if self.wandb_run is not None:
            import wandb

            self.wandb_run.log({"samples_seen": samples_seen, "samples": wandb.Video(str(path), format="mp4")})

    def close(self) -> None:
        """End the W&B run, if there is one."""
        if self.wandb_run is not None:
            self.wandb_run.finish()

    @rank_zero_only
    def rewind(self, samples_seen: int) -> None:
        """Keep only complete lines up to samples_seen, the position of the checkpoint continued from."""
        if self.path.is_file():
            kept = (line for line in read_lines(self.path) if line["samples_seen"] <= samples_seen)
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def asked(logger: str | None) -> bool:
    """Whether logger= is wandb; ValueError for another."""
    if logger not in (None, "wandb"):
        raise ValueError(f"logger={logger}: choose wandb, or null for metrics.jsonl alone")
    return logger is not None


@rank_zero_only
def start_wandb(
    run_dir: Path, config: dict[str, Any], project: str, entity: str | None, mode: str, job: str = "train",
    step: str = "samples_seen",
) -> Any:  # fmt: skip
    """The W&B run of run_dir, one over all restarts, of a job type, its curves over `step`.

    mode: online, offline, or auto: offline unless a key is set. Raises ValueError if wandb is not installed.
    """
    if mode not in ("auto", "online", "offline"):
        raise ValueError(f"wandb.mode={mode}: choose auto, online or offline")
    try:
        import wandb
    except ImportError as error:
        raise ValueError("logger=wandb needs the wandb package: pip install wandb, or logger=null") from error
    if mode == "auto":
        has_key = os.environ.get("WANDB_API_KEY") or wandb.api.api_key
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    id_file = run_dir / "wandb_id"
    if not id_file.is_file():
        write_text(id_file, uuid.uuid4().hex[:8])
    run = wandb.init(
        project=project, entity=entity, name=run_dir.as_posix(), dir=str(run_dir), id=id_file.read_text().strip(),
        resume="allow", mode=mode, config=config, job_type=job,
    )  # fmt: skip
    run.define_metric(step)
    run.define_metric("*", step_metric=step)
    return run

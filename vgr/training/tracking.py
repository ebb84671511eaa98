"""Where numbers go: metrics.jsonl always (the record), Weights & Biases when chosen."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_only

from vgr.data.files import read_lines, write_text
from vgr.training import code_state

FINISH_S = 60.0  # how long the end of a run waits for what W&B has not uploaded
_log = logging.getLogger(__name__)


class Record:
    """metrics.jsonl of a run: one JSON object a line with samples_seen, time_s over all restarts, the values.

    seconds_before: what earlier starts took; wandb_run: an open W&B run that is told the same, and say hears where it
    is. Only the first rank writes.
    """

    def __init__(
        self, path: Path, seconds_before: float = 0.0, wandb_run: Any = None, say: Callable[[str], Any] = _log.info
    ) -> None:
        self.path, self.wandb_run, self._say, self._failed = path, wandb_run, say, False
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
        self._tell(lambda run: run.log(line))

    @rank_zero_only
    def keep(self, inputs: Mapping[str, Any]) -> None:
        """inputs.json beside metrics.jsonl: what the run is made from, of all its starts; W&B has it too."""
        path = self.path.with_name("inputs.json")
        told = (json.loads(path.read_text()) if path.is_file() else {}) | dict(inputs)
        write_text(path, json.dumps(told, indent=1))
        self._tell(lambda run: run.config.update({"inputs": told}, allow_val_change=True))

    @rank_zero_only
    def log_video(self, path: Path, samples_seen: int) -> None:
        """A sample video (mp4 file), for W&B only."""

        def video(run: Any) -> None:
            import wandb

            run.log({"samples_seen": samples_seen, "samples": wandb.Video(str(path), format="mp4")})

        self._tell(video)

    def _tell(self, tell: Callable[[Any], Any]) -> None:
        """Tell W&B, if it is there. Whatever it raises is said once and stops nothing: metrics.jsonl is the record."""
        if self.wandb_run is None:
            return
        try:
            tell(self.wandb_run)
        except Exception as error:
            if not self._failed:
                _log.warning("W&B did not take a value (%s); metrics.jsonl has them all", _line(error))
            self._failed = True

    def close(self) -> None:
        """End the W&B run, if there is one; says where it is if something is still to be uploaded."""
        if self.wandb_run is None:
            return
        try:
            self.wandb_run.finish(exit_code=int(sys.exception() is not None))  # of a training that failed
        except Exception as error:
            self._say(f"W&B was not told everything ({_line(error)}). {_sync(self.wandb_run)}")
        else:
            if self.wandb_run.offline:
                self._say(where(self.wandb_run))

    @rank_zero_only
    def rewind(self, samples_seen: int) -> None:
        """Keep only complete lines up to samples_seen, the position of the checkpoint continued from."""
        if self.path.is_file():
            lines = read_lines(self.path)
            kept = (x for x in lines if x["samples_seen"] <= samples_seen and "diverged" not in x)  # that came later
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def start(
    run_dir: Path, config: dict[str, Any], samples_seen: int, seconds: float, wandb: Mapping[str, Any] | None,
    say: Callable[[str], Any],
) -> Record:  # fmt: skip
    """The record of a run from a position on, with the code it starts with in run_dir; wandb: of `start_wandb`."""
    code = rank_zero_only(code_state.save)(run_dir, samples_seen)
    run = None if wandb is None else start_wandb(run_dir, {**config, "code": code}, **wandb)
    record = Record(run_dir / "metrics.jsonl", seconds, run, say)
    record.rewind(samples_seen)
    if run is not None:
        say(where(run))
    return record


def asked(logger: str | None) -> bool:
    """Whether logger= is wandb; ValueError for another."""
    if logger not in (None, "wandb"):
        raise ValueError(f"logger={logger}: choose wandb, or null for metrics.jsonl alone")
    return logger is not None


@rank_zero_only
def start_wandb(
    run_dir: Path, config: dict[str, Any], project: str, entity: str | None, mode: str, job: str = "train",
    step: str = "samples_seen", group: str | None = None, tags: Sequence[str] = (), code: bool = False,
) -> Any:  # fmt: skip
    """The W&B run of run_dir, one over all restarts, of a job type, its curves over `step`.

    mode: online, offline, or auto: offline unless a key is set. A server that cannot be reached makes it offline, and
    where that fails too there is none (None). group: null is run_dir's arm, in which its seeds stand together; tags:
    beside the classes of model and training; code: upload the patches that stand in run_dir. Raises ValueError if
    wandb is not installed.
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
    kinds = [config[k]["_target_"].rpartition(".")[2] for k in ("model", "training") if k in config]
    settings = {
        "project": project, "entity": entity, "name": run_dir.as_posix(), "config": config,
        "dir": str(run_dir.resolve()),  # W&B's own process stays in the folder it was started in
        "id": id_file.read_text().strip(), "resume": "allow", "job_type": job, "tags": [*tags, *kinds],
        "group": group or (os.path.relpath(run_dir.parent, config["runs"]) if "runs" in config else None),
        # Its own look at git would upload the user's changes; its own lines would be many. A run that an earlier job of
        # this process left open must not be this one.
        "settings": wandb.Settings(
            disable_git=True, silent=True, finish_timeout=FINISH_S, finish_timeout_raises=True,
            reinit="finish_previous",
        ),
    }  # fmt: skip
    for chosen in dict.fromkeys((mode, "offline")):
        try:
            run = wandb.init(mode=chosen, **settings)
            break
        except Exception as error:
            kept = "offline" if chosen != "offline" else "in metrics.jsonl alone"
            _log.warning("no W&B run %s (%s); this start is kept %s", chosen, _line(error), kept)
            wandb.teardown()  # else the id counts as in use
    else:
        return None
    run.define_metric(step)
    run.define_metric("*", step_metric=step)
    if code and (patches := sorted(run_dir.glob("code-*.diff"))):
        artifact = wandb.Artifact(f"code-{run.id}", type="code")
        for patch in patches:
            artifact.add_file(str(patch))
        run.log_artifact(artifact)
    return run


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def where(run: Any) -> str:
    """The line that says where a W&B run is."""
    return f"W&B offline: {_folder(run)}. {_sync(run)}" if run.offline else f"W&B: {run.url}"


def _folder(run: Any) -> Path:
    """W&B's folder of this start, as a user here would name it."""
    folder = Path(run.settings.sync_dir)
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _sync(run: Any) -> str:
    """What uploads this start and, offline, those before it, into one run."""
    folder = _folder(run)
    folder = folder.parent / f"offline-run-*-{run.id}" if run.offline else folder
    return f"To upload: wandb sync {folder}"

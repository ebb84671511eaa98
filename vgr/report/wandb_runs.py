"""Training runs from Weights & Biases: the files of its runs on disk, which need no network, and its server.

The server path is tested against a local imitation of its API only (tests/integration/fake_wandb.py).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vgr.report.runs import RunRecord, Settle, record

BLOCK, HEADER = 32768, struct.Struct("<IHB")  # of LevelDB's log, which the files are: crc32, length, kind of a chunk
FULL, LAST = 1, 4


def files(folder: Path) -> list[Path]:
    """The .wandb files of a run's folder, of W&B's folder in it, of one start, or the file itself; each once."""
    found = [folder] if folder.suffix == ".wandb" else folder.rglob("run-*.wandb")
    return sorted({path.resolve(): path for path in found}.values(), key=lambda p: p.parent.name.rpartition("run-")[2])


def from_files(paths: Sequence[Path], settle: Settle) -> list[RunRecord]:
    """One record for each id: a run that was requeued has a file for every start, in whose order they are read.

    Only training runs are given. ValueError for what is no file of W&B.
    """
    starts: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path in paths:
        told = _start(path)
        starts.setdefault(told["id"], []).append((path, told))
    out = []
    for identity, found in starts.items():
        found = [x for x in found if any("samples_seen" in row for row in x[1]["rows"])]
        if not found or found[-1][1]["job"] not in ("", "train"):
            continue
        config, lines, before = {}, [], 0.0
        for _, told in found:
            config |= told["config"]
            lines += _timed(told["rows"], before)
            before = max(row.get("time_s", 0.0) for row in lines)
        path, last = found[-1]
        media = [(path.parent / "files" / x["path"]).as_posix() for x in _videos(lines)]
        out.append(_made(path.parent.as_posix(), last["name"], config, lines, settle, identity, last["project"], media))
    return out


def from_server(place: str, filters: Mapping[str, Any] | str | None, settle: Settle) -> list[RunRecord]:
    """Training runs of entity/project. filters: as `wandb.Api.runs` takes them, or their JSON. Raises ValueError."""
    import wandb

    try:
        chosen = json.loads(filters) if isinstance(filters, str) else dict(filters or {})
    except ValueError:
        raise ValueError(f"filters={filters}: no JSON; such as filters={{group: world_model/tiny}}") from None
    out = []
    try:
        for run in wandb.Api().runs(place, filters=chosen, lazy=False):
            if (run.job_type or "train") == "train":
                rows = run.scan_history(use_cache=False)
                lines = _timed([row for row in rows if row.get("samples_seen") is not None])
                media = [f"{run.url}/files/{x['path']}" for x in _videos(lines)]
                out.append(_made(run.url, run.name or run.id, run.config, lines, settle, run.id, place, media))
    except (wandb.Error, ValueError, OSError) as error:
        told = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"wandb={place} cannot be read: {told}; give entity/project, a key (wandb login)") from error
    if not out:
        raise ValueError(f"wandb={place} filters={json.dumps(chosen)}: no training run there; give other filters")
    return out


def _made(
    source: str, name: str, config: Mapping[str, Any], lines: Sequence[dict[str, Any]], settle: Settle, identity: str,
    project: str, media: Sequence[str],
) -> RunRecord:  # fmt: skip
    more = {"wandb_id": identity, "project": project, "media": tuple(media[-1:])}
    return record(source, name, config, lines, settle, config.get("inputs"), config.get("code"), **more)


def _timed(rows: Sequence[Mapping[str, Any]], before: float = 0.0) -> list[dict[str, Any]]:
    """With seconds since the run began; where none were logged W&B's own of this start, after `before`."""
    if any("time_s" in row for row in rows):
        return [dict(row) for row in rows]
    return [{"time_s": before + row.get("_runtime", 0.0), **row} for row in rows]


def _videos(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [x for line in lines for x in line.values() if isinstance(x, Mapping) and x.get("_type") == "video-file"]


def _start(path: Path) -> dict[str, Any]:
    """What one file holds: id, name, project, job, config, rows. What a kill cut short at its end is left out."""
    from wandb.proto import wandb_internal_pb2

    identity = path.stem.removeprefix("run-")
    out: dict[str, Any] = {"id": identity, "name": identity, "project": "", "job": "", "config": {}, "rows": []}
    for data in _chunks(path):
        told = wandb_internal_pb2.Record.FromString(data)
        kind = told.WhichOneof("record_type")
        if kind == "run":
            run = told.run
            project = "/".join(filter(None, (run.entity, run.project)))
            out |= {"id": run.run_id, "name": run.display_name or run.run_id, "project": project, "job": run.job_type}
        if kind in ("run", "config"):
            for item in (told.run.config if kind == "run" else told.config).update:
                _put(out["config"], item)
        elif kind == "history":
            row: dict[str, Any] = {}
            for item in told.history.item:
                _put(row, item)
            out["rows"] += [row] if row.get("samples_seen") is not None else []
    return out


def _put(into: dict[str, Any], item: Any) -> None:
    *groups, key = item.nested_key or [item.key]
    for group in groups:
        into = into.setdefault(group, {})
    into[key] = json.loads(item.value_json)


def _chunks(path: Path) -> Iterator[bytes]:
    """The records of a file, in order; up to the first that is not whole."""
    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise ValueError(f"{path} is no file of Weights & Biases: it does not begin with its mark")
    at, parts = 7, b""
    while at + HEADER.size <= len(data):
        if (left := BLOCK - at % BLOCK) < HEADER.size:
            at += left
            continue
        crc, length, kind = HEADER.unpack_from(data, at)
        at += HEADER.size + length
        body = data[at - length : at]
        if len(body) < length or zlib.crc32(bytes([kind]) + body) != crc:
            return
        parts += body
        if kind in (FULL, LAST):
            yield parts
            parts = b""

"""Training runs in one form, wherever they were kept: a run's folder, Weights & Biases' files of it, or its server."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vgr.data.files import read_lines
from vgr.metrics.statistics import by_unit
from vgr.report.sets import fingerprint, read_info
from vgr.report.summary import number

CURVE_POINTS = 60  # of a curve that is kept; more are averaged in blocks
Settle = Callable[[Mapping[str, Any], int], dict[str, Any]]  # resolved configuration, seed -> what changes results


@dataclass(frozen=True)
class RunRecord:
    """One seed of one arm.

    source: where it was read. config: what of its settings changes results, flat, {} where only its hash was kept.
    protocol, data, weights: what must be equal side by side, by name: how it was validated and measured, hashes of
    shards, of what it started from; a name that is missing is not known. metrics: the last values of val/* and
    bench/*; clips: metric -> clip (or its prompt or scene) -> value, None where it has failed; curves: metric ->
    columns samples, hours, values; cost: hours, memory_gib, parameters. samples: seen and wanted. command: goes on with
    it. diverged: the step at which its loss was no number any more. project: of W&B.
    """

    source: str
    arm: str
    seed: int
    config_sha256: str
    protocol: dict[str, Any]
    data: dict[str, str]
    weights: dict[str, str]
    metrics: dict[str, float]
    clips: dict[str, dict[str, float | None]]
    curves: dict[str, list[list[float]]]
    cost: dict[str, float]
    samples: tuple[int, int]
    command: str
    diverged: int | None = None
    device: str = ""
    wandb_id: str | None = None
    project: str | None = None
    media: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)


def merged(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Logged lines, in their order, as one line a position: a run that was killed goes on from its checkpoint, and what
    it had logged after that is logged again. The later counts."""
    kept: dict[int, dict[str, Any]] = {}
    last = -1
    for line in lines:
        seen = int(line["samples_seen"])
        if seen < last:
            kept = {at: x for at, x in kept.items() if at < seen}
        kept[seen] = kept.get(seen, {}) | dict(line)
        last = seen
    return [kept[at] for at in sorted(kept)]


def record(
    source: str, name: str, config: Mapping[str, Any], lines: Iterable[Mapping[str, Any]], settle: Settle,
    inputs: Mapping[str, Any] | None = None, code: Mapping[str, Any] | None = None, **more: Any,
) -> RunRecord:  # fmt: skip
    """A run by what every place has of it: its name (<runs>/<arm>/seed<k>), resolved configuration and logged lines.

    inputs: of inputs.json; code: the start told last. ValueError where it is no training run of ours.
    """
    if not {"seed", "runs", "training"} <= config.keys():
        raise ValueError(f"{source} is no run of vgr-train: its configuration has no seed, runs and training")
    rows, training, seed = merged(lines), config["training"], int(config["seed"])
    told = [{k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)} for row in rows]
    last = {k: v for row in told for k, v in row.items()}
    protocol = {"training.validation_levels": training.get("validation_levels"),
                "training.packed": training.get("packed", False), **_of(last, "val/clips")}  # fmt: skip
    settings, given = settle(config, seed), dict(inputs or {})
    weights = {"init_from": given["init_from"]} if "init_from" in given else {}
    weights |= {} if config.get("init_from") else {"init_from": "nothing"}
    words = shlex.split(str((code or {}).get("command") or ""))[1:]
    memory = [row["perf/memory_gib"] for row in told if "perf/memory_gib" in row]
    cost = {"hours": last.get("time_s", 0.0) / 3600} | ({"memory_gib": max(memory)} if memory else {})
    made = RunRecord(
        source=source, arm=arm_of(name, config), seed=seed, config=settings, config_sha256=_sha256(settings),
        protocol=_plain(protocol) | _of(given, "bench"), data=_of(given, "data.train", "data.val"), weights=weights,
        metrics={k: v for k, v in last.items() if k.startswith(("val/", "bench/")) and k != "val/clips"},
        clips={}, curves=_curves(told), samples=(int(last.get("samples_seen", 0)), int(training["max_samples"])),
        cost=cost | _of(given, "parameters"),
        command=shlex.join(["vgr-train", *(words or [f"experiments={arm_of(name, config)}", f"seed={seed}"])]),
        device=str((code or {}).get("device") or ""), diverged=told[-1].get("diverged") if told else None,
    )  # fmt: skip
    return replace(made, **more)


def read_run(folder: Path, settle: Settle, protocol: str | None = None) -> RunRecord:
    """A run's folder. protocol: of the benchmark results in it that count; null: the only one's. Raises ValueError."""
    import yaml

    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    code = _json(folder / "code.json") or [{}]
    identity = folder / "wandb_id"
    own = config.get("wandb") or {}
    found = record(
        folder.as_posix(), folder.resolve().as_posix(), config, read_lines(folder / "metrics.jsonl"), settle,
        _json(folder / "inputs.json") or _inputs_now(config), code[-1],
        wandb_id=identity.read_text().strip() if identity.is_file() else None,
        project="/".join(filter(None, (own.get("entity"), own.get("project")))) or None,
        media=tuple(p.as_posix() for p in sorted((folder / "samples").glob("*.mp4"))[-1:]),
    )  # fmt: skip
    clips = _validated(_json(folder / "validation.json"), found.metrics)
    benches = _benches(folder, found.samples[0])
    if protocol is None and len(benches) > 1:
        raise ValueError(f"{folder} has results of {', '.join(benches)}; choose one: protocol={min(benches)}")
    named = protocol or next(iter(benches), config.get("bench"))
    metrics, kept = found.metrics, found.protocol
    if named in benches or named != config.get("bench"):  # of another protocol than that between steps
        sha256, own, values = benches.get(named, (None, {}, {}))
        metrics = {k: v for k, v in metrics.items() if not k.startswith("bench/")} | own
        kept, clips = {k: v for k, v in kept.items() if k != "bench"}, clips | values
        kept |= {"bench": sha256} if sha256 else {}
    return replace(found, clips=clips, metrics=metrics, protocol=kept)


def is_run(folder: Path) -> bool:
    """Whether it is a training run's folder."""
    return all((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl"))


def below(folder: Path) -> list[Path]:
    """The run folders below a folder, in the order of their names."""
    return [path.parent for path in sorted(folder.rglob("config.yaml")) if is_run(path.parent)]


def arm_of(name: str, config: Mapping[str, Any]) -> str:
    """What a run's seeds have in common, of the run's folder as it was named: its path below `runs` up to the seed."""
    parts, base = Path(name).parts, Path(str(config.get("runs", "runs"))).name
    below = len(parts) - parts[::-1].index(base) if base in parts else len(parts) - 2
    return "/".join(parts[max(below, 0) : -1]) or parts[-1]


def once(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Each run once, as it was found first. ValueError for two runs that are one seed of one arm."""
    found: dict[str, RunRecord] = {}
    for one in records:
        found.setdefault(one.wandb_id or one.source, one)
    places: dict[tuple[str, int], RunRecord] = {}
    for one in found.values():
        other = places.setdefault((one.arm, one.seed), one)
        if other is not one:
            both = f"{other.source} and {one.source}"
            raise ValueError(f"{both} are both seed {one.seed} of {one.arm}; leave one of them out")
    return list(found.values())


def _of(told: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {k: told[k] for k in keys if k in told}


def _curves(rows: Sequence[Mapping[str, float]]) -> dict[str, list[list[float]]]:
    keys = dict.fromkeys(k for row in rows for k in row if k.startswith(("val/", "bench/", "train/loss")))
    out = {}
    for key in keys.keys() - {"val/clips"}:
        points = [(row["samples_seen"], row.get("time_s", 0.0) / 3600, row[key]) for row in rows if key in row]
        blocks = np.array_split(np.array(points, dtype=np.float64), min(CURVE_POINTS, len(points)))
        out[key] = [[float(f"{x:.6g}") for x in column] for column in np.array([b.mean(0) for b in blocks]).T]
    return out


def _validated(told: Any, metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Values by clip of validation.json, where it is of the last validation that was logged."""
    if not told or told["summary"].get("val/loss") != metrics.get("val/loss"):
        return {}
    out: dict[str, dict[str, float]] = {"val/loss": {c["key"]: float(np.mean(c["loss"])) for c in told["clips"]}}
    for i, level in enumerate(told["levels"]):
        out[f"val/loss_t{level:g}"] = {c["key"]: c["loss"][i] for c in told["clips"]}
    if all("loss_shuffled_camera" in c for c in told["clips"]):
        other = {c["key"]: float(np.mean(c["loss_shuffled_camera"])) for c in told["clips"]}
        out |= {"val/loss_shuffled_camera": other}
        out["val/camera_gain"] = {k: other[k] - own for k, own in out["val/loss"].items()}
    return out


def _benches(folder: Path, seen: int) -> dict[str, tuple[str, dict[str, float], dict[str, Any]]]:
    """protocol -> its sha256, the model's metrics, and their values by prompt or scene. Of the last step's results and
    one of `vgr-bench` by the same protocol the former."""
    out = {}
    for path in sorted(folder.glob("bench/*/results.json"), key=lambda p: p.parent.name.isdigit()):
        if path.parent.name.isdigit() and int(path.parent.name) != seen:
            continue
        found, values = _json(path), defaultdict(lambda: defaultdict(list))
        units = read_info(path.parent / found.get("sets", {}).get("model", "model")).get("units", {})
        cells = found["rows"]["model"]["metrics"].items()
        metrics = {f"bench/{k}": cell["value"] for k, cell in cells if cell["value"] is not None}
        for line in (x for x in read_lines(path.parent / "videos.jsonl") if x.get("row") == "model"):
            unit = str(units.get(line["key"], line["key"]))
            for key, value in ((f"bench/{k}", v) for k, v in line.items() if f"bench/{k}" in metrics):
                values[key][unit].append(math.nan if value is None else value)
        told = {k: {u: number(by_unit(x, [u] * len(x))[0]) for u, x in own.items()} for k, own in values.items()}
        out[found["protocol"]["name"]] = (found["protocol"]["sha256"], metrics, told)
    return out


def _inputs_now(config: Mapping[str, Any]) -> dict[str, str]:
    """Of a run that kept no inputs.json: hashes of the shards that lie now where its settings say."""
    places = {f"data.{k}": config.get("data", {}).get(k) for k in ("train", "val")}
    manifests = {k: Path(x) / "manifest.json" for k, x in places.items() if isinstance(x, str)}
    return {k: fingerprint([_json(path)]) for k, path in manifests.items() if path.is_file()}


def _json(path: Path) -> Any:
    """What a JSON file holds, None where there is none. ValueError for what is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged, no JSON ({error})") from None


def _plain(value: Any) -> Any:
    """Whole numbers as int, lists as lists: servers keep 1.0 as 1."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sha256(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_plain(dict(settings)), sort_keys=True, default=str).encode()).hexdigest()

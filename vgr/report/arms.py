"""Arms side by side, each a setting trained from several seeds: the content of compare.json.

Differences are to the first arm, seed by seed and clip by clip, by `vgr.metrics.statistics.crossed`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vgr.metrics.statistics import crossed, discoveries
from vgr.report.runs import RunRecord
from vgr.report.summary import Cell, cell, number
from vgr.report.table import METRICS

TOLD = {
    "val/loss": ("Validation loss", "", "lower"),
    "val/camera_gain": ("Camera gain", "", "higher"),
    "val/loss_shuffled_camera": ("Validation loss, shuffled cameras", "", ""),
    "train/loss": ("Training loss", "", "lower"),
}  # label, unit, better
COST = {"hours": "Hours", "memory_gib": "GiB", "parameters": "Parameters, M"}


def compare(
    runs: Sequence[RunRecord], metrics: Sequence[str] | None = None, *, title: str = "", anyway: bool = False,
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The content of compare.json: arms in the order of the runs, the first of which the others are compared with.

    metrics: null for what all runs have of the validation and the benchmark's table. labels: of arms, for people.
    anyway: what keeps runs apart is told in the notes instead of refused. Raises ValueError, naming runs and keys.
    """
    wanted = list(metrics or _shared(runs))
    notes = _refuse(runs, wanted, anyway)
    arms: dict[str, list[RunRecord]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    arms = {arm: sorted(own, key=lambda r: r.seed) for arm, own in arms.items()}
    first, *others = arms
    told = _differences(arms, wanted)
    curves = dict.fromkeys([*wanted, "train/loss"])
    return {
        "format": 1,
        "title": title or " / ".join(arms),
        "metrics": {k: told_of(k) for k in wanted},
        "curves": {k: told_of(k) for k in curves if any(k in r.curves for r in runs)},
        "arms": [
            {"arm": arm, "label": (labels or {}).get(arm, arm), **_told(own, wanted, curves)}
            for arm, own in arms.items()
        ],
        "differences": told,
        "settings": _settings(arms),
        "notes": notes + _told_apart(arms, first, others),
    }  # fmt: skip


def _told(runs: Sequence[RunRecord], metrics: Sequence[str], curves: Iterable[str]) -> dict[str, Any]:
    """What compare.json tells of one arm; its means are over the seeds that did not diverge."""
    whole = [r for r in runs if r.diverged is None]
    return {
        "seeds": [r.seed for r in runs],
        "diverged": {str(r.seed): r.diverged for r in runs if r.diverged is not None},
        "metrics": {k: cell(crossed(_values(whole, k)[0])[0]) for k in metrics if whole},
        "cost": _cost(whole or runs),
        "curves": {k: _band([r.curves[k] for r in runs if k in r.curves]) for k in curves
                   if any(k in r.curves for r in runs)},
        "runs": [{"source": r.source, "seed": r.seed, "hours": r.cost["hours"], "wandb_id": r.wandb_id,
                  "media": list(r.media), "device": r.device, "config_sha256": r.config_sha256} for r in runs],
    }  # fmt: skip


def told_of(metric: str) -> dict[str, str]:
    """Label, unit and direction (higher, lower or neither) of a metric as metrics.jsonl names it."""
    if (known := METRICS.get(metric.removeprefix("bench/"))) and metric.startswith("bench/"):
        return {"label": known.label, "unit": known.unit, "better": known.better}
    if metric.startswith("val/loss_t"):
        return {"label": f"Validation loss at t = {metric.removeprefix('val/loss_t')}", "unit": "", "better": "lower"}
    return dict(zip(("label", "unit", "better"), TOLD.get(metric, (metric, "", ""))))


def differing(runs: Sequence[RunRecord], terms: str) -> dict[str, list[list[RunRecord]]]:
    """By name the runs that agree on it, where not all that know it do. terms: protocol, data or weights."""
    out = {}
    for key in dict.fromkeys(k for run in runs for k in getattr(run, terms)):
        groups: dict[str, list[RunRecord]] = {}
        for run in runs:
            if key in getattr(run, terms):
                groups.setdefault(json.dumps(getattr(run, terms)[key]), []).append(run)
        if len(groups) > 1:
            out[key] = list(groups.values())
    return out


def _refuse(runs: Sequence[RunRecord], metrics: Sequence[str], anyway: bool) -> list[str]:
    """Sentences about what keeps runs from standing side by side; raised all the same unless `anyway`. What has no
    results is raised in any case."""
    if not metrics or not runs:
        names = ", ".join(run.source for run in runs) or "no run"
        command = runs[0].command if runs else "vgr-train"
        raise ValueError(f"{names}: there is no result that all of them have; `{command}` makes them")
    for run in (r for r in runs if r.diverged is None):
        if missing := [k for k in metrics if k not in run.metrics]:
            bench = missing[0].startswith("bench/")
            how = f"vgr-bench checkpoint={run.source} protocol=<name>" if bench and run.metrics else run.command
            raise ValueError(f"{run.source} has no {', '.join(missing)}; `{how}` makes it")
    told = [f"{run.source} has seen {run.samples[0]} of {run.samples[1]} samples; `{run.command}` goes on"
            for run in runs if run.samples[0] < run.samples[1] and run.diverged is None]  # fmt: skip
    found = [(terms, runs) for terms in ("protocol", "data")]
    found += [("weights", [r for r in runs if r.seed == seed]) for seed in sorted({r.seed for r in runs})]
    for terms, among in found:
        for key, (one, other, *_) in differing(among, terms).items():
            a, b = one[0], other[0]
            values = " and ".join(str(getattr(x, terms)[key])[:60] for x in (a, b))
            told.append(f"{a.source} and {b.source} are of different {terms}: {key} is {values}")
    for arm in dict.fromkeys(r.arm for r in runs):
        own = [r for r in runs if r.arm == arm]
        a, b = own[0], next((r for r in own if r.config_sha256 != own[0].config_sha256), None)
        if b is not None:
            keys = [k for k in a.config.keys() | b.config.keys() if a.config.get(k) != b.config.get(k)]
            told.append(f"{a.source} and {b.source} are seeds of {arm} with different settings: "
                        f"{', '.join(sorted(keys)) if a.config and b.config else 'see their config.yaml'}")  # fmt: skip
    if told and not anyway:
        raise ValueError(f"{'; '.join(told)}. Leave these out, or anyway=true compares them and says so")
    return told


def _shared(runs: Sequence[RunRecord]) -> list[str]:
    table = ["val/loss", "val/camera_gain", *(f"bench/{k}" for k, m in METRICS.items() if m.primary)]
    whole = [run for run in runs if run.diverged is None]
    return [k for k in table if whole and all(k in run.metrics for run in whole)]


def _values(runs: Sequence[RunRecord], metric: str) -> tuple[NDArray[np.float64], list[str]]:
    """(S,C) by seed and clip, and the clips that all have; without values by clip (S,1), and no clip."""
    own = [run.clips.get(metric, {}) for run in runs]
    keys = [k for k in own[0] if all(k in x for x in own)]
    if not keys:
        return np.array([[run.metrics[metric]] for run in runs], dtype=np.float64), []
    return np.array([[x[k] for k in keys] for x in own], dtype=np.float64), keys


def _differences(arms: Mapping[str, Sequence[RunRecord]], metrics: Sequence[str]) -> list[Cell]:
    """arm - first of every metric, over seeds that both ended and clips that both have; one family of tests.

    verdict: better or worse, by the metric's direction, of what stands, `differs` where it has none; else empty.
    """
    (_, base), *others = ((arm, [r for r in own if r.diverged is None]) for arm, own in arms.items())
    out = []
    for metric in metrics:
        for arm, own in others:
            seeds = [r.seed for r in own if r.seed in {x.seed for x in base}]
            a, b = ([r for r in side if r.seed in seeds] for side in (own, base))
            if not seeds:
                continue
            (mine, keys), (theirs, known) = _values(a, metric), _values(b, metric)
            both = [k for k in keys if k in known]
            if both:
                mine, theirs = mine[:, [keys.index(k) for k in both]], theirs[:, [known.index(k) for k in both]]
            elif keys or known:  # no clip in common: each by its own mean
                mine, theirs = (np.array([[r.metrics[metric]] for r in side]) for side in (a, b))
            found, p = crossed(mine - theirs)
            out.append({"arm": arm, "metric": metric, **cell(found), "seeds": len(seeds), "p": number(p)})
    stands = discoveries([np.nan if c["p"] is None else c["p"] for c in out])
    for c, x in zip(out, stands):
        good = {"higher": c["value"] > 0, "lower": c["value"] < 0}.get(told_of(c["metric"])["better"])
        c |= {"stands": bool(x), "verdict": {None: "differs", True: "better", False: "worse"}[good] if x else ""}
    return out


def _cost(runs: Sequence[RunRecord]) -> dict[str, float]:
    """Hours of a seed (mean), peak memory (of any), parameters in millions, as far as they are known."""
    found = {"hours": float(np.mean([r.cost["hours"] for r in runs]))}
    if memory := [r.cost["memory_gib"] for r in runs if "memory_gib" in r.cost]:
        found["memory_gib"] = max(memory)
    if all("parameters" in r.cost for r in runs):
        found["parameters"] = runs[0].cost["parameters"] / 1e6
    return found


def _band(curves: Sequence[Sequence[Sequence[float]]]) -> dict[str, list[float | None]]:
    """Mean over seeds at the first's samples, their hours, and the least and largest seed."""
    grid = np.array(curves[0][0], dtype=np.float64)
    grid = grid[(grid >= max(c[0][0] for c in curves)) & (grid <= min(c[0][-1] for c in curves))]
    hours, values = (np.array([np.interp(grid, c[0], c[i]) for c in curves]) for i in (1, 2))
    columns = {"samples": grid, "hours": hours.mean(0), "value": values.mean(0)}
    columns |= {"low": values.min(0), "high": values.max(0)} if len(curves) > 1 else {}
    return {k: [float(f"{x:.6g}") for x in column] for k, column in columns.items()}


def _settings(arms: Mapping[str, Sequence[RunRecord]]) -> dict[str, dict[str, Any]]:
    """What differs between arms, as far as their settings are known: key -> arm -> value."""
    known = {arm: own[0].config for arm, own in arms.items() if own[0].config}
    keys = sorted({k for config in known.values() for k in config})
    told = {k: {arm: config.get(k) for arm, config in known.items()} for k in keys}
    return {k: x for k, x in told.items() if len({json.dumps(v, default=str) for v in x.values()}) > 1}


def _told_apart(arms: Mapping[str, Sequence[RunRecord]], first: str, others: Sequence[str]) -> list[str]:
    """Plain sentences about what a reader should know of these numbers."""
    runs = [run for own in arms.values() for run in own]
    told = []
    if unknown := [f"{k} of {r.source}" for r in runs for k in ("data.train", "data.val") if k not in r.data]:
        more = f" and {len(unknown) - 1} more" if unknown[1:] else ""
        told.append(f"Whether the data is the same is not known everywhere: {unknown[0]}{more}.")
    if alone := [arm for arm, own in arms.items() if len(own) == 1]:
        told.append(f"One seed only: {', '.join(alone)}. Its intervals are over clips, and nothing is tested.")
    seeds = {arm: {r.seed for r in own} for arm, own in arms.items()}
    if unlike := [arm for arm in others if seeds[arm] != seeds[first]]:
        told.append(f"Not of the seeds of {first}: {', '.join(unlike)}. Differences are over those that both have.")
    if len(devices := dict.fromkeys(r.device for r in runs if r.device)) > 1:
        told.append(f"Hours are of several devices: {'; '.join(devices)}.")
    return told

"""A study's results.json, which keeps what its runs came to, and the table of its README, made of that alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vgr.data.files import write_text
from vgr.report import arms, arms_tables
from vgr.report.runs import RunRecord

MARKS = ("<!-- vgr-compare -->", "<!-- /vgr-compare -->")
NOT_RUN = "Not run yet.\n"


def table(study: Any, results: Mapping[str, Any] | None) -> str:
    """What stands between the marks of the study's README. study: of vgr.studies; results: of results.json, or None."""
    runs = records(results)
    return arms_tables.markdown(content(study, runs)) if runs else NOT_RUN


def content(study: Any, runs: Sequence[RunRecord], anyway: bool = True) -> dict[str, Any]:
    """compare.json of a study's runs, in the order of its arms, with the published row it answers to."""
    order = {arm.name: i for i, arm in enumerate(study.arms)}
    ordered = sorted(runs, key=lambda r: (order[r.arm], r.seed))
    labels = {arm.name: arm.label for arm in study.arms}
    found = arms.compare(ordered, study.metrics, title=study.question, anyway=anyway, labels=labels)
    reference = None
    if study.reference is not None:
        place = study.folder.parents[1] / "benchmarks" / "references" / f"{study.reference['name']}.json"
        reference = json.loads(place.read_text(encoding="utf-8"))
    there = {(run.arm, run.seed) for run in runs}
    if absent := [f"{arm.name} {seed}" for arm in study.arms for seed in study.seeds if (arm.name, seed) not in there]:
        found["notes"].append(f"Not run yet, by arm and seed: {', '.join(absent)}.")
    return found | {"published": arms_tables.published(study, reference)}


def read(study: Any) -> dict[str, Any] | None:
    """results.json of a study, None where there is none. Raises ValueError for one that is damaged."""
    path = study.folder / "results.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged, no JSON ({error}); take it from git again") from None
    if found is not None and found.get("format") != 1:
        raise ValueError(f"{path} has format {found.get('format')}, this version reads format 1")
    return found


def records(results: Mapping[str, Any] | None) -> list[RunRecord]:
    """The runs that results.json keeps."""
    return [RunRecord(**{**run, "samples": tuple(run["samples"])}) for run in (results or {"runs": []})["runs"]]


def merge(study: Any, kept: Sequence[RunRecord], found: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs found now in place of what was kept of the same arm and seed, thinned to what the study shows.

    Of arms and seeds that the study no longer has nothing is kept.
    """

    def kept_of(told: Mapping[str, Any]) -> dict[str, Any]:
        return {k: told[k] for k in (*study.metrics, "train/loss") if k in told}

    fresh = []
    for run in found:
        clips = {k: {clip: _short(x) for clip, x in own.items()} for k, own in kept_of(run.clips).items()}
        told = {"metrics": kept_of(run.metrics), "clips": clips, "curves": kept_of(run.curves)}
        fresh.append(replace(run, **told))
    both = {(run.arm, run.seed): run for run in (*kept, *fresh)}
    return [both[arm.name, seed] for arm in study.arms for seed in study.seeds if (arm.name, seed) in both]


def write(study: Any, runs: Sequence[RunRecord]) -> None:
    """results.json, a line a run, and the README's table, which follows from it. ValueError as `rewritten`."""
    lines = ",\n".join(json.dumps(asdict(replace(run, config={}, media=())), allow_nan=False) for run in runs)
    results = f'{{"format": 1, "study": {json.dumps(study.name)}, "runs": [\n{lines}\n]}}\n'
    path = study.folder / "README.md"
    text = rewritten(path, table(study, json.loads(results)))
    write_text(study.folder / "results.json", results)
    write_text(path, text)


def rewritten(path: Path, told: str) -> str:
    """A README's text with `told` between its marks. Raises ValueError where it has not one pair of them."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (begin and end):
        raise ValueError(f"{path} has no {MARKS[0]} ... {MARKS[1]}; put both where its table is to stand")
    return f"{before}{begin}\n\n{told}\n{end}{after}"  # a blank line before a table, or it is none


def between(text: str) -> str:
    """What stands between the marks of a README's text, as `table` gives it."""
    return text.partition(MARKS[0])[2].partition(MARKS[1])[0].strip("\n") + "\n"


def _short(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.6g}")

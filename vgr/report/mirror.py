"""A benchmark's results in a Weights & Biases run: the same numbers as results.json, to be compared across runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vgr.report.sets import VideoSet

SHOWN = 24  # videos of a row that go into the table; the others have their numbers


def mirror(
    run: Any, out: Path, results: dict[str, Any], per_video: Sequence[Mapping[str, Any]], sets: Mapping[str, VideoSet]
) -> None:
    """Summary <row>/<metric> with both ends of its interval, a table `videos` with one row per row and video, curves
    over seconds (step `time_s`), and an artifact of results.json, videos.jsonl and report.html; then the run ends."""
    import wandb

    for row, told in results["rows"].items():
        for name, cell in told["metrics"].items():
            for end in ("value", "low", "high"):
                if cell.get(end) is not None:
                    run.summary[f"{row}/{name}" + ("" if end == "value" else f"_{end}")] = cell[end]
    names = sorted({k for line in per_video for k in line} - {"row", "key"})
    table, shown = wandb.Table(columns=["row", "key", "caption", "video", *names]), defaultdict(int)
    for line in per_video:
        row, key = line["row"], line["key"]
        shown[row] += 1
        file = sets[row].folder / f"{key}.mp4"
        video = wandb.Video(str(file), format="mp4") if shown[row] <= SHOWN else None
        table.add_data(row, key, " / ".join(results["captions"][key]), video, *(line.get(name) for name in names))
    run.log({"videos": table})
    points: dict[float, dict[str, float]] = defaultdict(dict)
    for row, curve in results["curves"].items():
        for name in curve.keys() - {"times_s"}:
            for time_s, value in zip(curve["times_s"], curve[name]["value"]):
                points[time_s][f"{name}/{row}"] = value
    for time_s, values in sorted(points.items()):
        run.log({"time_s": time_s, **values})
    artifact = wandb.Artifact(f"{results['protocol']['name']}-{run.id}", type="results")
    for name in ("results.json", "videos.jsonl", "report.html"):
        artifact.add_file(str(out / name))
    run.log_artifact(artifact)
    run.finish()

"""Does a model cut where it is told? Shot-cut accuracy with and without tuning on clips of several shots.

    python -m benchmarks.shots runs/causal_video/multi_shot_story_tiny/seed1 \\
      --without runs/causal_video/multi_shot_story_tiny--shards-*/seed1 --out benchmarks/results/shots_story_tiny.json

The ablation of causal video, Table 3. Held-out stories (`vgr-prepare data=story_tiny`) are streamed from nothing, as a
session directs them: each shot's caption from its first chunk on, nothing else marking the cut. The same captions
and noise serve every run; differences are paired over stories, and of several runs (seeds) on a side the stories are
pooled, the first of the one side with the first of the other. Cuts are found by `vgr.metrics.shots.detect_cuts`, and
beside SCA = exp(-NSD) stand the value of a video without any cut, that of the true videos, the share of told cuts
found within two frames, and cuts found elsewhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from vgr.bench import environment
from vgr.command import tracked
from vgr.data.files import atomic, write_json
from vgr.data.modules import collate
from vgr.data.shards import Shards
from vgr.data.video import read_video
from vgr.generator import Generator
from vgr.metrics.shots import detect_cuts, no_cut_floor, shot_cut_accuracy
from vgr.metrics.statistics import mean_interval
from vgr.report import media
from vgr.report.summary import cell

NEAR, BATCH, SHOWN, COLUMNS = 2, 8, 3, 11  # frames off a told cut; stories at once; of the sheet: stories, frames


def cut_scores(video_FHW3: np.ndarray, shots: list[dict[str, Any]]) -> dict[str, float]:
    """SCA of a video of these shots, and of one without cuts; the share of told cuts found, and cuts elsewhere."""
    told = [shot["start"] for shot in shots[1:]]
    found = detect_cuts(video_FHW3)
    near = np.abs(np.array(found).reshape(-1, 1) - np.array(told)) <= NEAR
    return {
        "sca": shot_cut_accuracy(found, told, len(video_FHW3)),
        "floor": no_cut_floor(told, len(video_FHW3)),
        "told_found": float(near.any(0).mean()),
        "elsewhere": float((~near.any(1)).sum()),
    }


def streamed(generator: Generator, shards: Shards, count: int) -> list[np.ndarray]:
    """The first `count` stories as (F,H,W,3) uint8, from their captions alone; the noise is the story's."""
    videos: list[np.ndarray] = []
    for a in tracked(range(0, count, BATCH), f"batches of stories by {generator.name}"):
        numbers = range(a, min(a + BATCH, count))
        batch = collate([shards.read(i) for i in numbers], numbers)
        videos.extend(generator(None, batch.cameras, batch.captions, list(numbers), shot=batch.shot)[0])
    return videos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="tuned on stories, one a seed")
    parser.add_argument("--without", nargs="+", default=[], help="trained on clips of one shot, one a seed")
    parser.add_argument("--stories", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="PNG of the first stories: truth, with, without")
    args = parser.parse_args()
    shards = Shards(Generator.load(args.runs[0]).data_info["val"])
    count = min(args.stories, len(shards))
    shots = [shards.read(i).meta["shots"] for i in range(count)]
    videos = {"truth": [[read_video(shards.read_video_bytes(i))[0] for i in range(count)]]}
    for name, runs in {"with": args.runs, "without": args.without}.items():
        videos[name] = [streamed(Generator.load(run), shards, count) for run in runs]
    write(args, {k: [[cut_scores(*pair) for pair in zip(each, shots)] for each in v] for k, v in videos.items() if v})
    if args.sheet:
        rows = [each[0][i] for i in range(SHOWN) for each in videos.values() if each]
        with atomic(args.sheet) as file:
            file.write(media.png(media.sheet(rows, COLUMNS)))


def write(args: argparse.Namespace, scores: dict[str, list[list[dict[str, float]]]]) -> None:
    """The JSON file, and the same to read; scores: by arm, for each of its runs, one row a story."""
    rows = {
        name: {key: cell(mean_interval([row[key] for run in runs for row in run])) for key in runs[0][0]}
        for name, runs in scores.items()
    }
    found = {**environment(), "runs": args.runs, "without": args.without, "rows": rows}
    for name, row in rows.items():
        print(name, *(f"{k} {c['value']:.3f} ({c['low']:.3f} to {c['high']:.3f})" for k, c in row.items()), sep=", ")
    if args.without:
        pairs = [pair for runs in zip(scores["with"], scores["without"]) for pair in zip(*runs)]
        gain = mean_interval([a["sca"] - b["sca"] for a, b in pairs])
        found["gain"] = cell(gain)
        print(f"with - without: sca {gain.value:.3f} ({gain.low:.3f} to {gain.high:.3f})")
    write_json(args.out, found)


if __name__ == "__main__":
    main()

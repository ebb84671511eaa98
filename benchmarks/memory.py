"""What a memory policy is worth: do returning characters come back as they were?

    python -m benchmarks.memory runs/causal_video/multi_shot_story_tiny/seed1 --out benchmarks/results/memory_tiny.json

Held-out stories (`vgr-prepare data=story_tiny`): a character's look is drawn per story and never told, and every
return lies beyond a window of three chunks. For each shot in which a character returns, the true video before it is
committed to the memory, the shot is sampled from the caption alone, decoded, and the character's colour inside the
true mask compared with the truth (`recurrence_similarity`): dE, lower is better, and whether its own look is the
nearest of the cast (CIE Lab, Euclidean: 2.3 is just visible, opposite hues are about 100 apart). The same weights and
noise serve every policy; differences are paired over stories, and with several runs (seeds) the stories of all are
pooled.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vgr.bench import environment
from vgr.command import tracked
from vgr.data.modules import collate
from vgr.data.shards import Shards
from vgr.data.stories import StorySource
from vgr.diffusion.rollout import stream
from vgr.diffusion.samplers import chunk_bounds, frame_noise
from vgr.generator import Generator
from vgr.metrics.statistics import mean_interval
from vgr.models.causal_video import CausalVideo
from vgr.report import media
from vgr.training.conditioning import conditioning

POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"window": 3},
    "sink": {"window": 3, "sink": 4},  # the first chunk: as near to the first frames' five as whole chunks come
    "routed": {"window": 3, "routed": 5},
    "routed per step": {"window": 3, "routed": 5, "per_step": True},
}
SHOWN = 12  # stories of the sheet
PAIRS = (("full", "window"), ("routed", "window"), ("routed", "sink"), ("full", "routed"))


class Recurrence(NamedTuple):
    """One return of a character, in a video measured against the true one.

    shot, first: where it returns and where it was first seen. distance: dE between its look in the video and in
    truth, mean over frames, lower is better. similarity: 1 at no distance, 0 at that of the story's other characters
    or more, NaN without others. identified: whether of all characters' true looks its own is the nearest; chance is
    1 / cast. self_distance: dE between return and first appearance inside the video itself; true_self_distance: the
    same in truth, where only light and side differ.
    """

    shot: int
    first: int
    distance: float
    similarity: float
    identified: bool
    self_distance: float
    true_self_distance: float


def recurrence_similarity(
    frames_FHW3: NDArray[np.uint8], truth_FHW3: NDArray[np.uint8], masks_FHW: NDArray[np.uint8],
    shots: Sequence[Mapping[str, Any]],
) -> list[Recurrence]:
    """How each returning character looks: the weightless, procedural form of inter-shot consistency (spec 9.2).

    masks: ids of the true video; shots: entries with start, end, id and returns_from (`vgr.data.stories`). A look is
    the median L*, a*, b* inside the mask, frame by frame: where a generated character stands a little elsewhere,
    half of the mask must still meet it. One clip is one unit: average a clip's returns before comparing arms with
    `vgr.metrics.statistics`. Raises ValueError where shapes differ.
    """
    if not frames_FHW3.shape == truth_FHW3.shape == (*masks_FHW.shape, 3):
        raise ValueError(f"video {frames_FHW3.shape}, truth {truth_FHW3.shape} and masks {masks_FHW.shape} must agree")
    seen = {i: s for i, s in enumerate(shots) if s["id"]}
    ours, true = ({i: _looks(video, masks_FHW, s) for i, s in seen.items()} for video in (frames_FHW3, truth_FHW3))
    cast = {s["id"]: true[i].mean(0) for i, s in reversed(seen.items())}  # by first appearances

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b, axis=-1).mean())

    found = []
    for i, shot in seen.items():
        if (first := shot["returns_from"]) is None:
            continue
        distance, mine = apart(ours[i], true[i]), ours[i].mean(0)
        others = [apart(true[i], look) for who, look in cast.items() if who != shot["id"]]
        found.append(Recurrence(
            i, first, distance, max(0.0, 1 - distance / float(np.mean(others))) if others else np.nan,
            min(cast, key=lambda who: apart(mine, cast[who])) == shot["id"],
            apart(mine, ours[first].mean(0)), apart(true[i].mean(0), true[first].mean(0)),
        ))
    return found


def _looks(video_FHW3: NDArray[np.uint8], masks_FHW: NDArray[np.uint8], shot: Mapping[str, Any]) -> NDArray[np.float64]:
    """Median Lab (F,3) inside the mask of a shot's character, of the frames that show it."""
    span = range(shot["start"], shot["end"])
    lab = {f: cv2.cvtColor(video_FHW3[f].astype(np.float32) / 255, cv2.COLOR_RGB2LAB) for f in span}
    return np.stack([np.median(lab[f][mine], axis=0) for f in span
                     if (mine := masks_FHW[f] == shot["id"]).any()]).astype(np.float64)


def with_policy(model: CausalVideo, policy: dict[str, Any]) -> CausalVideo:
    """The same weights under another memory."""
    memory = {"window": None, "sink": 0, "shot_sink": 0, "routed": 0, "per_step": False}
    other = CausalVideo(**{**model.config, **memory, **policy}).to(next(model.parameters()).device).eval()
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def returned(generator: Generator, model: CausalVideo, batch: Any, shots: list[dict[str, Any]], seed: int) -> Tensor:
    """Latents (1,C,T,H,W) of a story: true but for the shots in which a character returns, which are sampled."""
    told = (generator.text, batch.captions, batch.cameras, batch.shot)
    cond = conditioning(*told, generator.stride, generator.chunk, generator.sampling.get("cut_prefix"))
    made = batch.latents.clone()
    bounds, shot_T = chunk_bounds(cond.layout), batch.shot[0]
    noise = frame_noise([seed], (made.shape[1], *made.shape[3:]), generator.device)
    state = model.new_state()
    zero = torch.zeros(1, made.shape[2], device=generator.device)
    for number in range(len(shots)):
        parts = [(a, b) for a, b in bounds if int(shot_T[a]) == number]
        if not parts:
            continue
        a, b = parts[0][0], parts[-1][1]
        if shots[number]["returns_from"] is not None:
            args = (cond.frames(a, b), generator.sigmas, noise)
            pieces = stream(model, state, *args, renoise=generator.sampling.get("renoise", False))
            made[:, :, a:b] = torch.cat([latents for latents, _ in pieces], dim=2)
        # What follows remembers the true shot: returns do not depend on each other.
        _, state = model(batch.latents[:, :, a:b], zero[:, a:b], cond.frames(a, b), state, commit=True)
    return made


def measure(
    run: str, stories: int, policies: dict[str, dict[str, Any]], sheet: list[list[np.ndarray]]
) -> dict[str, list[dict[str, float]]]:
    """By policy, for every story with a return: means over its returns, apart for those of the first shot.

    sheet gets a column a story, of its first return: first appearance and return in truth, then by policy.
    """
    generator = Generator.load(run)
    shards = Shards(generator.data_info["val"])
    extra = shards.manifest["extra"]
    settings = {k: v for k, v in extra["settings"].items() if k in StorySource.__init__.__annotations__}
    source = StorySource(**settings)
    models = {name: with_policy(generator.model, policy) for name, policy in policies.items()}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in policies}
    for i in tracked(range(min(stories, len(shards))), f"stories of {run}"):
        sample = shards.read(i)
        shots = sample.meta["shots"]
        if all(shot["returns_from"] is None for shot in shots):
            continue
        batch = collate([sample], [i]).to(generator.device)
        which = (extra["seed"], extra["split"], i)
        truth, masks = source.clip(*which).frames, source.masks(*which)
        back = next(shot for shot in shots if shot["returns_from"] is not None)
        first, at = ((shot["start"] + shot["end"]) // 2 for shot in (shots[back["returns_from"]], back))
        sheet.append([truth[first], truth[at]])
        for name, model in models.items():
            latents = returned(generator, model, batch, shots, i)
            video = generator.decoded(generator.codec.decode, latents)[0]
            sheet[-1].append(video[at])
            found = recurrence_similarity(video, truth, masks, shots)
            away = [r for r in found if r.first > 0]
            rows[name].append({
                "dE": float(np.mean([r.distance for r in found])),
                "identified": float(np.mean([r.identified for r in found])),
                "dE_not_first_shot": float(np.mean([r.distance for r in away])) if away else float("nan"),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="runs trained on stories, one a seed")
    parser.add_argument("--stories", type=int, default=128)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sheet", type=Path, help="a picture of twelve returns of the first run")
    args = parser.parse_args()
    sheet: list[list[np.ndarray]] = []
    by_run = [measure(run, args.stories, {name: POLICIES[name] for name in args.policies}, sheet) for run in args.runs]
    rows = {name: [row for found in by_run for row in found[name]] for name in args.policies}
    keys = list(rows[args.policies[0]][0])
    found: dict[str, Any] = {**environment(), "runs": args.runs, "policies": {}, "differences": {}}
    for name, values in rows.items():
        found["policies"][name] = {k: mean_interval([v[k] for v in values])._asdict() for k in keys}
        told = ", ".join(f"{k} {c['value']:.3g} ({c['low']:.3g} to {c['high']:.3g})" for k, c in
                         found["policies"][name].items())  # fmt: skip
        print(f"{name}: {told}")
    for a, b in PAIRS:
        if a in rows and b in rows:
            gaps = {k: [x[k] - y[k] for x, y in zip(rows[a], rows[b])] for k in keys}
            cells = {k: mean_interval(v)._asdict() for k, v in gaps.items()}
            found["differences"][f"{a} - {b}"] = cells
            told = ", ".join(f"{k} {c['value']:.3g} ({c['low']:.3g} to {c['high']:.3g})" for k, c in cells.items())
            print(f"{a} - {b}: {told}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        shown = [np.stack(row) for row in zip(*sheet[:SHOWN])]
        args.sheet.write_bytes(media.png(media.sheet(shown, len(shown[0]))))


if __name__ == "__main__":
    main()

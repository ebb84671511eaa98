"""Shots: are cuts where the prompt wanted them, and does who returns look as before (causal-video spec 9.2).

Published numbers take cuts from TransNetV2 and characters from DINOv2, both weights that are not at hand. Here cuts
are hard cuts, found by colour alone (`detect_cuts`) or by where colours stand (`detect_jumps`), and
looks are compared inside true masks: for procedural stories, whose truth is known. Colours are CIE Lab (D65),
differences dE = Euclidean (CIE76): 2.3 is just visible, opposite hues are about 100 apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def shot_cut_accuracy(
    predicted_cuts: Sequence[int], target_cuts: Sequence[int], frames: int, shots: int | None = None
) -> float:
    """SCA = exp(-NSD), NSD = (sum of offsets of matched cuts + penalty of missed and extra ones) / frames.

    Cuts are first frames of shots. The one-to-one matching makes that sum least; each unmatched cut costs
    frames / shots, one shot's length (the published constant is unknown; spec 9.2), shots being those of the plan,
    len(target_cuts) + 1 unless given. Compare with `no_cut_floor` only. Raises ValueError for cuts outside the video.
    """
    from scipy.optimize import linear_sum_assignment

    found, wanted = np.asarray(predicted_cuts, dtype=np.float64), np.asarray(target_cuts, dtype=np.float64)
    for name, cuts in (("predicted", found), ("target", wanted)):
        if cuts.size and not 0 < cuts.min() <= cuts.max() < frames:
            raise ValueError(f"{name}_cuts={cuts.astype(int).tolist()}: a cut is the first frame of a shot after the "
                             f"first, so 1 to frames - 1 = {frames - 1}")
    penalty = frames / (shots or wanted.size + 1)
    # A pair further apart than both penalties is rather one missed and one extra cut.
    cost = np.minimum(np.abs(found[:, None] - wanted), 2 * penalty)
    matched = cost[linear_sum_assignment(cost)].sum()
    return float(np.exp(-(matched + penalty * abs(found.size - wanted.size)) / frames))


def no_cut_floor(target_cuts: Sequence[int], frames: int) -> float:
    """SCA of a video without any cut, to stand beside every SCA: exp(-(S-1)/S) for S shots."""
    return shot_cut_accuracy([], target_cuts, frames)


def detect_cuts(frames_FHW3: NDArray[np.uint8], least: float = 12.0, ratio: float = 5.0) -> list[int]:
    """First frames of new shots, by "lab_distribution": no weights, hard cuts only.

    The distance of two frames is the 1-Wasserstein distance between their distributions of L*, a* and b*, summed:
    blind to where a colour stands, so to motion. A cut is the largest of five neighbouring distances, above `least`
    and above `ratio` times the video's median distance.
    """
    ordered = [np.sort(_lab(f).reshape(-1, 3), axis=0) for f in frames_FHW3]
    steps = np.array([np.abs(b - a).mean(0).sum() for a, b in zip(ordered, ordered[1:])])
    if not steps.size:
        return []
    peak = np.lib.stride_tricks.sliding_window_view(np.pad(steps, 2), 5).max(axis=1) == steps
    return (np.flatnonzero(peak & (steps > max(least, ratio * float(np.median(steps))))) + 1).tolist()


def detect_jumps(frames_FHW3: NDArray[np.uint8], least: float = 12.0, ratio: float = 4.0) -> list[int]:
    """First frames of new shots, by where colours stand: cuts between pictures of like colours, which `detect_cuts`
    cannot see.

    The distance of two frames is the mean dE of their pictures at 32x24. A cut's is above `least` and above `ratio`
    times each of the four around it, which fast motion raises as well.
    """
    import cv2

    small = np.stack([_lab(cv2.resize(f, (32, 24), interpolation=cv2.INTER_AREA)) for f in frames_FHW3])
    steps = np.linalg.norm(np.diff(small, axis=0), axis=-1).mean((1, 2))
    if not steps.size:
        return []
    around = np.lib.stride_tricks.sliding_window_view(np.pad(steps, 2), 5)[:, [0, 1, 3, 4]].max(axis=1)
    return (np.flatnonzero(steps > np.maximum(least, ratio * around)) + 1).tolist()


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

    def apart(a: Array, b: Array) -> float:
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


def _looks(video_FHW3: NDArray[np.uint8], masks_FHW: NDArray[np.uint8], shot: Mapping[str, Any]) -> Array:
    """Median Lab (F,3) inside the mask of a shot's character, of the frames that show it."""
    span = range(shot["start"], shot["end"])
    return np.stack([np.median(_lab(video_FHW3[f])[mine], axis=0) for f in span
                     if (mine := masks_FHW[f] == shot["id"]).any()]).astype(np.float64)


def _lab(image_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
    import cv2

    return cv2.cvtColor(image_HW3.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)

"""Shots: are cuts where the prompt wanted them (causal-video spec 9.2).

Published numbers take cuts from TransNetV2, whose weights are not at hand. Here cuts are hard cuts, found by colour
alone (`detect_cuts`) or by where colours stand (`detect_jumps`). Colours are CIE Lab (D65), differences dE = Euclidean
(CIE76): 2.3 is just visible, opposite hues are about 100 apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vgr.metrics.vbench import consistency

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


def shot_consistency(
    features_FD: ArrayLike, starts: Sequence[int], returns: Sequence[tuple[int, int]] = ()
) -> dict[str, float]:
    """Do subjects keep their looks within shots and from shot to shot (benchmarks spec 6.4), by features of frames?

    starts: first frames of shots, 0 first; returns: pairs of shots that show one subject. intra_shot: VBench's
    consistency inside each shot, averaged. inter_shot: mean cosine of the mean features of a pair's shots, between its
    floor, that of all other pairs, and its ceiling, of both halves of a shot; inter_shot_scaled: 0 at the floor, 1 at
    the ceiling. What cannot be had is left out. ValueError for shots without frames or pairs without shots.
    """
    x = np.asarray(features_FD, dtype=np.float64)
    edges, pairs = [*starts, len(x)], {tuple(sorted(p)) for p in returns}
    if edges != sorted(set(edges)) or edges[0] != 0:
        raise ValueError(f"starts={list(starts)} of {len(x)} frames: they rise from 0, and every shot has frames")
    if wrong := [p for p in pairs if not 0 <= p[0] < p[1] < len(starts)]:
        raise ValueError(f"returns={wrong}: pairs of two of {len(starts)} shots, from 0")
    shots = [x[a:b] for a, b in zip(edges, edges[1:])]
    halves = [(s[: len(s) // 2], s[len(s) // 2 :]) for s in shots if len(s) > 1]
    others = [(a, b) for b in range(len(shots)) for a in range(b) if (a, b) not in pairs]
    found = {
        "intra_shot": [consistency(s) for s in shots if len(s) > 1],
        "inter_shot": [_cosine(shots[a], shots[b]) for a, b in pairs],
        "inter_shot_floor": [_cosine(shots[a], shots[b]) for a, b in others if pairs],
        "inter_shot_ceiling": [_cosine(a, b) for a, b in halves if pairs],
    }
    means = {name: float(np.mean(values)) for name, values in found.items() if values}
    if {"inter_shot_floor", "inter_shot_ceiling"} <= means.keys():
        floor, ceiling = means["inter_shot_floor"], means["inter_shot_ceiling"]
        if ceiling > floor:
            means["inter_shot_scaled"] = (means["inter_shot"] - floor) / (ceiling - floor)
    return means


def _cosine(a_FD: Array, b_FD: Array) -> float:
    a, b = a_FD.mean(0), b_FD.mean(0)
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


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


def _lab(image_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
    import cv2

    return cv2.cvtColor(image_HW3.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)

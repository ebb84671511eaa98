"""What the matches of a shot say of each other and of cameras: where textures repeat, sound ones can be wrong.

A step of one tile looks like no step at all: frames five apart had more matches than frames three apart, nearly all of
another tile and of sound epipolar geometry. Neighbouring frames move too little for that, so their word goes first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vgr.geometry.conventions import Array, epipolar_px

Pairs = dict[tuple[int, int], tuple[Array, Array]]  # frames i < j -> matched pixels (N,2) of both

_OFF_PX = 1.0  # from where epipolar geometry lets it be, of a match that the cameras explain


def contradicted(matches: dict[tuple[int, int], NDArray[np.int64]]) -> set[tuple[int, int]]:
    """Pairs of frames that the frames between contradict: more of their matches, followed there, miss than meet.

    matches: frames i < j -> indices (N,2) of features, each in one match of a pair. Both ends are followed through
    neighbours' matches to a frame where both are known: one feature there, or two things that look alike.
    """
    frames = 1 + max((j for _, j in matches), default=0)
    size = 2 + max((int(m.max()) for m in matches.values()), default=0)  # the last one, as -1, leads nowhere
    (ahead, back), wrong = np.full((2, frames, size), -1), set()
    for (i, j), m in matches.items():
        if j == i + 1:
            ahead[i, m[:, 0]], back[j, m[:, 1]] = m.T[::-1]
    for (i, j), m in matches.items():
        there, here, meets = [m[:, 0]], m[:, 1], np.zeros(len(m))
        for f in range(i, j):
            there.append(ahead[f, there[-1]])
        for f in range(j, i - 1, -1):
            known = (there[f - i] >= 0) & (here >= 0)
            meets[known] = np.where(there[f - i] == here, 1, -1)[known]
            here = back[f, here]
        if meets.sum() < 0:
            wrong.add((i, j))
    return wrong


def explained(pairs: Pairs, c2w_F44: Array, k: Array, size_hw: tuple[int, int]) -> Array:
    """Shares of the matches of known frames next to each other that the cameras explain: within a pixel of where
    epipolar geometry lets them be. c2w_F44: NaN where unknown. Empty where no such pair has matches."""
    pixels = np.array(size_hw[::-1], dtype=np.float64)
    known = np.flatnonzero(np.isfinite(c2w_F44).all((1, 2))).tolist()
    off = [
        epipolar_px(np.linalg.inv(c2w_F44[j]) @ c2w_F44[i], *(p / pixels for p in pairs[i, j]), k, k, pixels)
        for i, j in zip(known, known[1:]) if (i, j) in pairs
    ]  # fmt: skip
    return np.array([(px < _OFF_PX).mean() for px in off])

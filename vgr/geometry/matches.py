"""What the matches of a shot say of each other, and of cameras: where textures repeat, sound matches can be wrong.

A step of one tile looks like no step at all: two frames of a walk that are five apart had more matches than two that
are three apart, nearly all of another tile, and their epipolar geometry was sound. Neighbouring frames move too little
for that, so what they say goes before what frames further apart say.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vgr.geometry.conventions import epipolar_px

Array = NDArray[np.float64]
Pairs = dict[tuple[int, int], tuple[Array, Array]]  # frames i < j -> matched pixels (N,2) of both

_OFF_PX = 1.0  # from where epipolar geometry lets it be, of a match that the cameras explain


def contradicted(matches: dict[tuple[int, int], NDArray[np.int64]]) -> set[tuple[int, int]]:
    """Pairs of frames whose matches those of the neighbouring frames between them contradict.

    matches: frames i < j -> indices (N,2) of matched features, each in one match of a pair. A match is followed from
    both ends through the neighbours' matches. Where both ways are known in one frame, they meet in one feature, or it
    is a match of two things that look alike. A pair is contradicted where more of its matches miss than meet.
    """
    frames = 1 + max((j for _, j in matches), default=0)
    size = 2 + max((int(m.max()) for m in matches.values()), default=0)  # the last one, as -1, leads nowhere
    ahead, back = np.full((2, frames, size), -1)
    for i in range(frames - 1):
        a, b = matches.get((i, i + 1), np.zeros((0, 2), dtype=int)).T
        ahead[i, a], back[i + 1, b] = b, a
    wrong = set()
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
    shares = []
    for i, j in zip(known, known[1:]):
        if (i, j) in pairs:
            start, end = (p / pixels for p in pairs[i, j])
            off = epipolar_px(np.linalg.inv(c2w_F44[j]) @ c2w_F44[i], start, end, k, k, pixels)
            shares.append((off < _OFF_PX).mean())
    return np.array(shares)

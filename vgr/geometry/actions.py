"""The world model's action strings ("w-100,dw-60,none-20"), both published dialects (specs/world-model 4.1).

Grammar: segments `keys-frames` separated by commas; keys is one or more of w s a d i j k l, held together,
or the word `none`; frames is a whole number from 1 to 999999. Case and blanks do not matter. Where the specification
is silent: opposing keys (w and s) cancel, as in the published tools; the same key twice in a segment is
refused as a slip of the hand.

`sana-wm-2`: w/s forward and back, a/d yaw left and right, i/k pitch up and down, j/l strafe left and right;
0.025 units and 0.6 degrees a frame, pitch within 60 degrees, velocities smoothed at 16 frames a second.
`sana-wm-1`, the first release: a/d strafe and j/l yaw; 0.05 units and 1.2 degrees a frame, pitch within 85
degrees (a step beyond is dropped), no smoothing. This is the form diffusers' port has; the first release's own
script also turned by 0.4 of the yaw speed while strafing, which later releases dropped: `strafe_yaw=0.4`.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: axis order of a velocity: forward, right, yaw (right), pitch (up)
_FORWARD, _RIGHT, _YAW, _PITCH = range(4)
_FPS = 16.0


class Dialect(NamedTuple):
    """keys: letter -> (axis, sign); units a frame, degrees a frame and degrees; time constants in seconds."""

    keys: dict[str, tuple[int, int]]
    translation: float
    rotation_deg: float
    pitch_limit_deg: float
    tau_press: float | None
    tau_coast: float | None


_SHARED = {"w": (_FORWARD, 1), "s": (_FORWARD, -1), "i": (_PITCH, 1), "k": (_PITCH, -1)}
DIALECTS = {
    "sana-wm-1": Dialect(
        _SHARED | {"a": (_RIGHT, -1), "d": (_RIGHT, 1), "j": (_YAW, -1), "l": (_YAW, 1)},
        0.05, 1.2, 85.0, None, None,
    ),
    "sana-wm-2": Dialect(
        _SHARED | {"a": (_YAW, -1), "d": (_YAW, 1), "j": (_RIGHT, -1), "l": (_RIGHT, 1)},
        0.025, 0.6, 60.0, 0.45, 1.0,
    ),
}  # fmt: skip


def parse(text: str) -> list[tuple[frozenset[str], int]]:
    """Segments of an action string: held keys (empty for `none`) and frames.

    ValueError names what could not be read, the segment's number (from 1) and the character's index (from 0).
    """
    if not text.strip():
        raise ValueError(f"action string is empty ({text!r}); write segments like 'w-30,wd-20,none-10'")
    segments, start = [], 0
    for number, segment in enumerate(text.lower().split(","), start=1):
        if fault := _fault(segment):
            place = f"segment {number}, character {start + fault[0]}"
            raise ValueError(f"action string {text!r}: {place}: {fault[1]}")
        keys, _, frames = segment.partition("-")
        held = "".join(keys.split())
        segments.append((frozenset() if held == "none" else frozenset(held), int(frames)))
        start += len(segment) + 1
    return segments


def _fault(segment: str) -> tuple[int, str] | None:
    """What cannot be read in a segment, and the index of its character."""
    keys, dash, frames = segment.partition("-")
    if not segment.strip():
        return 0, "empty segment; put 'keys-frames' between commas and none at the end"
    if not dash:
        return len(segment), f"{segment.strip()!r} has no '-'; write 'keys-frames', for example 'w-30'"
    if not re.fullmatch(r"[0-9]{1,6}", frames.strip()) or int(frames) < 1:
        return len(keys) + 1, f"frames {frames.strip()!r} is not a whole number from 1 to 999999; for example 'w-30'"
    if not keys.strip():
        return 0, "no keys before '-'; write 'none-10' to hold still for 10 frames"
    if "".join(keys.split()) != "none":
        for i, letter in enumerate(keys):
            if not letter.isspace() and letter not in "wsadijkl":
                return i, f"unknown key {letter!r}; keys are w s a d i j k l, or the word none"
            if not letter.isspace() and letter in keys[:i]:
                return i, f"key {letter!r} is given twice; name each key once a segment"
    return None


def _velocities(held: list[frozenset[str]], dialect: Dialect, strafe_yaw: float) -> NDArray[np.float64]:
    """(1 + len(held), 4) units and radians a frame, the first row zero; smoothed where the dialect says so.

    A frame with a key the frame before did not hold takes its target at once, on every axis; otherwise each
    axis closes in on its target, with tau_press where the target is not zero and tau_coast where it is.
    """
    turn = math.radians(dialect.rotation_deg)
    unit = np.array([dialect.translation, dialect.translation, turn, turn])
    before, rows = frozenset(), [np.zeros(4)]
    for keys in held:
        target = np.zeros(4)
        for key in keys:
            axis, sign = dialect.keys[key]
            target[axis] += sign
        target[_YAW] += strafe_yaw * target[_RIGHT]
        target *= unit
        if dialect.tau_press is None or keys - before:
            rows.append(target)
        else:
            tau = np.where(target != 0, dialect.tau_press, dialect.tau_coast)
            rows.append(target + np.exp(-1 / (_FPS * tau)) * (rows[-1] - target))
        before = keys
    return np.array(rows)


def from_actions(
    text: str, dialect: str = "sana-wm-2", frames: int | None = None, *, strafe_yaw: float = 0.0
) -> Tensor:
    """Camera-to-world (F,4,4) float64 of an action string such as "w-100,dw-60,none-20", the first the identity.

    A string of n frames gives n + 1 poses. With `frames`, that many poses: a longer string is cut, a shorter
    one goes on with no key held (in `sana-wm-2` the camera coasts to a stop). Each frame turns R <- R_y(yaw) R
    R_x(pitch), then moves along the new forward and right axes flattened to the horizontal. ValueError names
    what it cannot read, the segment and the character.
    """
    from scipy.spatial.transform import Rotation

    if dialect not in DIALECTS:
        raise ValueError(f"unknown action dialect {dialect!r}; known: {', '.join(DIALECTS)}")
    if frames is not None and frames < 1:
        raise ValueError(f"frames must be at least 1; got {frames}")
    rules = DIALECTS[dialect]
    held = [keys for keys, count in parse(text) for _ in range(count)]
    if frames is not None:
        held = (held + [frozenset()] * (frames - 1))[: frames - 1]
    velocity_F4 = _velocities(held, rules, strafe_yaw)
    limit, pitch_F = math.radians(rules.pitch_limit_deg), [0.0]
    for step in velocity_F4[1:, _PITCH]:
        pitch = pitch_F[-1] + step
        if abs(pitch) > limit:
            pitch = math.copysign(limit, pitch) if rules.tau_press is not None else pitch_F[-1]
        pitch_F.append(pitch)
    yaw_F = velocity_F4[:, _YAW].cumsum()
    forward = np.stack([np.sin(yaw_F), 0 * yaw_F, np.cos(yaw_F)], axis=1)
    right = np.stack([np.cos(yaw_F), 0 * yaw_F, -np.sin(yaw_F)], axis=1)
    c2w = np.tile(np.eye(4), (len(yaw_F), 1, 1))
    c2w[:, :3, :3] = Rotation.from_euler("YX", np.stack([yaw_F, pitch_F], axis=1)).as_matrix()
    c2w[:, :3, 3] = (velocity_F4[:, [_FORWARD]] * forward + velocity_F4[:, [_RIGHT]] * right).cumsum(0)
    return torch.from_numpy(c2w)

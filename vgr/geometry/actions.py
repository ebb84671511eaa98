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
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: axis order of a velocity: forward, right, yaw (right), pitch (up)
_FORWARD, _RIGHT, _YAW, _PITCH = range(4)


@dataclass(frozen=True)
class Dialect:
    """keys: letter -> (axis, sign); units a frame, degrees a frame and degrees; time constants in seconds."""

    keys: dict[str, tuple[int, int]]
    translation: float
    rotation_deg: float
    pitch_limit_deg: float
    tau_press: float | None
    tau_coast: float | None
    fps: float = 16.0


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
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"action string is empty ({text!r}); write segments like 'w-30,wd-20,none-10'")
    segments, start = [], 0
    for number, segment in enumerate(text.split(","), start=1):
        segments.append(_parse_segment(segment, number, start, text))
        start += len(segment) + 1
    return segments


def _parse_segment(segment: str, number: int, start: int, text: str) -> tuple[frozenset[str], int]:
    def refuse(what: str, index: int, hint: str) -> ValueError:
        return ValueError(f"action string {text!r}: segment {number}, character {index}: {what}; {hint}")

    if not segment.strip():
        raise refuse("empty segment", start, "put 'keys-frames' between commas and none at the end")
    keys_part, dash, frames_part = segment.partition("-")
    if not dash:
        raise refuse(f"{segment.strip()!r} has no '-'", start + len(segment), "write 'keys-frames', for example 'w-30'")
    frames_at = start + len(keys_part) + 1
    if not re.fullmatch(r"[0-9]{1,6}", frames_part.strip()) or int(frames_part) < 1:
        what = f"frames {frames_part.strip()!r} is not a whole number from 1 to 999999"
        raise refuse(what, frames_at, "for example 'w-30'")
    keys: set[str] = set()
    letters = [(i, c.lower()) for i, c in enumerate(keys_part, start) if not c.isspace()]
    if not letters:
        raise refuse("no keys before '-'", start, "write 'none-10' to hold still for 10 frames")
    if "".join(c for _, c in letters) != "none":
        for index, letter in letters:
            if letter not in "wsadijkl":
                raise refuse(f"unknown key {letter!r}", index, "keys are w s a d i j k l, or the word none")
            if letter in keys:
                raise refuse(f"key {letter!r} is given twice", index, "name each key once a segment")
            keys.add(letter)
    return frozenset(keys), int(frames_part)


def _yaw(angle: float) -> NDArray[np.float64]:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def _pitch(angle: float) -> NDArray[np.float64]:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def _velocities(held: list[frozenset[str]], dialect: Dialect, strafe_yaw: float) -> NDArray[np.float64]:
    """(F,4) units and radians a frame, smoothed exponentially where the dialect says so.

    A frame with a key the frame before did not hold takes its target at once, on every axis; otherwise each
    axis closes in on its target, with tau_press where the target is not zero and tau_coast where it is.
    """
    turn = math.radians(dialect.rotation_deg)
    unit = np.array([dialect.translation, dialect.translation, turn, turn])
    velocity, before, rows = np.zeros(4), frozenset(), []
    for keys in held:
        target = np.zeros(4)
        for key in keys:
            axis, sign = dialect.keys[key]
            target[axis] += sign
        target[_YAW] += strafe_yaw * target[_RIGHT]
        target *= unit
        if dialect.tau_press is None or keys - before:
            velocity = target
        else:
            tau = np.where(target != 0, dialect.tau_press, dialect.tau_coast)
            velocity = target + np.exp(-1 / (dialect.fps * tau)) * (velocity - target)
        before = keys
        rows.append(velocity)
    return np.array(rows)


def roll_out(
    text: str, dialect: str = "sana-wm-2", frames: int | None = None, strafe_yaw: float = 0.0
) -> NDArray[np.float64]:
    """Camera-to-world (F,4,4) float64 of an action string, OpenCV axes, the first pose the identity.

    A string of n frames gives n + 1 poses. With `frames`, that many poses: a longer string is cut, a shorter
    one goes on with no key held (in `sana-wm-2` the camera coasts to a stop). Each frame
    R <- R_y(yaw) R R_x(pitch), then a move along the new forward and right axes flattened to the horizontal.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"unknown action dialect {dialect!r}; known: {', '.join(DIALECTS)}")
    if frames is not None and frames < 1:
        raise ValueError(f"frames must be at least 1; got {frames}")
    rules = DIALECTS[dialect]
    held = [keys for keys, count in parse(text) for _ in range(count)]
    if frames is not None:
        held = (held + [frozenset()] * (frames - 1))[: frames - 1]
    limit = math.radians(rules.pitch_limit_deg)
    rotation, centre, pitch = np.eye(3), np.zeros(3), 0.0
    poses = [np.eye(4)]
    for velocity in _velocities(held, rules, strafe_yaw):
        wanted = pitch + velocity[_PITCH]
        if abs(wanted) > limit:
            wanted = math.copysign(limit, wanted) if rules.tau_press is not None else pitch
        rotation = _yaw(velocity[_YAW]) @ rotation @ _pitch(wanted - pitch)
        pitch = wanted
        for axis, speed in ((2, velocity[_FORWARD]), (0, velocity[_RIGHT])):
            flat = rotation[:, axis] * (1.0, 0.0, 1.0)
            centre = centre + speed * flat / np.linalg.norm(flat)  # never zero: pitch stays below 90 degrees
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation, centre
        poses.append(pose)
    return np.stack(poses)

"""Named camera paths, and action strings as paths. All start at the identity; OpenCV axes, metres, float64.

Amplitudes can be overridden where the table says so (negative values reverse a direction):

  static         nothing moves
  dolly          distance: metres forward (2)
  truck          distance: metres to the right (1.5)
  pedestal       distance: metres upward (0.8)
  pan            angle_deg: turn to the right (45)
  tilt           angle_deg: turn upward (25)
  roll           angle_deg: clockwise about the view axis (20)
  orbit          distance: to the target ahead (2); angle_deg: arc, the camera moving right (90), or turns
  spiral         distance: to the target ahead (2); turns (2): the camera widens its circles and closes in
  figure_eight   distance: to the target ahead (2); turns (1): a lying eight, always looking at the target
  palindrome     distance forward (2) while turning angle_deg to the right (30), then exactly back
  closed_loop    distance: radius of the circle walked, to the right (1); turns (1), looking where it walks
  whip           angle_deg: a fast turn to the right (90) in mid-clip, 120 degrees a second on average
  dolly_zoom     distance: to the subject (3); the camera closes in by 40 % while the lens widens to match
"""

from __future__ import annotations

import difflib
import math

import torch
from torch import Tensor

from vgr.geometry.actions import from_actions
from vgr.geometry.cameras import so3_exp

__all__ = ["NAMES", "from_actions", "named_cameras"]

#: what each path takes, with defaults; see the module's table
_DEFAULTS: dict[str, dict[str, float]] = {
    "static": {},
    "dolly": {"distance": 2.0},
    "truck": {"distance": 1.5},
    "pedestal": {"distance": 0.8},
    "pan": {"angle_deg": 45.0},
    "tilt": {"angle_deg": 25.0},
    "roll": {"angle_deg": 20.0},
    "orbit": {"distance": 2.0, "angle_deg": 90.0, "turns": math.nan},
    "spiral": {"distance": 2.0, "turns": 2.0},
    "figure_eight": {"distance": 2.0, "turns": 1.0},
    "palindrome": {"distance": 2.0, "angle_deg": 30.0},
    "closed_loop": {"distance": 1.0, "turns": 1.0},
    "whip": {"angle_deg": 90.0},
    "dolly_zoom": {"distance": 3.0},
}
NAMES: tuple[str, ...] = tuple(_DEFAULTS)

_WHIP_DEG_PER_S = 120.0
_CLOSING_SHARE = 0.4


def _settings(name: str, given: dict[str, float | None]) -> dict[str, float]:
    if name not in _DEFAULTS:
        close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown path {name!r}{hint} Known: {', '.join(NAMES)}")
    settings = dict(_DEFAULTS[name])
    for key, value in given.items():
        if value is None:
            continue
        if key not in settings:
            takes = ", ".join(settings) or "no amplitude"
            raise ValueError(f"path {name!r} does not take {key} (given {value}); it takes {takes}")
        if not math.isfinite(value):
            raise ValueError(f"{key} of path {name!r} must be a finite number; got {value}")
        settings[key] = float(value)
    if name in ("orbit", "spiral", "figure_eight", "dolly_zoom") and settings["distance"] <= 0:
        raise ValueError(f"distance of path {name!r} must be > 0, its target is ahead; got {settings['distance']}")
    if name in ("figure_eight", "closed_loop") and settings["turns"] != round(settings["turns"]):
        raise ValueError(f"turns of path {name!r} must be whole, it closes; got {settings['turns']}")
    if name == "orbit" and given["turns"] is not None:
        if given["angle_deg"] is not None:
            raise ValueError("path 'orbit' takes angle_deg or turns, not both; drop one")
        settings["angle_deg"] = 360.0 * settings["turns"]
    return settings


def _time_shares(name: str, frames: int, fps: float, angle_deg: float) -> Tensor:
    """Share (F,) of its time that a path has spent at each frame."""
    index, last = torch.arange(frames, dtype=torch.float64), max(frames - 1, 1)
    if name == "palindrome":
        # Distance from the nearer end, so that frames i and F-1-i are the same numbers.
        return torch.minimum(index, last - index).clamp(min=0) / max(last // 2, 1)
    if name == "whip" and frames > 1:
        share = min(1.0, max(abs(angle_deg), 1e-6) / _WHIP_DEG_PER_S * fps / last)
        # Between two frames, so that a turn shorter than a frame is one step and not two halves.
        middle = (frames // 2 - 0.5) / last if share <= 1 - 1 / last else 0.5
        return ((index / last - middle) / share + 0.5).clamp(0, 1)
    return index / last


def _look_at(centres_F3: Tensor, target_3: Tensor) -> Tensor:
    """Rotations (F,3,3) with z towards the target and x horizontal (no roll)."""
    z = torch.nn.functional.normalize(target_3 - centres_F3, dim=-1)
    down = torch.tensor([0.0, 1.0, 0.0], dtype=z.dtype).expand_as(z)
    x = torch.nn.functional.normalize(torch.linalg.cross(down, z), dim=-1)
    return torch.stack([x, torch.linalg.cross(z, x), z], dim=-1)


def _curve(name: str, s: Tensor, p: dict[str, float]) -> tuple[Tensor, Tensor]:
    """Centres (F,3) and rotations (F,3,3) of a path at progress s (F,)."""
    d, turn = p.get("distance", 0.0), math.radians(p.get("angle_deg", 0.0)) * s
    # Wrapping the phase makes a closed path return to its first pose to the last bit.
    turns = p.get("turns", 0.0) * s
    phase = 2 * math.pi * (turns - turns.floor())
    o, radius = torch.zeros_like(s), 0.2 * d * s
    centres = {
        "dolly": (o, o, d * s),
        "dolly_zoom": (o, o, _CLOSING_SHARE * d * s),
        "truck": (d * s, o, o),
        "pedestal": (o, -d * s, o),
        "palindrome": (o, o, d * s),
        "orbit": (d * turn.sin(), o, d * (1 - turn.cos())),
        "closed_loop": (d * (1 - phase.cos()), o, d * phase.sin()),
        "spiral": (radius * phase.sin(), -radius * phase.cos(), 0.3 * d * s),
        "figure_eight": (0.35 * d * phase.sin(), o, 0.3 * d * phase.sin() * phase.cos()),
    }
    rotations = {
        "pan": (o, turn, o),
        "whip": (o, turn, o),
        "tilt": (turn, o, o),
        "roll": (o, o, turn),
        "palindrome": (o, turn, o),
        "orbit": (o, -turn, o),
        "closed_loop": (o, phase, o),
    }
    centres_F3 = torch.stack(centres.get(name, (o, o, o)), dim=-1)
    if name in ("spiral", "figure_eight"):
        return centres_F3, _look_at(centres_F3, torch.tensor([0.0, 0.0, d], dtype=s.dtype))
    return centres_F3, so3_exp(torch.stack(rotations.get(name, (o, o, o)), dim=-1))


def named_cameras(
    name: str,
    frames: int,
    fps: float,
    *,
    intrinsics: Tensor | None = None,
    distance: float | None = None,
    angle_deg: float | None = None,
    turns: float | None = None,
    ease: bool = True,
) -> tuple[Tensor, Tensor]:
    """A named path: camera-to-world (F,4,4) and normalised intrinsics (F,4), both float64.

    name: one of NAMES; frames F >= 1 at fps frames a second; distance (metres), angle_deg (degrees) and turns
    override the module's table where the path takes them; ease starts and stops smoothly. intrinsics (4,) or
    (F,4) default to a 60 degree, 4:3 camera; only dolly_zoom changes them, so that fx / depth of the subject
    stays. ValueError for an unknown name (with the closest), an amplitude the path does not take, a bad count.
    """
    p = _settings(name, {"distance": distance, "angle_deg": angle_deg, "turns": turns})
    if frames < 1 or not fps > 0:
        raise ValueError(f"frames must be a whole number >= 1 and fps > 0; got frames={frames}, fps={fps}")
    fx = 0.5 / math.tan(math.radians(30))
    k = torch.as_tensor([fx, fx * 4 / 3, 0.5, 0.5] if intrinsics is None else intrinsics, dtype=torch.float64)
    if k.shape not in ((4,), (frames, 4)):
        raise ValueError(f"intrinsics must have shape (4,) or ({frames}, 4); got {tuple(k.shape)}")
    u = _time_shares(name, frames, fps, p.get("angle_deg", 0.0))
    s = u * u * (3 - 2 * u) if ease else u  # smoothstep: its speed is zero at both ends
    c2w = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    c2w[:, :3, 3], c2w[:, :3, :3] = _curve(name, s, p)
    k = k.expand(frames, 4).clone()
    if name == "dolly_zoom":
        k[:, :2] *= (1 - _CLOSING_SHARE * s)[:, None]
    return c2w, k

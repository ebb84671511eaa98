"""How the walker of `vgr.data.doom` moves: what it sees as free, where it turns, how fast, how smoothly.

Distances are Doom map units (32 a metre), speeds map units an engine tic (35 tics a second), turns degrees a
second, counter-clockwise positive. All randomness comes from the generator handed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TICS_PER_SECOND = 35
DEPTH_STEP = 7.15  # map units one step of the engine's 8-bit planar depth stands for (walking at a wall)
FX = 0.5  # 90 degrees of horizontal view, divided by the image width
STEERED = ("walk", "straight", "arc", "glide")  # moods that walk forward and so must turn away from walls
MOODS = {"walk": 0.30, "straight": 0.10, "arc": 0.14, "glide": 0.08, "look": 0.12, "sweep": 0.06,
         "strafe": 0.06, "circle": 0.07, "backward": 0.05, "stand": 0.02}


@dataclass(frozen=True)
class Free:
    """Free distances of one view: ahead within the walker's width, left, right and centre thirds on average."""

    ahead: float
    left: float
    right: float
    centre: float


def free_space(depth_HW: np.ndarray) -> Free:
    """Reads free distances off a uint8 depth buffer (H,W) at the height of the eyes."""
    height, width = depth_HW.shape
    band = depth_HW[height * 42 // 100 : height * 58 // 100 : 3]
    z_W = np.sort(band, axis=0)[len(band) // 4].astype(np.float64) * DEPTH_STEP
    lateral_W = np.abs((np.arange(width) + 0.5) / width - 0.5) / FX * z_W
    blocking = z_W[lateral_W < 30]
    capped_W = np.minimum(z_W, 900)
    third = width // 3
    return Free(
        ahead=float(blocking.min()) if blocking.size else 0.0,
        left=float(capped_W[:third].mean()),
        right=float(capped_W[-third:].mean()),
        centre=float(capped_W[third:-third].mean()),
    )


def start_heading(ahead_K: np.ndarray, mood: str, side: int, rng: np.random.Generator) -> int:
    """Picks one of K headings (counter-clockwise, a full turn) that suits the mood; ahead_K free distances."""
    near_K = np.minimum(ahead_K, 600.0).astype(np.float64)
    quarter = len(ahead_K) // 4
    if mood in ("strafe", "circle"):
        near_K = 0.5 * near_K + np.minimum(np.roll(ahead_K, -side * quarter), 300.0)
    elif mood == "backward":
        near_K = 0.5 * near_K + np.minimum(np.roll(ahead_K, 2 * quarter), 400.0)
    good = np.flatnonzero(near_K >= 0.7 * near_K.max())
    return int(rng.choice(good))


class Walker:
    """Turns a mood into smooth commands, one per recorded frame, from what is free in front.

    step(free, moved) -> (forward, right, turn): speeds in map units a tic, turn in degrees a second. `moved`
    is how far (map units a tic) the last step really went; a walker that does not get ahead changes its mood.
    """

    def __init__(self, rng: np.random.Generator, mood: str, side: int, frame_s: float) -> None:
        self.rng, self.frame_s = rng, frame_s
        self.speed = rng.uniform(2.5, 7.0)
        self.velocity = np.zeros(3)  # forward, right, turn after smoothing
        self.target = np.zeros(3)
        self.wander = 0.0
        self.dodging = 0
        self.stalled_s = 0.0
        self.begin(mood, side)

    def begin(self, mood: str, side: int) -> None:
        """Starts a segment; side +1 is left, -1 right."""
        rng = self.rng
        self.mood, self.side = mood, side
        self.left_s = rng.uniform(1.5, 4.5)
        self.turn_rate = {
            "arc": rng.uniform(15, 45), "look": rng.uniform(15, 70), "sweep": rng.uniform(30, 70),
            "circle": -rng.uniform(15, 35), "backward": rng.uniform(-15, 15), "glide": rng.uniform(-10, 10),
            "strafe": rng.uniform(-8, 8) * (rng.random() < 0.5),
        }.get(mood, 0.0)
        self.sweep_s = rng.uniform(2.0, 4.0)
        self.time_s = 0.0

    def _wish(self) -> np.ndarray:
        """Forward, right, turn this mood would like at this moment if nothing were in the way."""
        turn = self.side * self.turn_rate
        if self.mood == "walk":
            # A slow Ornstein-Uhlenbeck process: turns that come and go over about two seconds.
            self.wander += -self.wander * self.frame_s / 1.5 + 28 * np.sqrt(self.frame_s) * self.rng.normal()
            turn = float(np.clip(self.wander, -60, 60))
        if self.mood == "sweep":
            turn = self.side * self.turn_rate * np.cos(2 * np.pi * self.time_s / self.sweep_s)
        forward = {"walk": 1.0, "straight": 1.0, "arc": 0.9, "glide": 0.75, "backward": -0.7}.get(self.mood, 0.0)
        right = {"glide": -0.6, "strafe": -0.8, "circle": -0.8}.get(self.mood, 0.0) * self.side
        return np.array([forward * self.speed, right * self.speed, turn])

    def _avoid(self, wish: np.ndarray, free: Free) -> np.ndarray:
        """Slows down before a wall and turns to the more open side; keeps that side until the way is clear."""
        margin = 110 + 0.6 * TICS_PER_SECOND * self.speed
        if self.dodging and free.ahead > 1.7 * margin:
            self.dodging, self.wander = 0, 0.0
        if not self.dodging and free.ahead < margin:
            self.dodging = 1 if free.left > free.right else -1
        if self.dodging:
            urgency = np.clip(1.5 - free.ahead / margin, 0.3, 1.0)
            wish[2] = self.dodging * 85 * urgency
        wish[:2] *= np.clip((free.ahead - 70) / 110, 0.0, 1.0)
        return wish

    def step(self, free: Free, moved: float) -> tuple[float, float, float]:
        """One frame's forward and right speed (map units a tic) and turn (degrees a second)."""
        self.time_s += self.frame_s
        self.left_s -= self.frame_s
        wanted = float(np.hypot(*self.velocity[:2]))
        self.stalled_s = self.stalled_s + self.frame_s if wanted > 1 and moved < 0.35 * wanted else 0.0
        if self.left_s < 0 or self.stalled_s > 0.35:
            near = self.stalled_s > 0 and self.mood not in STEERED
            mood = "walk" if near else str(self.rng.choice(list(MOODS), p=_WEIGHTS))
            if self.stalled_s > 0 and self.mood in STEERED:
                mood = "look"
            self.stalled_s = 0.0
            self.begin(mood, int(self.rng.choice((-1, 1))))
        wish = self._wish()
        if self.mood in STEERED:
            wish = self._avoid(wish, free)
        # Two first-order lags: speeds and turns have no jumps, in the rate of turn nor in its slope.
        speed = 1 - np.exp(-self.frame_s / np.array([0.15, 0.15, 0.14]))
        self.target += speed * (wish - self.target)
        self.velocity += speed * (self.target - self.velocity)
        return tuple(self.velocity.tolist())


_WEIGHTS = np.array(list(MOODS.values())) / sum(MOODS.values())


def draw_mood(rng: np.random.Generator) -> tuple[str, int]:
    """A mood by its weight and a side (+1 left, -1 right)."""
    return str(rng.choice(list(MOODS), p=_WEIGHTS)), int(rng.choice((-1, 1)))

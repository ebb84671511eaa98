"""Small charts as inline SVG, coloured by the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 230, 50, 10, 12, 34


class Line(NamedTuple):
    """One line: style is a CSS class (its colour), low and high the ends of a band around y, if given. With a label
    its points are circles named so, low and high a bar through each."""

    x: Sequence[float]
    y: Sequence[float | None]
    style: str
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    thin: bool = False
    label: str = ""


def chart(lines: Sequence[Line], x_label: str, title: str, zero: bool = False) -> Markup | str:
    """A figure with axes; points that are None or not finite are left out. zero draws the line y = 0."""
    data = []
    for line in lines:
        points = zip_longest(line.x, line.y, line.low, line.high)
        data.append((line, [p for p in points if _finite(p[0]) and _finite(p[1])]))
    every = [p for _, points in data for p in points]
    if not every:
        return ""
    heights = [v for p in every for v in p[1:] if _finite(v)] + ([0.0] if zero else [])
    x0, x1 = min(p[0] for p in every), max(p[0] for p in every)
    x_ticks = _ticks(x0, x1)
    if any(line.label for line in lines):  # circles stand clear of the edges
        x0, x1 = x_ticks[0], x_ticks[-1]
    y_ticks = _ticks(min(heights), max(heights))
    y0, y1 = y_ticks[0], y_ticks[-1]

    def px(x: float) -> float:
        return round(_LEFT + (x - x0) / ((x1 - x0) or 1) * (_W - _LEFT - _RIGHT), 1)

    def py(y: float) -> float:
        return round(_H - _BOTTOM - (y - y0) / ((y1 - y0) or 1) * (_H - _TOP - _BOTTOM), 1)

    parts = []
    for y in y_ticks:
        parts.append(f'<path class="axis" d="M{px(x0)},{py(y)} H{px(x1)}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{py(y) + 4}" text-anchor="end">{y:g}</text>')
    for x in (x for x in x_ticks if x0 <= x <= x1):
        text = f"{x / 1000:g}k" if x >= 10000 else f"{x:g}"
        parts.append(f'<text x="{px(x)}" y="{_H - 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{_W - _RIGHT}" y="{_H - 2}" text-anchor="end">{escape(x_label)}</text>')
    if zero:
        parts.append(f'<path class="zero" d="M{px(x0)},{py(0)} H{px(x1)}"/>')
    named: list[tuple[float, float, float, float, Line]] = []
    for line, points in data:
        if line.label:
            named += [(py(y), px(x), *(py(v if _finite(v) else y) for v in ends), line) for x, y, *ends in points]
            continue
        band = [p for p in points if _finite(p[2]) and _finite(p[3])]
        if band:
            outline = [(p[0], p[3]) for p in band] + [(p[0], p[2]) for p in reversed(band)]
            dots = " ".join(f"{px(x)},{py(y)}" for x, y in outline)
            parts.append(f'<polygon class="band {line.style}" points="{dots}"/>')
        dots = " ".join(f"{px(p[0])},{py(p[1])}" for p in points)
        parts.append(f'<polyline class="line {line.style}{" thin" if line.thin else ""}" points="{dots}"/>')
    parts += _named(named)
    figure = f'<svg viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return Markup(f"<figure>{figure}<figcaption>{escape(title)}</figcaption></figure>")


def _named(points: list[tuple[float, float, float, float, Line]]) -> list[str]:
    """Circles at (y, x, low, high, line), bars through them, names beside them, each a line below the one before."""
    parts, names, below = [], [], 0.0
    for y, x, low, high, line in sorted(points, key=lambda p: p[0]):
        below = max(y + 4, below + 13)
        side, anchor = (9, "start") if x < _W / 2 else (-9, "end")
        room = int(max(x, _W - x) / 6.2)  # letters on that side
        name = escape(line.label if len(line.label) <= room else f"{line.label[: room - 1]}…")
        parts.append(f'<path class="line {line.style}" d="M{x},{low} V{high}"/>')
        parts.append(f'<circle class="point {line.style}" cx="{x}" cy="{y}" r="4.5"/>')
        names.append(f'<text class="name" x="{x + side:.1f}" y="{below:.1f}" text-anchor="{anchor}">{name}</text>')
    return parts + names


def steps(values: Sequence[float], style: str) -> Line:
    """The share of values that are no larger, over the values: their empirical distribution as a line of steps."""
    count = len(values)
    return Line(np.sort(values).repeat(2).tolist(), (np.arange(count + 1).repeat(2)[1:-1] / count).tolist(), style)


def smooth(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Mean over a centred window of `share` of the points (of at least 1)."""
    if not values:
        return []
    window = np.ones(2 * int(len(values) * share / 2) + 1)
    return (np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")).tolist()


def path_from_above(c2w_F44: NDArray[np.float64], other_F44: NDArray[np.float64] | None = None) -> Markup:
    """The camera's way seen from above, the first frame looking up, ticks along the view; other: a control's; SVG."""
    size, margin = np.array([100.0, 75.0]), 12.0
    plans = [_plan(c2w) for c2w in (c2w_F44, other_F44) if c2w is not None]
    spread = np.concatenate([p[:, :2] for p in plans])
    low, high = spread.min(0), spread.max(0)
    scale = ((size - 2 * margin) / np.maximum(high - low, 1e-3)).min()
    parts = []
    for plan, style in [*zip(plans, ("model", "swapped"))][::-1]:  # the video's own last, on top
        xy = size / 2 + (plan[:, :2] - (low + high) / 2) * scale * np.array([1, -1])
        for i in np.linspace(0, len(xy) - 1, 9).round().astype(int):
            dx, dy = 7 * math.sin(plan[i, 2]), -7 * math.cos(plan[i, 2])
            d = f"M{xy[i, 0]:.1f},{xy[i, 1]:.1f} l{dx:.1f},{dy:.1f}"
            parts.append(f'<path class="line thin {style}" d="{d}"/>')
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in xy)
        parts.append(f'<polyline class="line {style}" points="{points}"/>')
    here = np.column_stack([xy, np.degrees(plan[:, 2])]).round(1).tolist()
    x, y, a = here[0]
    parts.append(
        f'<path class="here model" fill="currentColor" d="M0,-7 L4,4 L-4,4 Z" transform="translate({x} {y}) '
        f'rotate({a})" data-path="{here}"/>'
    )
    return Markup(f'<svg viewBox="0 0 100 75" role="img" aria-label="camera path from above">{"".join(parts)}</svg>')


def _plan(c2w: NDArray[np.float64]) -> NDArray[np.float64]:
    """(F,3): right, forward in metres and heading in radians (clockwise from above), in the first frame's axes."""
    relative = np.linalg.inv(c2w[0]) @ c2w
    forward = relative[:, :3, 2]
    return np.stack([relative[:, 0, 3], relative[:, 2, 3], np.arctan2(forward[:, 0], forward[:, 2])], axis=1)


def _finite(x: float | None) -> bool:
    return isinstance(x, int | float) and math.isfinite(x)


def _ticks(low: float, high: float) -> list[float]:
    """About four round numbers from at most low to at least high."""
    raw = ((high - low) or abs(high) or 1.0) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    return [float(f"{k * step:.10g}") for k in range(first, math.ceil(high / step - 1e-9) + 1)]

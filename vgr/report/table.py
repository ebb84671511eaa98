"""What every number and row of results.json is: labels, units and definitions, from metrics.json beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from vgr.metrics import features

FD = f"fd_{features.NAME}"
POSE_ERRORS = ("rot_step_imputed_deg", "heading_imputed_deg")


class Metric(NamedTuple):
    """label and unit for people; better: "higher", "lower" or "" (neither); `how` and the protocol's `section`
    define the number; primary ones stand in the table; needs: of NEEDS, in the order of asking.
    """

    label: str
    unit: str
    better: str
    how: str
    section: str
    primary: bool
    needs: tuple[str, ...]


_TOLD = json.loads(Path(__file__).with_name("metrics.json").read_text(encoding="utf-8"))
METRICS = {name: Metric(**row) for name, row in _TOLD["metrics"].items()}
LABELS = _TOLD["rows"]  # in the order of the table: what people read, and what the row is for
NEEDS = _TOLD["needs"]  # what is known before measuring, and after: need -> why there is none, what to do

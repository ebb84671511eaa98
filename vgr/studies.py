"""Studies: arms of one question as presets, seeds, and what they are measured by (experiments/<study>/study.json).

An arm is a shipped preset, the parent, with a few settings of its own: `experiments=<study>/<arm>` at full scale and
`experiments=<study>/<arm>_tiny` for two CPU cores. Neither has a file: `vgr.command` serves both from the JSON.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from vgr.command import root

TINY = "_tiny"
_STUDY = {"question", "paper", "full", "tiny", "seeds", "protocol", "metrics", "reference", "arms"}
_SCALE = {"parent", "settings", "hardware", "hours", "needs"}
_ARM = {"label", "settings", "published"}


@dataclass(frozen=True)
class Arm:
    """One row of a study: settings (`key=value`) over the parent's, and the published values by column, if any."""

    name: str
    settings: tuple[str, ...]
    published: Mapping[str, float] | None
    label: str


@dataclass(frozen=True)
class Scale:
    """A size all arms are trained at: the shipped preset they start from, settings they share, what it takes."""

    parent: str
    settings: tuple[str, ...]
    hardware: str
    hours: str
    needs: str


@dataclass(frozen=True)
class Study:
    """A question and its arms, the first of which the others are compared with.

    protocol: of benchmarks/protocols, by which the last step of an arm measures itself; None: by validation alone.
    metrics: what the table shows, in order, as metrics.jsonl has them (val/... and bench/...). reference: {"name",
    "table"} of benchmarks/references, where there is one.
    """

    name: str
    folder: Path
    question: str
    paper: str
    full: Scale
    tiny: Scale
    seeds: tuple[int, ...]
    protocol: str | None
    metrics: tuple[str, ...]
    reference: Mapping[str, str] | None
    arms: tuple[Arm, ...]

    def presets(self, tiny: bool) -> list[str]:
        """Names of the arms' presets, in order."""
        return [f"{self.name}/{arm.name}{TINY if tiny else ''}" for arm in self.arms]

    def sweep_command(self) -> str:
        """The command that trains and measures every arm and seed at tiny size, one after another."""
        seeds = ",".join(map(str, self.seeds))
        return f"vgr-train -m experiments={','.join(self.presets(True))} seed={seeds}"


def names() -> list[str]:
    """Names of the shipped studies."""
    return sorted(file.parent.name for file in (root() / "experiments").glob("*/study.json"))


def read(name: str) -> Study:
    """A shipped study. Raises ValueError naming the key that is missing, unknown or wrong, FileNotFoundError for a name
    that is none."""
    file = root() / "experiments" / name / "study.json"
    if not file.is_file():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise FileNotFoundError(f"study={name} does not exist; {hint}Studies: {', '.join(names()) or 'none'}")
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    _refuse_other_keys(told, _STUDY, str(file))
    scales = []
    for size in ("full", "tiny"):
        _refuse_other_keys(told[size], _SCALE, f"{file}: {size}")
        scales.append(Scale(**{**told[size], "settings": _settings(told[size]["settings"], f"{file}: {size}")}))
    rows, arms = _published(told["reference"], file), []
    for arm, given in told["arms"].items():
        _refuse_other_keys(given, _ARM, f"{file}: arms.{arm}")
        if not arm.isidentifier() or arm.endswith(TINY):
            raise ValueError(f"{file}: arms.{arm} must be letters, digits and _, and not end in {TINY}")
        if given["published"] is not None and given["published"] not in rows:
            raise ValueError(f"{file}: arms.{arm}.published={given['published']}; the reference has {', '.join(rows)}")
        settings = _settings(given["settings"], f"{file}: arms.{arm}")
        arms.append(Arm(arm, settings, rows.get(given["published"]), given["label"]))
    if not arms or not told["seeds"] or not all(type(seed) is int for seed in told["seeds"]):
        raise ValueError(f"{file}: arms and seeds, whole numbers, must not be empty, got seeds={told['seeds']}")
    listed = {key: tuple(told[key]) for key in ("seeds", "metrics")}
    rest = {key: told[key] for key in ("question", "paper", "protocol", "reference")}
    return Study(name, file.parent, full=scales[0], tiny=scales[1], arms=tuple(arms), **listed, **rest)


def _refuse_other_keys(told: Any, known: set[str], where: str) -> None:
    if not isinstance(told, dict) or (wrong := known ^ set(told)):
        raise ValueError(f"{where}: keys missing or unknown: {', '.join(sorted(wrong)) if told else 'all'}")


def _settings(told: Any, where: str) -> tuple[str, ...]:
    wrong = [x for x in told if not isinstance(x, str) or not x.partition("=")[1]] if isinstance(told, list) else [told]
    if wrong:
        raise ValueError(f"{where}.settings: {wrong[0]!r} is no key=value")
    return tuple(told)


def _published(reference: Mapping[str, str] | None, file: Path) -> dict[str, Mapping[str, float]]:
    """The values of a published table by what stands in its rows. Raises ValueError where there is none."""
    if reference is None:
        return {}
    _refuse_other_keys(reference, {"name", "table"}, f"{file}: reference")
    place = root() / "benchmarks" / "references" / f"{reference['name']}.json"
    if not place.is_file():
        raise FileNotFoundError(f"{file}: reference.name={reference['name']}: there is no {place}")
    rows = json.loads(place.read_text(encoding="utf-8"))["rows"]
    found = {row["system"]: row["values"] for row in rows if row["table"] == reference["table"]}
    if not found:
        raise ValueError(f"{file}: reference.table={reference['table']}: {place} has no such table")
    return found


def presets() -> list[str]:
    """Names of all arms' presets."""
    return [preset for name in names() for tiny in (False, True) for preset in read(name).presets(tiny)]


def find(preset: str) -> tuple[Study, Arm, Scale] | None:
    """What a preset is an arm of, and its size; None for one that is no arm. Raises what `read` does."""
    name, _, arm = preset.partition("/")
    if name not in names():
        return None
    study = read(name)
    for found in study.arms:
        if arm in (found.name, found.name + TINY):
            return study, found, study.tiny if arm.endswith(TINY) else study.full
    return None


def header(preset: str) -> dict[str, str]:
    """What a preset file's header tells (Question, Paper, Hardware, Hours, Needs), of an arm."""
    study, arm, scale = find(preset)
    return {"Question": f"{study.question} Here: {arm.label}.", "Paper": study.paper, "Hardware": scale.hardware,
            "Hours": scale.hours, "Needs": scale.needs}  # fmt: skip


def config(preset: str) -> DictConfig:
    """An arm as the preset file it has not: its parent's, with the settings of size and arm in it."""
    _, arm, scale = find(preset)
    merged = OmegaConf.load(root() / "experiments" / f"{scale.parent}.yaml")
    merged.merge_with_dotlist([*scale.settings, *arm.settings])
    return merged


def sweep(study: Study) -> str:
    """YAML of a W&B sweep over the arms at tiny size and their seeds: wandb sweep FILE, then wandb agent ID."""
    return yaml.safe_dump(
        {
            "name": study.name, "description": study.question, "program": "vgr-train", "method": "grid",
            "command": ["${program}", "logger=wandb", "${args_no_hyphens}"],
            "parameters": {"experiments": {"values": study.presets(True)}, "seed": {"values": list(study.seeds)}},
        },
        sort_keys=False,
    )  # fmt: skip

"""The comparison as a Weights & Biases report: run sets of the arms, panels over samples and hours, videos.

Tested against a local imitation of the server only (tests/integration/fake_wandb.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vgr.report import arms_tables


def publish(found: Mapping[str, Any], place: str | None) -> str:
    """Write the report of compare.json's content; returns its address. place: entity/project, or project alone.

    Raises ValueError where wandb-workspaces is missing, a run was never logged, or the server refuses.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise ValueError("publish=true needs the wandb-workspaces package: pip install 'vgr[report]'") from error
    import wandb

    runs = [run for arm in found["arms"] for run in arm["runs"]]
    if lost := [run["source"] for run in runs if not run["wandb_id"]]:
        raise ValueError(f"publish=true: W&B has no {', '.join(lost)}; train with logger=wandb, then wandb sync")
    entity, _, project = (place or "vgr").rpartition("/")
    try:
        entity = entity or wandb.Api().default_entity
        identities = {arm["label"]: [run["wandb_id"] for run in arm["runs"]] for arm in found["arms"]}
        sets = [wr.Runset(entity, project, name=label, filters=f"Metric('ID') in {own}", groupby=["Group"])
                for label, own in identities.items()]  # fmt: skip
        told = {"runsets": sets, "panels": _panels(wr, found, any(run["media"] for run in runs))}
        blocks = [wr.MarkdownBlock(arms_tables.markdown(found)), wr.PanelGrid(**told)]
        return wr.Report(project, entity, title=found["title"], blocks=blocks).save().url
    except (wandb.Error, ValueError, OSError) as error:
        told = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"publish=true: W&B took no report in {entity}/{project} ({told})") from error


def _panels(wr: Any, found: Mapping[str, Any], videos: bool) -> list[Any]:
    """Each curve over samples and over hours (W&B's axis is in seconds), final values as bars, samples as videos."""
    panels = []
    for key, told in found["curves"].items():
        over = {"y": [key], "groupby": "Group", "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
        panels += [wr.LinePlot(title=f"{told['label']} over samples", x="samples_seen", **over),
                   wr.LinePlot(title=f"{told['label']} over seconds", x="time_s", **over)]  # fmt: skip
    bars = [wr.BarPlot(title=told["label"], metrics=[key]) for key, told in found["metrics"].items()]
    return panels + bars + [wr.MediaBrowser(title="Samples", media_keys=["samples"])] * videos

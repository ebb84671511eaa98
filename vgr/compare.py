"""vgr-compare: arms and seeds of training runs, or finished benchmark results, side by side.

    vgr-compare runs=[runs/world_model/tiny,runs/world_model/tiny--model.cameras-none]     # all seeds below each folder
    vgr-compare study=camera_encoding                         # also writes its results.json and its README's table
    vgr-compare wandb=entity/project filters='{group: world_model/tiny}'
    vgr-compare runs=[runA/bench/standard,runB/bench/standard]                # finished results of one protocol
    vgr-compare study=camera_encoding sweep=true > sweep.yaml && wandb sweep sweep.yaml

Runs are read alike from their folders, from W&B's files of them (<run>/wandb/offline-run-*) and from its server; one
that was requeued is one. Written are compare.html, which needs no network, compare.json with the same numbers, table.md
and table.tex. publish=true makes a W&B report of the same. Server and report were tested against an imitation only.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgr import command

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vgr.report.runs import RunRecord
    from vgr.studies import Study

BESIDE = ("seed", "code", "inputs", "teacher_sha256", "init_from_sha256", "_wandb")  # told with a run's settings


def main() -> None:
    """Entry point of `vgr-compare` and `python -m vgr.compare`."""
    command.run("compare", body)


def body(cfg: DictConfig) -> None:
    """The command: conf/compare.yaml -> compare.html, compare.json, table.md, table.tex, and a study's own files."""
    from omegaconf import OmegaConf

    from vgr import studies
    from vgr.report import compare

    asked = OmegaConf.to_container(cfg, resolve=True)
    runs = [asked["runs"]] if isinstance(asked["runs"], str) else asked["runs"] or []
    folders, study = [Path(x) for x in runs], studies.read(cfg.study) if cfg.study else None
    if cfg.sweep:
        if study is None or _given(cfg, "runs", "wandb", "publish"):
            raise ValueError("sweep=true tells the sweep of a study and nothing else; give study=<name> alone")
        print(studies.sweep(study), end="")
    elif results := [x for x in folders if (x / "results.json").is_file()]:
        if len(results) < len(folders):
            other = next(x for x in folders if x not in results)
            raise ValueError(f"{results[0]} holds benchmark results and {other} none; give folders of one kind")
        if refused := _given(cfg, "study", "wandb", "filters", "first", "protocol", "metrics", "anyway", "publish"):
            raise ValueError(f"runs= of finished benchmark results takes no {', '.join(refused)}; leave that out")
        print(compare.write(results, cfg.out))
    else:
        _arms(cfg, asked, folders, study)


def _arms(cfg: DictConfig, asked: dict[str, Any], folders: list[Path], study: Study | None) -> None:
    from vgr.report import arms, arms_page, readme
    from vgr.report.runs import is_run

    if study is not None:
        if refused := _given(cfg, "metrics", "protocol", "first"):
            raise ValueError(f"study={study.name} has its own {', '.join(refused)}; leave that out")
        own = [Path("runs") / preset / f"seed{seed}" for preset in study.presets(True) for seed in study.seeds]
        folders += filter(is_run, own)
    elif not folders and not cfg.wandb:
        raise ValueError("give runs=[folder,...], study=<name> or wandb=<entity/project>")
    found = records(folders, cfg.wandb, asked["filters"], study.protocol if study else cfg.protocol)
    if study is not None:
        merged = of_study(study, found)
        told = readme.content(study, merged, cfg.anyway)
        readme.write(study, merged)
    else:
        told = arms.compare(sorted(found, key=lambda r: r.arm != cfg.first), asked["metrics"], anyway=cfg.anyway)
    name = study.name if study else told["arms"][0]["arm"].replace("/", "_")
    out = Path(cfg.out or Path("runs/compare") / name)
    print(arms_page.write(out, told, f"vgr · study {study.name}" if study else "vgr · training runs"))
    if cfg.publish:
        from vgr.report import wandb_report

        place = cfg.wandb or next((run.project for run in found if run.project), None)
        print(wandb_report.publish(told, place if cfg.publish is True else cfg.publish))


def records(
    folders: Sequence[Path], wandb: str | None = None, filters: Mapping[str, Any] | str | None = None,
    protocol: str | None = None,
) -> list[RunRecord]:  # fmt: skip
    """Runs of folders (runs, folders of runs, W&B's files) and of a W&B project, each once. Raises ValueError."""
    from vgr.report import runs, wandb_runs

    found: list[RunRecord] = []
    for folder in folders:
        if own := [folder] if runs.is_run(folder) else runs.below(folder):
            found += [runs.read_run(run, settings, protocol) for run in own]
        elif files := wandb_runs.files(folder):
            found += wandb_runs.from_files(files, settings)
        else:
            raise ValueError(f"{folder} holds no run of vgr-train, no W&B file of one and no results.json of vgr-bench")
    if wandb:
        found += wandb_runs.from_server(wandb, filters, settings)
    return runs.once(found)


def settings(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What of a resolved configuration changes results, flat, and is the same for all seeds of an arm."""
    told = command.flat({k: v for k, v in config.items() if k not in BESIDE})
    kept = {k: v for k, v in told.items() if command.changes_results(k) and not isinstance(v, dict)}
    return {k: v.replace(f"seed{seed}", "seed*") if isinstance(v, str) else v for k, v in kept.items()}


def of_study(study: Study, found: Sequence[RunRecord]) -> list[RunRecord]:
    """What results.json keeps of a study, with the finished runs of `found` in their places; says which are not.

    Raises ValueError for a run of another study, and where there is nothing at all.
    """
    from vgr.report import readme

    names = dict(zip(study.presets(True), (arm.name for arm in study.arms)))
    fresh = []
    for run in found:
        if run.arm not in names:
            raise ValueError(f"{run.source} is of {run.arm}, no arm of study={study.name}: {', '.join(names)}")
        if run.diverged is None and (run.samples[0] < run.samples[1] or set(study.metrics) - run.metrics.keys()):
            left = f"{run.samples[0]} of {run.samples[1]} samples, {len(study.metrics)} results are wanted"
            print(f"vgr-compare: {run.source} is not finished ({left}): {run.command}", file=sys.stderr)
        else:
            fresh.append(replace(run, arm=names[run.arm]))
    if not (merged := readme.merge(study, readme.records(readme.read(study)), fresh)):
        raise ValueError(f"study={study.name} has no finished run and no results.json: {study.sweep_command()}")
    return merged


def _given(cfg: DictConfig, *keys: str) -> list[str]:
    return [key for key in keys if cfg[key]]


if __name__ == "__main__":
    main()

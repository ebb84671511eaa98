"""Two arms trained from two seeds each, one run killed and started again: read alike from wherever they are kept."""

import json
import shutil
import socket
from dataclasses import replace

import pytest
import yaml
from fake_wandb import serving
from small_training import make_project, train

from vgr import compare as command
from vgr import studies
from vgr.report import arms, readme, runs, wandb_runs
from vgr.training.callbacks import BetweenSteps

SIZE = ("training.max_samples=48", "every={log: 8, validate: 24, sample: 48, save: 24}")
LOGGED = ("logger=wandb", "wandb.mode=offline")
ARMS = {"base": (), "slow": ("training.lr=3e-4",)}


def rename(folder, arm, seed):
    """The run of an arm as if its preset were study/<arm>_tiny."""
    own = next(p for p in (folder / "runs").glob(f"mini--*/seed{seed}") if ("training.lr" in str(p)) == (arm == "slow"))
    place = folder / "runs" / "pair" / f"{arm}_tiny" / f"seed{seed}"
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(own, place, symlinks=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    pytest.importorskip("wandb")
    folder = make_project(tmp_path_factory.mktemp("arms"))
    start = BetweenSteps.on_train_batch_start

    def killed(self, trainer, module, batch, batch_idx):
        if module.samples_seen == 40:  # sixteen after the last save
            raise RuntimeError("killed")
        start(self, trainer, module, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr(BetweenSteps, "on_train_batch_start", killed)
        assert "RuntimeError: killed" in train(folder, "seed=1", *SIZE, *LOGGED).stderr
    for own in ARMS.values():
        for seed in (1, 2):
            done = train(folder, *own, f"seed={seed}", *SIZE, *LOGGED)
            assert done.returncode == 0, done.stderr
    for arm in ARMS:
        for seed in (1, 2):
            rename(folder, arm, seed)
    return folder


@pytest.fixture
def here(project, monkeypatch):
    """The project as the working folder, and no network."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.chdir(project)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return project


def call(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["vgr-compare", *words])
        command.main()


def read(arm, seed, place="runs/pair"):
    return runs.read_run(runs.Path(f"{place}/{arm}_tiny/seed{seed}"), command.settings)


def offline(folder):
    return wandb_runs.from_files(wandb_runs.files(folder), command.settings)


def test_a_folder_and_wandbs_files_of_it_are_one_run_in_one_form(here):
    for arm in ARMS:
        for seed in (1, 2):
            own = read(arm, seed)
            (found,) = offline(here / "runs" / "pair" / f"{arm}_tiny" / f"seed{seed}")
            assert replace(found, source="", arm="", media=()) == replace(own, source="", arm="", media=(), clips={})
            assert own.seed == seed and own.samples == (48, 48) and own.cost["memory_gib"] > 0 < own.cost["hours"]
            told = json.loads((here / own.source / "validation.json").read_text())
            assert own.metrics["val/loss"] == told["summary"]["val/loss"]
            assert sum(own.clips["val/camera_gain"].values()) / 8 == pytest.approx(told["summary"]["val/camera_gain"])
            assert set(own.data) == {"data.train", "data.val"} and own.weights == {"init_from": "nothing"}
            assert own.cost["parameters"] > 1000
            assert own.command.startswith("vgr-train --config-dir own experiments=mini")
            assert found.media[0].endswith(".mp4") and runs.Path(found.media[0]).is_file() and own.media


def test_a_run_that_was_killed_and_started_again_appears_once_with_its_later_steps(here):
    folder = here / "runs" / "pair" / "base_tiny" / "seed1"
    files = wandb_runs.files(folder)
    assert len(files) == 2
    first, second = (wandb_runs._start(path)["rows"] for path in files)
    assert first[-1]["samples_seen"] == 40 and second[0]["samples_seen"] == 32
    (found,) = offline(folder)
    assert found.curves["train/loss"][0] == [8, 16, 24, 32, 40, 48] == read("base", 1).curves["train/loss"][0]
    (once,) = command.records([folder, folder / "wandb", folder])
    assert once == replace(read("base", 1), source=once.source, media=once.media) and once.clips


def test_the_page_of_offline_folders_alone_with_the_network_blocked(here, tmp_path, capsys):
    for arm in ARMS:
        for seed in (1, 2):
            shutil.copytree(f"runs/pair/{arm}_tiny/seed{seed}/wandb", tmp_path / arm / f"{seed}", symlinks=True)
    call(f"runs=[{tmp_path}/base,{tmp_path}/slow]", f"out={tmp_path}/page")
    assert capsys.readouterr().out.strip() == f"{tmp_path}/page/compare.html"
    told = json.loads((tmp_path / "page/compare.json").read_text())
    for arm, name in zip(told["arms"], ARMS):
        losses = [read(name, seed).metrics["val/loss"] for seed in (1, 2)]
        assert arm["metrics"]["val/loss"]["value"] == pytest.approx(sum(losses) / 2)
        assert arm["seeds"] == [1, 2] and arm["metrics"]["val/loss"]["count"] == 1  # no values by clip in W&B
        assert arm["curves"]["val/loss"]["samples"] == [24, 48]
    assert (tmp_path / "page/compare.html").read_text().count("data:video/mp4") == 2


def test_folders_of_arms_stand_side_by_side_and_their_order_is_the_users(here, tmp_path):
    call("runs=runs/pair", f"out={tmp_path}")
    told = json.loads((tmp_path / "compare.json").read_text())
    assert [(a["arm"], a["seeds"]) for a in told["arms"]] == [("pair/base_tiny", [1, 2]), ("pair/slow_tiny", [1, 2])]
    assert told["settings"] == {"training.lr": {"pair/base_tiny": 0.003, "pair/slow_tiny": 0.0003}}
    (loss, gain) = told["differences"]
    own = [read(arm, seed) for arm in ARMS for seed in (1, 2)]
    assert loss == arms.compare(own)["differences"][0] and (loss["seeds"], loss["count"]) == (2, 8)
    call("runs=runs/pair", "first=pair/slow_tiny", f"out={tmp_path}")
    again = json.loads((tmp_path / "compare.json").read_text())
    assert [a["arm"] for a in again["arms"]] == ["pair/slow_tiny", "pair/base_tiny"]
    assert again["differences"][0]["value"] == pytest.approx(-loss["value"])


def test_runs_of_other_data_or_unfinished_are_refused_in_one_line(here, tmp_path, capsys):
    shutil.copytree("runs/pair", tmp_path / "pair", symlinks=True)
    place = tmp_path / "pair/slow_tiny/seed2"
    inputs = json.loads((place / "inputs.json").read_text())
    (place / "inputs.json").write_text(json.dumps(inputs | {"data.val": "other", "init_from": "w"}))
    lines = (place / "metrics.jsonl").read_text().splitlines()
    (place / "metrics.jsonl").write_text("\n".join(x for x in lines if json.loads(x)["samples_seen"] < 40))
    with pytest.raises(SystemExit):
        call(f"runs={tmp_path}/pair", f"out={tmp_path}/out")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{place} has seen 32 of 48 samples; `vgr-train --config-dir own" in told
    assert f"base_tiny/seed1 and {place} are of different data: data.val is " in told
    assert not (tmp_path / "out").exists()
    call(f"runs={tmp_path}/pair", f"out={tmp_path}/out", "anyway=true")
    assert "are of different data: data.val" in (tmp_path / "out/compare.html").read_text()


@pytest.fixture
def server(project, monkeypatch):
    """The same runs on a local imitation of the server; yields what was published."""
    wandb, reports, told = pytest.importorskip("wandb"), [], []
    for arm in ARMS:
        for seed in (1, 2):
            starts = [wandb_runs._start(p) for p in wandb_runs.files(project / f"runs/pair/{arm}_tiny/seed{seed}")]
            rows = [row for start in starts for row in start["rows"]]
            told.append({k: starts[-1][k] for k in ("id", "name", "config")} | {"group": arm, "rows": rows})
    told.append({**told[0], "id": "evaluated", "job": "evaluate"})
    monkeypatch.chdir(project)
    with serving(told, reports) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()
        yield reports
        wandb.teardown()


def test_the_servers_runs_are_those_of_the_files_and_a_report_shows_them(server, tmp_path, capsys):
    pytest.importorskip("wandb_workspaces")
    found = wandb_runs.from_server("team/vgr", None, command.settings)
    local = [one for arm in ARMS for seed in (1, 2) for one in offline(runs.Path(f"runs/pair/{arm}_tiny/seed{seed}"))]
    apart = {"source": "", "project": "", "media": ()}
    assert [replace(x, **apart) for x in found] == [replace(x, **apart) for x in local]
    assert all(x.media and x.media[0].startswith("http") for x in found)
    chosen = wandb_runs.from_server("team/vgr", '{"group": "slow"}', command.settings)
    assert [x.wandb_id for x in chosen] == [x.wandb_id for x in local[2:]]
    with pytest.raises(ValueError, match="no training run there"):
        wandb_runs.from_server("team/vgr", {"group": "none"}, command.settings)
    call("wandb=team/vgr", "publish=true", f"out={tmp_path}")
    page, address = capsys.readouterr().out.split()[-2:]
    assert page == f"{tmp_path}/compare.html" and "/team/vgr/reports/" in address
    (sent,) = server
    assert (sent["entityName"], sent["projectName"]) == ("team", "vgr")
    blocks = json.loads(sent["spec"])["blocks"]
    grid = next(x["metadata"] for x in blocks if x["type"] == "panel-grid")
    chosen = [x["filters"]["filters"][0]["value"] for x in grid["runSets"]]
    assert chosen == [[x.wandb_id for x in local[:2]], [x.wandb_id for x in local[2:]]]
    panels = json.dumps(grid["panelBankSectionConfig"])
    for wanted in ("samples_seen", "time_s", "val/loss", "Bar Chart", "Media Browser", '"samples"', "minmax"):
        assert wanted in panels, wanted
    assert "Validation loss" in json.dumps([x for x in blocks if x["type"] != "panel-grid"])


def test_a_server_that_is_not_there_is_one_line(server, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "")
    with pytest.raises(SystemExit):
        call("wandb=team/vgr", "filters={group: none}")
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("vgr-compare: error: wandb=team/vgr")


@pytest.fixture
def pair_study(here, monkeypatch, tmp_path):
    """A study of the two arms, in a folder of its own."""
    whole = studies.read("camera_encoding")
    own = tuple(replace(arm, name=name, label=f"the {name}", published=None) for arm, name in zip(whole.arms, ARMS))
    found = replace(whole, name="pair", folder=tmp_path / "experiments" / "pair", seeds=(1, 2), arms=own,
                    reference=None, metrics=("val/loss", "val/camera_gain"))  # fmt: skip
    found.folder.mkdir(parents=True)
    (found.folder / "README.md").write_text(f"# Pair\n\n{readme.MARKS[0]}\n{readme.MARKS[1]}\n")
    monkeypatch.setattr(studies, "read", {"pair": found}.__getitem__)
    return found


def test_a_study_is_compared_written_down_and_told_again_without_its_runs(pair_study, tmp_path, monkeypatch, capsys):
    call("study=pair")
    page = runs.Path(capsys.readouterr().out.strip())
    assert page == runs.Path("runs/compare/pair/compare.html") and "study pair" in page.read_text()
    text, results = (pair_study.folder / "README.md").read_text(), readme.read(pair_study)
    assert readme.between(text) == readme.table(pair_study, results) and "| the slow | 2 |" in text
    told = json.loads(page.with_suffix(".json").read_text())
    assert readme.between(text) == page.with_name("table.md").read_text()
    assert told["differences"] == readme.content(pair_study, readme.records(results))["differences"]
    assert str(tmp_path) not in json.dumps(results)
    monkeypatch.chdir(tmp_path)  # no run is here
    call("study=pair")
    assert (pair_study.folder / "README.md").read_text() == text and readme.read(pair_study) == results


def test_a_study_says_what_is_left_to_run(pair_study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        call("study=pair")
    assert f"no finished run and no results.json: {pair_study.sweep_command()}" in capsys.readouterr().err


def test_the_sweep_file_has_the_grid_of_the_multirun_command(pair_study, capsys):
    call("study=pair", "sweep=true")
    told = yaml.safe_load(capsys.readouterr().out)
    assert told["method"] == "grid" and told["program"] == "vgr-train"
    assert told["parameters"]["seed"]["values"] == [1, 2]
    presets = told["parameters"]["experiments"]["values"]
    assert presets == ["pair/base_tiny", "pair/slow_tiny"]
    assert pair_study.sweep_command() == f"vgr-train -m experiments={','.join(presets)} seed=1,2"

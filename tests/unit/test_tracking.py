"""Where a run's numbers go, whatever becomes of the network, and what code it was started with."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from vgr.training import code_state, tracking
from vgr.training.tracking import Record, start_wandb

CONFIG = {"runs": "runs", "model": {"_target_": "vgr.models.world_model.WorldModel"}, "code": {"commit": "c0ffee"}}
NUMBERS = {"step": 2, "perf/mfu": 0.41, "val/loss": 0.5, "parallel/ranks": 8}


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """wandb beside a server that is not there."""
    module = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    module.teardown()
    yield module
    module.teardown()


def run_dir(tmp_path):
    folder = tmp_path / "runs/study/arm/seed1"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def warned(caplog):
    """Our own lines; wandb logs for itself."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("vgr")]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_dead_server_makes_the_run_offline_with_one_line(wandb, tmp_path, caplog):
    folder = run_dir(tmp_path)
    run = start_wandb(folder.relative_to(tmp_path), CONFIG, "vgr", None, "online")
    assert run.offline and len(warned(caplog)) == 1 and "kept offline" in warned(caplog)[0]
    said = []
    record = Record(folder / "metrics.jsonl", 0.0, run, said.append)
    record.log(NUMBERS, 8)
    record.close()
    assert len(said) == 1 and f"wandb sync runs/study/arm/seed1/wandb/offline-run-*-{run.id}" in said[0]
    assert {k: v for k, v in lines(folder / "metrics.jsonl")[0].items() if k != "time_s"} == {
        "samples_seen": 8
    } | NUMBERS


@pytest.mark.parametrize("refused", [("online",), ("online", "offline")])
def test_whatever_init_raises_the_run_goes_on(wandb, tmp_path, monkeypatch, caplog, refused):
    asked, init = [], wandb.init

    def failing(mode, **settings):
        asked.append(mode)
        if mode in refused:
            raise TimeoutError(f"{mode} took too long\nand more")
        return init(mode=mode, **settings)

    monkeypatch.setattr(wandb, "init", failing)
    run = start_wandb(run_dir(tmp_path), {}, "vgr", None, "online")
    assert asked == ["online", "offline"] and (run is None) == ("offline" in refused)
    assert [line.count("took too long") for line in warned(caplog)] == [1] * len(refused)
    assert "and more" not in "".join(warned(caplog))
    record = Record(run_dir(tmp_path) / "metrics.jsonl", 0.0, run)
    record.log(NUMBERS, 8)
    record.close()


def test_values_that_wandb_refuses_are_in_the_record_all_the_same(tmp_path, caplog):
    def fail(*_, **__):
        raise ConnectionError("broken pipe")

    said, run = (
        [],
        SimpleNamespace(
            log=fail, finish=fail, offline=False, id="abc", settings=SimpleNamespace(sync_dir="wandb/run-1-abc")
        ),
    )
    record = Record(tmp_path / "metrics.jsonl", 0.0, run, said.append)
    for seen in (8, 16):
        record.log(NUMBERS, seen)
    record.log_video(tmp_path / "absent.mp4", 16)
    record.close()
    assert [x["samples_seen"] for x in lines(tmp_path / "metrics.jsonl")] == [8, 16]
    assert len(warned(caplog)) == 1 and "broken pipe" in warned(caplog)[0]
    assert said == ["W&B was not told everything (broken pipe). To upload: wandb sync wandb/run-1-abc"]


def test_a_requeued_run_is_the_same_run(wandb, tmp_path, monkeypatch):
    """Same id, group, tags, config with the code's state; nothing of the user's tree unless asked."""
    folder, told = run_dir(tmp_path).relative_to(tmp_path), []
    (folder / "code-12345678.diff").write_text("secret\n")
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **settings: told.append(settings) or init(**settings))
    runs = []
    for _ in range(2):
        runs.append(start_wandb(folder, CONFIG, "vgr", None, "offline", tags=["mine"]))
        assert dict(runs[-1].config)["code"] == {"commit": "c0ffee"}
        runs[-1].finish()
    assert told[0]["id"] == told[1]["id"] == runs[0].id == runs[1].id and told[0]["resume"] == "allow"
    assert told[0]["group"] == "study/arm" and told[0]["tags"] == ["mine", "WorldModel"]
    assert told[0]["job_type"] == "train" and told[0]["settings"].disable_git
    kept = [p for p in folder.rglob("*") if p.is_file() and "wandb/" in p.as_posix()]
    assert not [p for p in kept if b"secret" in p.read_bytes() or b"code-12345678.diff" in p.read_bytes()]
    asked = start_wandb(folder, CONFIG, "vgr", None, "offline", group="g", code=True)
    asked.finish()
    staged = next((folder / "wandb").glob(f"*{asked.id}/run-*.wandb"))
    assert told[2]["group"] == "g" and staged.is_file()
    # Wherever and whenever W&B writes it: starts within a second do not sort by folders, and it has a process apart.
    end = time.monotonic() + 60
    while not (told_of := [p for p in folder.rglob("*.wandb") if b"code-12345678.diff" in p.read_bytes()]):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert len(told_of) == 1


def test_a_run_that_an_earlier_job_left_open_is_not_the_next_ones(wandb, tmp_path):
    folders = [tmp_path / f"runs/study/arm/seed{seed}" for seed in (1, 2)]
    for folder in folders:
        folder.mkdir(parents=True)
    runs = [start_wandb(folder, CONFIG, "vgr", None, "offline") for folder in folders]
    Record(folders[1] / "metrics.jsonl", 0.0, runs[1]).close()
    assert runs[0].id != runs[1].id
    for folder, run in zip(folders, runs):
        assert [path.stem for path in folder.glob("wandb/offline-run-*/*.wandb")] == [f"run-{run.id}"]


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    folder = tmp_path / "tree"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "topic")
    (folder / "a.py").write_text("one = 1\n")
    (folder / ".gitignore").write_text("ignored.py\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    monkeypatch.setattr(code_state, "ROOT", folder)
    monkeypatch.setattr(sys, "argv", ["vgr-train", "experiments=a b"])
    return folder


def test_each_start_says_what_code_it_ran(checkout, tmp_path):
    clean = code_state.save(tmp_path, 0)
    assert clean["branch"] == "topic" and len(clean["commit"]) == 40 and clean["dirty"] is False
    assert clean["diff"] is None and not list(tmp_path.glob("*.diff"))
    assert clean["command"] == "vgr-train 'experiments=a b'" and clean["versions"]["torch"] and clean["device"]
    (checkout / "a.py").write_text("one = 2\n")
    changed = code_state.save(tmp_path, 8)
    for name in ("new.py", "new.yaml", "ignored.py", "data.bin"):
        (checkout / name).write_text("b: 3\n")
    untracked = code_state.save(tmp_path, 16)
    starts = json.loads((tmp_path / "code.json").read_text())
    assert starts == [clean, changed, untracked] and [x["samples_seen"] for x in starts] == [0, 8, 16]
    assert len({x["diff_sha256"] for x in starts}) == 3 and len({x["commit"] for x in starts}) == 1
    patch = (tmp_path / untracked["diff"]).read_text()
    assert "+one = 2" in patch and "b/new.py" in patch and "b/new.yaml" in patch
    assert "ignored.py" not in patch and "data.bin" not in patch
    git(checkout, "stash", "-u")
    subprocess.run(["git", "apply", str(tmp_path / untracked["diff"])], cwd=checkout, check=True)
    assert (checkout / "a.py").read_text() == "one = 2\n" and (checkout / "new.yaml").is_file()


def test_without_a_checkout_there_are_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(code_state, "ROOT", tmp_path)
    told = code_state.save(tmp_path, 0)
    assert told["commit"] is told["branch"] is told["dirty"] is told["diff"] is None
    assert told["versions"]["vgr"] and (tmp_path / "code.json").is_file()


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.rank_zero_only, "rank", 1)
    record = tracking.start(tmp_path, {}, 0, 0.0, {"project": "vgr", "entity": None, "mode": "offline"}, print)
    record.log(NUMBERS, 8)
    record.close()
    assert not list(tmp_path.iterdir())


def test_a_record_without_wandb_keeps_everything_and_rewinds(tmp_path):
    record = tracking.start(tmp_path, {}, 0, 0.0, None, print)
    for seen in (8, 16, 24):
        record.log(NUMBERS, seen)
    again = tracking.start(tmp_path, {}, 16, 5.0, None, print)
    again.close()
    assert [x["samples_seen"] for x in lines(tmp_path / "metrics.jsonl")] == [8, 16] and again.seconds() >= 5
    assert [x["samples_seen"] for x in json.loads((tmp_path / "code.json").read_text())] == [0, 16]

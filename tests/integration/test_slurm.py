"""The scripts of slurm/ on a real Slurm: slurmctld and two slurmd on loopback, brought up by slurm_loopback.sh."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from small_training import CODEC, environment, make_project, metrics, train, write_shards

from vgr.training import checkpoints

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = Path(__file__).with_name("slurm_loopback.sh")
SITE = """environment={prefix}
gres=gpu devices=2 cpus=1 hours=1 warning=30
"""
# Two gloo ranks; a value with braces and blanks has to arrive as it was given.
RUN = ["--config-dir", "own", "experiments=mini", "data.micro_batch=2", "training.max_samples=240",
       "sampling={steps: 2, shift: 3.0}"]  # fmt: skip


@pytest.fixture(scope="module")
def slurm():
    """The environment in which Slurm's commands find the cluster."""
    missing = [
        name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name, path="/usr/sbin:/usr/bin") is None
    ]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    folder = tempfile.mkdtemp(prefix="slurm")  # a socket's path must be short
    up = subprocess.run([LOOPBACK, "up", folder], capture_output=True, text=True)
    if up.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"Slurm does not come up here: {up.stderr[-2000:]}")
    yield {**environment(), "SLURM_CONF": up.stdout.strip()}
    subprocess.run([LOOPBACK, "down", folder])
    shutil.rmtree(folder, ignore_errors=True)


def scripts(folder):
    """slurm/ in a folder, of a site without GPUs whose environment is this one."""
    ours = ("submit", "job.sh", "train.sbatch", "bench.sbatch", "prepare.sbatch")
    (folder / "slurm").mkdir(parents=True)
    for name in ours:
        shutil.copy(ROOT / "slurm" / name, folder / "slurm" / name)
    (folder / "slurm" / "site.env").write_text(SITE.format(prefix=sys.prefix))
    return folder


@pytest.fixture(scope="module")
def site(slurm, tmp_path_factory):
    from test_train import codec_frames

    from vgr.data.video import encode_video
    from vgr.models.codec import CosineCodec

    folder, codec = make_project(tmp_path_factory.mktemp("site")), CosineCodec(**CODEC)
    shutil.rmtree(folder / "shards" / "val")
    write_shards(
        folder / "shards", "val", 8, codec.fingerprint, video=lambda x: encode_video(codec_frames(codec, x), 8.0)
    )
    return Site(scripts(folder), slurm)


class Site:
    def __init__(self, folder, env):
        self.folder, self.env = folder, env

    def call(self, *words):
        done = subprocess.run(words, cwd=self.folder, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *words):
        return re.findall(r"^job (\d+):", self.call("slurm/submit", *words), re.MULTILINE)

    def show(self, job, key):
        return re.search(rf"\b{key}=(\S*)", self.call("scontrol", "--oneliner", "show", "job", job))[1]

    def until(self, happened, what, patience=600.0):
        end = time.monotonic() + patience
        while not happened():
            assert time.monotonic() < end, f"{what}: {self.call('squeue')}{self.logs()}"
            time.sleep(0.1)

    def ended(self, job, state="COMPLETED"):
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.show(job, "JobState") in over, f"job {job} to end")
        assert self.show(job, "JobState") == state, self.logs()

    def again(self, job):
        """A job that was put back into the queue starts soon, not in two minutes.

        Not in the same second: the nodes have revoked all credentials of this job up to now.
        """
        self.until(lambda: self.show(job, "JobState") == "PENDING", f"job {job} to be queued again")
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    def logs(self):
        return "".join(f"\n{p.name}:\n{p.read_text()}" for p in sorted(self.folder.glob("slurm/logs/*.out")))

    def run_folder(self, runs):
        (found,) = self.folder.glob(f"{runs}/mini*/seed1")
        return found

    def saved(self, runs):
        """The newest checkpoint of a run, or None."""
        found = list(self.folder.glob(f"{runs}/mini*/seed1/checkpoints/latest"))
        return found[0].read_text() if found else None


@pytest.fixture(scope="module")
def undisturbed(site):
    """On two nodes with a task each, so by a rendezvous over the list of nodes."""
    (job,) = site.submit("train", "nodes=2", "devices=1", *RUN, "runs=whole")
    site.ended(job)
    return site.run_folder("whole")


def assert_equal_runs(one, other):
    for part in ("weights", "ema"):
        a, b = (checkpoints.weights_hash(checkpoints.latest(x / "checkpoints"), part) for x in (one, other))
        assert a == b
    assert metrics(one) == metrics(other)


@pytest.mark.slow
def test_preempted_and_near_its_limit_a_run_is_requeued_and_ends_as_if_undisturbed(site, undisturbed):
    (job,) = site.submit("train", *RUN, "runs=stopped")
    site.until(lambda: site.saved("stopped"), "the first checkpoint")
    high = site.call("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap=true").strip()
    site.ended(high)  # so Slurm has preempted ours
    site.again(job)
    position = site.saved("stopped")
    assert position < site.saved("whole")
    site.until(lambda: site.saved("stopped") != position, "a checkpoint of the second start")
    site.call("scancel", "--signal=USR1", job)  # what --signal=USR1@30 sends
    site.again(job)
    site.ended(job)
    assert site.show(job, "Restarts") == "2"
    log = site.logs()
    assert "stopped by signal 15" in log and "stopped by signal 10" in log
    assert_equal_runs(undisturbed, site.run_folder("stopped"))


@pytest.mark.slow
def test_where_requeue_is_forbidden_a_chain_goes_on_and_its_rest_does_nothing(site, undisturbed):
    jobs = site.submit("train", "chain=3", *RUN, "runs=chained")
    assert len(jobs) == 3
    site.until(lambda: site.saved("chained"), "the first checkpoint")
    site.call("scancel", "--signal=USR1", jobs[0])
    site.ended(jobs[0], "FAILED")
    site.ended(jobs[2])
    logs = [(site.folder / f"slurm/logs/vgr-train-{job}.out").read_text() for job in jobs]
    assert "the next job of the chain goes on" in logs[0] and "trained 240 samples" in logs[1]
    assert logs[2].startswith(f"nothing left to do: job {jobs[1]} ended with code 0")
    assert_equal_runs(undisturbed, site.run_folder("chained"))


@pytest.mark.slow
def test_an_array_of_four_parts_merges_to_the_undivided_result(site, undisturbed):
    protocol = {"name": "small", "clips": 4, "reference": 4, "frames": 17, "seed": 0, "sampling": {"steps": 1},
                "drift": {"window_s": 0.5}, "frechet": {"window_frames": 9, "draws": 4},
                "frame_rate": {"warmup": 0, "requests": 1}}  # fmt: skip
    (site.folder / "small.json").write_text(json.dumps(protocol))
    words = ["bench", f"checkpoint={undisturbed}", "protocol=small.json"]
    (whole,) = site.submit(*words, "out=undivided")
    (array,) = site.submit(*words, "out=divided", "array=0-3", "part=%a/4")
    (merge,) = site.submit(*words, "out=divided", f"after={array}")
    site.ended(whole)
    site.ended(merge)
    assert sorted(re.findall(r"part (\d)/4 is done", site.logs())) == ["0", "1", "2", "3"]
    found = [json.loads((site.folder / out / "results.json").read_text()) for out in ("undivided", "divided")]
    numbers = [
        {(row, name): cell["value"] for row, x in f["rows"].items() for name, cell in x["metrics"].items()
         if f["metrics"][name]["section"] != "frame_rate"} for f in found
    ]  # fmt: skip
    assert numbers[0] == numbers[1] and len(numbers[0]) > 20
    lines = [(site.folder / out / "videos.jsonl").read_text() for out in ("undivided", "divided")]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_a_multirun_of_two_arms_through_submitit(site):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'vgr[slurm]'")
    site.call(
        sys.executable, "-m", "vgr.train", "-m", *RUN[:4], "training.max_samples=16", "training.lr=1e-3,3e-3",
        "runs=arms", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=low",
    )  # fmt: skip
    arms = sorted(site.folder.glob("arms/mini*/seed1"))
    assert [re.search(r"lr-([\d.e-]+)", x.parent.name)[1] for x in arms] == ["0.001", "0.003"]
    hashes = {checkpoints.weights_hash(checkpoints.latest(x / "checkpoints")) for x in arms}
    assert len(hashes) == 2 and all(metrics(x)[-1]["samples_seen"] == 16 for x in arms)


@pytest.mark.slow
def test_what_is_cancelled_stays_cancelled_and_what_is_preempted_comes_back(site):
    """A command that ends as training does at SIGTERM, without the seconds that torch takes to be imported."""
    (site.folder / "slurm" / "logs").mkdir(exist_ok=True)
    own = "#!/usr/bin/env bash\nsource slurm/job.sh || exit 2\nlaunch bash -c 'echo begun; exec sleep 600'\n"
    (site.folder / "slurm" / "sleep.sbatch").write_text(own)

    def start(partition, *options):
        options += (f"--partition={partition}", "--requeue", f"--output={site.folder}/slurm/logs/sleep-%j.out")
        job = site.call("sbatch", "--parsable", *options, "slurm/sleep.sbatch").strip()
        log = site.folder / "slurm" / "logs" / f"sleep-{job}.out"
        site.until(lambda: log.is_file() and "begun" in log.read_text().splitlines(), "the job to begin")
        return job

    preempted = start("spare")  # where Slurm itself would end it for good
    site.call("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--wrap=true")
    site.until(lambda: site.show(preempted, "Restarts") == "1", "the preempted job to be queued again")
    limited = start("low", "--time=1", "--signal=USR1@50")
    cancelled, told = start("low"), start("low")
    site.call("scancel", cancelled)
    site.call("scancel", "--signal=TERM", told)
    site.until(lambda: site.show(told, "Restarts") == "1", "the other to be queued again")
    site.until(lambda: site.show(cancelled, "JobState") == "CANCELLED", "the cancelled job to end")
    assert site.show(cancelled, "Restarts") == "0"
    site.until(lambda: site.show(limited, "Restarts") == "1", "the job near its limit to be queued again")
    site.call("scancel", told, preempted, limited)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_is_kept_and_lightning_requeues_nothing(tmp_path, monkeypatch, number):
    """Between Lightning's handlers and ours: one would requeue with a checkpoint of its own, one end with code 0."""
    from vgr.data.modules import ShardData

    for name, value in {"NTASKS": 1, "NTASKS_PER_NODE": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_ID": 1}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    loader = ShardData.train_dataloader
    monkeypatch.setattr(ShardData, "train_dataloader", lambda data: signal.raise_signal(number) or loader(data))
    before = signal.getsignal(number)
    done = train(make_project(tmp_path))
    assert done.returncode == 128 + number and "the same command continues" in done.stderr
    run = tmp_path / "runs/mini/seed1"
    assert [p.name for p in (run / "checkpoints").glob("step_*")] == ["step_00000001"]
    assert not list(tmp_path.rglob("hpc_ckpt*")) and signal.getsignal(number) == before


def submit(folder, *words):
    """slurm/submit without a cluster: it only says what it would send."""
    return subprocess.run(["slurm/submit", *words], cwd=folder, env=os.environ, capture_output=True, text=True)


def test_a_dry_run_shows_the_script_and_every_argument_survives(tmp_path):
    folder = scripts(tmp_path)
    (folder / "slurm/site.env").write_text("account='a lab' partition=gpu gres=gpu:h200 sbatch=(--qos='long one')\n")
    given = ["experiments=world_model/hybrid", "sampling={steps: 12}", "training.objective.ratio=[1,1]", "a='b \"c\"'",
             "x=$(touch injected)", "y=`touch injected`;touch injected", "z=*", "-m"]  # fmt: skip
    done = submit(folder, "train", "nodes=2", "hours=1.5", *given, "dry=true")
    assert done.returncode == 0, done.stderr
    line, _, text = done.stdout.partition("\n")
    sent = shlex.split(line)
    assert sent[-len(given) - 1 :] == ["slurm/train.sbatch", *given]
    expected = {"--account=a lab", "--partition=gpu", "--gres=gpu:h200:8", "--nodes=2", "--ntasks-per-node=8",
                "--time=90", "--signal=USR1@300", "--requeue", "--qos=long one"}  # fmt: skip
    assert expected <= set(sent)
    for name in ("train.sbatch", "job.sh"):
        assert (ROOT / "slurm" / name).read_text() in text
    assert not list(folder.glob("injected")) and not (folder / "slurm" / "logs").exists()


@pytest.mark.parametrize(
    "words, told",
    [
        (["vgr-train"], "give train, bench or prepare"),
        (["train", "chain=ten"], "chain=ten: give a number"),
        (["train", "hours=a day"], "hours=a day: give a number"),
        (["train", "chain=3", "array=0-3"], "give one of them"),
        (["bench", "nodes=2"], "nodes= and chain= are for train"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, told):
    done = submit(scripts(tmp_path), *words, "dry=true")
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1


def test_without_a_site_it_says_what_to_copy(tmp_path):
    folder = scripts(tmp_path)
    (folder / "slurm/site.env").unlink()
    assert "copy slurm/site.env.example" in submit(folder, "train", "dry=true").stderr


def test_no_command_has_a_setting_that_the_launcher_takes():
    from vgr import command

    launcher = set(re.search(r"\[(.*)\]", (ROOT / "slurm" / "submit").read_text())[1].replace("=", "").split())
    assert launcher == {"nodes", "devices", "hours", "chain", "array", "after", "dry"}
    for name in ("train", "bench", "prepare"):
        assert not launcher & set(command.compose(name))

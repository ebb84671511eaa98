"""The command wrapper, run as a user runs it: exit codes, one line on stderr, nothing written."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from vgr import command

PROGRAM = """
import sys
from vgr import command
def body(cfg):
    print("torch" in sys.modules, cfg.seed)
    if cfg.seed == 2: raise ValueError("two\\n lines")
    if cfg.seed == 3: raise OSError(28, "No space left on device", "there")
    if cfg.seed == 4: raise FloatingPointError("diverged")
    if cfg.seed == 5: raise KeyError("a defect")
command.run("train", body)
"""


def call(tmp_path, *arguments, **environment):
    import os

    env = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"} | environment
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["seed=2"], 2, "vgr-train: error: two lines"),
        (["seed=3"], 2, "vgr-train: error: No space left on device: there"),
        (["seed=4"], 3, "vgr-train: error: diverged"),
        (["training.global_bacth=4"], 2, "did you mean `training.global_batch`?"),
        (["sed=4"], 2, "did you mean `seed`?"),
        (["experiments=world_model/tny"], 2, "did you mean experiments=world_model/tiny?"),
        (["model=world_model_tinny"], 2, "did you mean model=world_model_tiny?"),
        (["+foo=1"], 2, "no setting called `foo`"),
        (["seed=["], 2, "vgr-train: error: "),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, arguments, code, message):
    done = call(tmp_path, *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_traceback_on_request_and_for_defects(tmp_path):
    assert "Traceback" in call(tmp_path, "seed=2", HYDRA_FULL_ERROR="1").stderr
    defect = call(tmp_path, "seed=5")
    assert defect.returncode == 1 and "Traceback" in defect.stderr


def test_help_config_and_sweep(tmp_path):
    text = call(tmp_path, "--help").stdout
    assert "experiments/world_model: " in text and "doom_small" in text
    assert "max_samples" in text and "tests" not in text
    assert "seed: 7" in call(tmp_path, "--cfg", "job", "seed=7").stdout
    swept = call(tmp_path, "-m", "seed=6,7")
    assert swept.stdout.split() == ["False", "6", "False", "7"]  # and torch is not imported by the wrapper


@pytest.mark.parametrize(
    "seeds, code, told",
    [
        ("4,6", 3, ["vgr-train: error: seed=4: diverged"]),
        ("4,6,2", 2, ["vgr-train: error: seed=4: diverged", "vgr-train: error: seed=2: two lines"]),
        ("5,6", 1, ["Traceback", "KeyError"]),
    ],
)
def test_a_sweep_goes_on_after_a_job_that_failed_and_says_so_at_its_end(tmp_path, seeds, code, told):
    done = call(tmp_path, "-m", f"seed={seeds}")
    assert done.returncode == code
    assert [line.split()[1] for line in done.stdout.splitlines()] == seeds.split(",")
    assert all(line in done.stderr for line in told)


def test_own_presets_stand_beside_arms_of_studies(tmp_path):
    own = tmp_path / "my" / "experiments" / "attention"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\nseed: 9\n")
    assert call(tmp_path, "--config-dir", "my", "experiments=attention/mine").stdout.split() == ["False", "9"]
    arm = ["--config-dir", "my", "experiments=attention/softmax_tiny"]
    assert "softmax_every: 1" in call(tmp_path, *arm, "--cfg", "job").stdout
    help_ = call(tmp_path, "--help").stdout
    assert "hybrid_2_tiny" in help_ and "hybrid_4" in help_


def test_own_presets_and_their_misspelt_keys(tmp_path):
    own = tmp_path / "my" / "experiments"
    own.mkdir(parents=True)
    (own / "good.yaml").write_text("# @package _global_\nseed: 9\n")
    (own / "bad.yaml").write_text("# @package _global_\nsede: 9\n")
    assert call(tmp_path, "--config-dir", "my", "experiments=good").stdout.split() == ["False", "9"]
    bad = call(tmp_path, "--config-dir", "my", "experiments=bad")
    assert bad.returncode == 2 and "no setting called `sede`; did you mean `seed`?" in bad.stderr
    near = call(tmp_path, "--config-dir", "my", "experiments=god")
    assert "did you mean experiments=good?" in near.stderr


def test_run_folder_depends_on_what_changes_results():
    def folder(*overrides, seed=1):
        return command.run_folder("runs", "study/arm", overrides, seed).as_posix()

    other = ("trainer.accelerator=gpu", "+trainer.profiler=simple", "every.log=3", "data.workers=2")
    plain = folder("experiments=study/arm", *other)
    assert plain == "runs/study/arm/seed1" == folder("logger=wandb", "resume=null", "data.micro_batch=2")
    assert folder("seed=4", seed=4) == "runs/study/arm/seed4"
    assert folder("training.lr=1", "model.width=2") == folder("model.width=2", "training.lr=1")
    assert folder("model.width=2") == "runs/study/arm--model.width-2/seed1"
    assert folder("init_from=a/b") != folder("init_from=a_b")
    assert folder("model.width=2", "+text.heads=4") != folder("model.width=2+text.heads-4")
    assert not set("=,") & set(folder("model.width=2", "training.betas=[0.9,0.99]", "training.lr=1e-3"))
    many = [folder(f"model.{'x' * 150}={i}") for i in range(3)]
    assert len(set(many)) == 3 and all(len(m) < 150 for m in many)


def test_constructor_arguments_are_checked():
    good = {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 2}
    command.check_targets(OmegaConf.create({"a": good}))
    with pytest.raises(
        ValueError, match=r"a\.b: torch\.nn\.Linear takes no `out_featurs`; did you mean `out_features`"
    ):
        command.check_targets(OmegaConf.create({"a": {"b": good | {"out_featurs": 3}}}))


def test_a_key_that_other_presets_have_is_not_what_was_meant():
    assert command.suggestion("training.warmup_samples", ["training.warmup_samples", "seed"]) == "; --help lists all"

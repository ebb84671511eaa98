"""vgr-train on a really tiny problem: the loss falls, the camera matters, mistakes are one clear line."""

import json
import shutil
import sys

import pytest
import torch
from small_training import CODEC, make_project, metrics, train, write_shards

from vgr.training import checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("train"))
    more = ("logger=wandb", "wandb.mode=offline", "profile=true")
    done = train(folder, "training.max_samples=480", "every.sample=240", *more)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, folder / "runs/mini--training.max_samples-480/seed1", done


def test_the_loss_falls_and_the_camera_is_followed(trained):
    _, run, done = trained
    losses = [line["train/loss"] for line in metrics(run) if "train/loss" in line]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    result = json.loads((run / "validation.json").read_text())
    summary = result["summary"]
    assert summary["val/clips"] == len(result["clips"]) == 8
    assert summary["val/camera_gain_low"] > 0
    gains = [sum(c["loss_shuffled_camera"]) / 5 - sum(c["loss"]) / 5 for c in result["clips"]]
    assert summary["val/camera_gain"] == pytest.approx(sum(gains) / 8)
    half = 1.96 * float(torch.tensor(gains, dtype=torch.float64).std()) / 8**0.5
    assert summary["val/camera_gain_high"] - summary["val/camera_gain"] == pytest.approx(half)
    assert "480/480 samples" in done.stderr and str(run.relative_to(run.parents[2])) in done.stdout


def test_the_run_folder_is_complete(trained):
    _, run, _ = trained
    checkpoint = checkpoints.latest(run / "checkpoints")
    checkpoints.verify(checkpoint)
    record = checkpoints.read_generator(checkpoint)
    assert record["max_frames"] == 17 and record["size_hw"] == [32, 32] and record["fps"] == 8.0
    state = checkpoints.read_state(checkpoint)
    assert state["samples_seen"] == 480 and state["step"] == 60
    assert (run / "config.yaml").is_file() and (run / "wandb_id").is_file()
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["00000240.mp4", "00000480.mp4"]
    lines = metrics(run)
    assert [x["samples_seen"] for x in lines if "train/loss" in x] == list(range(8, 481, 8))
    assert {"val/loss", "val/loss_t0.2", "val/loss_shuffled_camera", "val/camera_gain"} <= set(lines[-1])
    raw = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in (x for x in raw if "train/loss" in x):
        assert line["perf/tokens_per_s"] == pytest.approx(5 * 4 * 4 * line["perf/samples_per_s"])
        assert line["perf/frames_per_s"] == pytest.approx(17 * line["perf/samples_per_s"])
        assert 0 <= line["perf/data_wait"] <= 1 and line["perf/pause_s"] >= 0 and "perf/mfu" not in line
    paused = {x["samples_seen"] for x in raw if x.get("perf/pause_s", 0) > 0}
    assert {32, 56, 88} <= paused and 16 not in paused  # the intervals behind a save at 24, 48 and 80


def test_where_the_run_is_and_what_ran_is_told(trained):
    _, run, done = trained
    told = [line for line in done.stdout.splitlines() if line.startswith("W&B offline: ")]
    assert len(told) == 2 and told[0] == told[1] and "wandb sync runs/" in told[0]
    (start,) = json.loads((run / "code.json").read_text())
    assert start["versions"].keys() >= {"vgr", "torch", "wandb"} and start["command"].startswith("vgr-train")
    assert sorted(p.name for p in (run / "profile").iterdir()) == ["rank0.json.gz", "rank0.txt"]
    assert f"{run.relative_to(run.parents[2])}/profile" in done.stderr


def test_the_average_differs_from_the_weights_and_is_what_validation_sees(trained):
    _, run, _ = trained
    checkpoint = checkpoints.latest(run / "checkpoints")
    ema, weights = checkpoints.read_weights(checkpoint, "ema"), checkpoints.read_weights(checkpoint, "weights")
    assert ema.keys() == weights.keys() and {k.split(".")[0] for k in ema} == {"model", "text"}
    assert not torch.equal(ema["model.final_linear.weight"], weights["model.final_linear.weight"])


def test_run_again_it_says_where_things_are(trained):
    folder, run, _ = trained
    before = (run / "metrics.jsonl").read_text()
    done = train(folder, "training.max_samples=480", "every.sample=240")
    assert done.returncode == 0 and "validation.json" in done.stdout
    assert (run / "metrics.jsonl").read_text() == before


def test_weights_only_from_another_run(trained):
    folder, run, _ = trained
    done = train(folder, "training.max_samples=8", f"init_from={run.relative_to(folder)}")
    assert done.returncode == 0, done.stderr[-2000:]
    first = next(p for p in (folder / "runs").iterdir() if "init_from" in p.name) / "seed1"
    assert metrics(first)[0]["train/loss"] < 0.5 * metrics(run)[0]["train/loss"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["training.max_samples=480", "training.lr=1", "runs=copy"], "training.lr (was 0.003, is 1)"),
        (["codec.luma=[3]", "model.in_channels=9"], "codec"),
        (["data.train=nowhere"], "vgr-prepare"),
        (["model.in_channels=12"], "model.in_channels=12"),
        (["data.micro_batch=3"], "data.micro_batch=3"),
        (["+model.widht=8"], "did you mean `width`"),
        (["resume=nowhere"], "nowhere"),
        (["training.schedule=linear"], "training.schedule=linear"),
        (["trainer.accelerator=gpu"], "finds no GPU: use cpu"),
        (["trainer.devices=auto"], "trainer.devices=auto"),
        (["trainer.precision=16-mixed"], "choose auto, bf16-mixed or 32-true"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(trained, arguments, message, monkeypatch):
    folder, run, _ = trained
    if "runs=copy" in arguments:  # the same folder with another learning rate, as after an edit of the preset
        target = folder / "copy/mini--training.lr-1+training.max_samples-480/seed1"
        shutil.copytree(run, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("wandb"))  # its logs still move
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = train(folder, *arguments)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert sorted(folder.rglob("*")) == before


def test_a_poisoned_sample_stops_the_run_by_name(tmp_path):
    folder = make_project(tmp_path, poison={17})
    done = train(folder, "every.save=8")
    assert done.returncode == 3
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vgr-train: error: training stopped at step") and "train17" in last and "latents" in last
    good = checkpoints.latest(folder / "runs/mini/seed1/checkpoints")
    if good is not None:
        checkpoints.verify(good)
        assert good.name in last
        assert all(v.isfinite().all() for v in checkpoints.read_weights(good, "weights").values())


def test_a_wide_gradient_names_its_parameter():
    """A loss that is finite with a gradient that is not, and a module that makes the first NaN."""
    from types import SimpleNamespace

    from vgr.diffusion.objectives import flow_matching
    from vgr.models.codec import CosineCodec
    from vgr.training.world_model import WorldModelTraining

    module = WorldModelTraining(
        torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), CosineCodec(), seed=1, global_batch=4, max_samples=8,
        objective=flow_matching,
    )
    for p in (*module.model.parameters(), *module.text.parameters()):
        p.grad = torch.zeros_like(p)
    module.text.bias.grad[0] = float("inf")
    batch = SimpleNamespace(keys=("a", "b"))
    module._pending = [(batch, torch.zeros(2))]
    with pytest.raises(FloatingPointError, match=r"step 1 .*samples a, b; .* gradient of text\.bias \(1 parameters\)"):
        module.configure_gradient_clipping(None)


def test_without_wandb_the_line_says_so(trained, monkeypatch):
    folder, _, _ = trained
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = train(folder, "training.max_samples=16", "logger=wandb")
    assert done.returncode == 2 and "logger=wandb needs the wandb package" in done.stderr
    assert train(folder, "training.max_samples=16").returncode == 0


def test_a_protocol_is_measured_between_steps_and_changes_nothing(tmp_path):
    from vgr.data.video import encode_video
    from vgr.models.codec import CosineCodec

    folder, codec = make_project(tmp_path), CosineCodec(**CODEC)
    shutil.rmtree(folder / "shards" / "val")
    kept = {"video": lambda latents: encode_video(codec_frames(codec, latents), 8.0)}
    write_shards(folder / "shards", "val", 8, codec.fingerprint, **kept)
    protocol = {"name": "between", "clips": 3, "reference": 4, "frames": 17, "seed": 0, "sampling": {"steps": 1},
                "drift": {"window_s": 0.5}, "frechet": {"window_frames": 9, "draws": 4},
                "frame_rate": {"warmup": 0, "requests": 1}}  # fmt: skip
    (folder / "between.json").write_text(json.dumps(protocol))
    words = ["training.max_samples=24", "every.bench=16", "bench=between.json"]
    plain, told = train(folder, words[0]), train(folder, *words, "runs=measured")
    assert plain.returncode == told.returncode == 0, told.stderr[-2000:]
    run = folder / "measured/mini--training.max_samples-24/seed1"
    assert sorted(p.name for p in (run / "bench").iterdir()) == ["00000016", "00000024"]
    found = json.loads((run / "bench" / "00000024" / "results.json").read_text())
    lines = [line for line in metrics(run) if "bench/psnr_db" in line]
    assert [line["samples_seen"] for line in lines] == [16, 24]
    assert lines[1]["bench/psnr_db"] == found["rows"]["model"]["metrics"]["psnr_db"]["value"]
    assert (run / "bench" / "00000016" / "report.html").is_file()
    ours, theirs = (
        checkpoints.read_weights(checkpoints.latest(folder / runs / run.parent.name / "seed1/checkpoints"), "weights")
        for runs in ("runs", "measured")
    )
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    refused = train(folder, "training.max_samples=24", "every.bench=16", "bench=none", "runs=other")
    assert refused.returncode == 2 and "protocol=none does not exist" in refused.stderr


def codec_frames(codec, latents):
    video = codec.decode(torch.from_numpy(latents).float()[None])[0].clamp(-1, 1)
    return ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()

"""Speeds a run tells of: counts are exact, what is no training is told apart, a trace changes nothing."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vgr.metrics.frame_rate import known_peak
from vgr.models.causal_video import CausalVideo
from vgr.models.world_model import WorldModel
from vgr.training import throughput
from vgr.training.throughput import Throughput, trace


def batch(clips, frames, size, raw):
    cameras = SimpleNamespace(c2w=torch.zeros(clips, raw, 4, 4))
    return SimpleNamespace(latents=torch.zeros(clips, 3, frames, *size), cameras=cameras)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to."""
    now = [100.0]
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def module(patch):
    return SimpleNamespace(model=SimpleNamespace(patch=patch))


def fetch(pace, clock, seconds):
    pace.start("[_TrainingEpochLoop].train_dataloader_next")
    clock(seconds)
    pace.stop("[_TrainingEpochLoop].train_dataloader_next")


def test_speeds_are_counts_by_training_time(clock):
    """Two steps of two micro-batches of two clips on each of four ranks: 32 clips in 4 s, one of them waiting."""
    pace = Throughput()
    for _ in range(4):
        fetch(pace, clock, 0.25)
        pace.start("optimizer_step")  # Lightning names much else
        pace.count(module(2), batch(2, 5, (6, 8), 17))
        clock(0.75)
        pace.stop("optimizer_step")
    with pace.pause():
        clock(6.0)
    told = pace.told(32, torch.device("cpu"), 4)
    assert told == pytest.approx({
        "perf/samples_per_s": 8.0, "perf/tokens_per_s": 8 * 5 * 3 * 4, "perf/frames_per_s": 8 * 17,
        "perf/pause_s": 6.0, "perf/data_wait": 0.25,
    })  # fmt: skip
    fetch(pace, clock, 1.0)
    pace.count(module(1), batch(2, 5, (6, 8), 17))
    clock(1.0)
    later = pace.told(8, torch.device("cpu"), 4)  # the interval before is forgotten
    assert later["perf/pause_s"] == 0 and later["perf/samples_per_s"] == 4 and later["perf/data_wait"] == 0.5
    assert later["perf/tokens_per_s"] == 4 * 5 * 48


def test_another_profiler_leaves_the_wait_unknown(clock):
    pace = Throughput()
    pace.count(module(1), batch(1, 1, (1, 1), 1))
    clock(1.0)
    assert "perf/data_wait" not in pace.told(1, torch.device("cpu"), 1)


def test_mfu_is_told_where_device_and_clips_are_known(clock, monkeypatch):
    """Two clips of 30 TFLOP each a second on each of two devices: 60 of 989."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(throughput, "step_flops", lambda module, batch: 30e12 * len(batch.latents))
    pace, known = Throughput(), batch(4, 5, (6, 8), 17)
    pace.know(module(1), [known, known])
    for clips, wanted in ((known, 60 / 989), (batch(2, 9, (6, 8), 33), None)):
        pace.count(module(1), SimpleNamespace(latents=clips.latents[:2], cameras=clips.cameras))
        clock(1.0)
        told = pace.told(4, torch.device("cuda"), 2)
        assert told.get("perf/mfu") == (wanted and pytest.approx(wanted))
    monkeypatch.setattr(throughput, "step_flops", lambda module, batch: 1 / 0)
    Throughput().know(module(1), [known])  # what tells of a run does not stop it
    assert known_peak("NVIDIA H100 80GB HBM3") == 989e12 and known_peak("NVIDIA H100 PCIe") == 756e12
    assert known_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert known_peak("NVIDIA H200 MIG 1g.18gb") is known_peak("a CPU") is None


def test_models_tell_their_patch():
    from vgr.models.helios import Helios
    from vgr.models.refiner import Refiner

    assert (WorldModel.patch, CausalVideo.patch, Helios.patch, Refiner.patch) == (1, 2, 2, 1)


def test_a_trace_is_written_after_three_steps_and_changes_nothing(tmp_path):
    def train(profiler):
        torch.manual_seed(0)
        net = nn.Linear(8, 8)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(8):
            optimizer.zero_grad()
            (net(torch.randn(4, 8)) ** 2).mean().backward()
            optimizer.step()
            if profiler is not None:
                profiler.step()
        return net.weight.detach()

    plain, said = train(None), []
    with trace(tmp_path / "profile", 3, said.append) as profiler:
        traced = train(profiler)
    assert torch.equal(plain, traced) and len(said) == 1 and str(tmp_path / "profile") in said[0]
    found = json.loads(gzip.decompress((tmp_path / "profile" / "rank3.json.gz").read_bytes()))
    steps = {e["name"] for e in found["traceEvents"] if e["name"].startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"}
    assert "aten::" in (tmp_path / "profile" / "rank3.txt").read_text()

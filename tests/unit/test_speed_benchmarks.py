"""Benchmarks at sizes that run in seconds on a CPU: what they compare agrees and is told; never how long it takes."""

import argparse
import importlib.util

import numpy as np
import pytest

from benchmarks.speed import metric_cases, warp_overhead
from benchmarks.speed.metrics import compare, long_video
from benchmarks.speed.training_step import measure
from benchmarks.speed.warp import judge as judge_warp
from benchmarks.speed.warp import measure as measure_warp
from vgr import command

SETTINGS = {"device": "cpu", "scan": "torch", "attention": "torch", "compile": False, "repeats": 1}


@pytest.mark.parametrize("size,frames,tokens", [("tiny", 9, 2 * 48), ("causal_tiny", 13, 2 * 7 * 16)])
def test_a_training_step_is_timed(size, frames, tokens):
    row = measure(argparse.Namespace(size=size, **SETTINGS), frames, peak=1e12)
    assert row["tokens"] == tokens and row["mfu"] == pytest.approx(row["tflop"] / row["step_s"])
    # Each token meets most weights once forward, twice backward: products of two, so about 6 a weight.
    assert 2 < row["tflop"] * 1e12 / (tokens * row["parameters"]) < 12


SMALL = {
    "frechet": lambda: metric_cases.frechet(((60, 12), (20, 30))),
    "kernel": lambda: metric_cases.kernel(60, 12, subsets=2, size=40),
    "ssim": lambda: metric_cases.image("ssim", ((40, 52),), frames=2),
    "psnr": lambda: metric_cases.image("psnr", ((40, 52),), frames=2),
    "trajectory": lambda: metric_cases.trajectory(40),
    "theil_sen": lambda: metric_cases.theil_sen((12,)),
}
OPTIONAL = {"evo": "evo", "scikit-image": "skimage"}


@pytest.mark.parametrize("name", metric_cases.CASES)
def test_a_metric_and_its_peers_agree_before_they_are_timed(name, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.speed.metrics.TURN_S", 0.0)
    rows = [compare(case, 1) for case in SMALL[name]()]
    assert rows and {row["case"] for row in rows} == {name}
    told = capsys.readouterr().out.splitlines()
    assert len(told) == len(rows)
    for row, line in zip(rows, told):
        module = OPTIONAL.get(row["peer"].split()[0])
        if module and importlib.util.find_spec(module) is None:
            assert row["unavailable"] and "not installed" in row["peer"] and "ratio_median" not in row
            continue
        assert row["agree"] and row["apart"] <= row["tolerance"] and row["pairs"] == 1
        assert row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]
        assert row["never_slower"] == (row["ratio_median"] >= 1)
        assert row["peer"] in line and line.endswith(("never slower: met", "never slower: missed"))


@pytest.mark.parametrize("theirs", [1.002, np.nan])
def test_values_that_differ_get_no_ratio(theirs, capsys):
    case = metric_cases.Case("ssim", "x", "y", *map(metric_cases.here, (lambda: [1, 1], lambda: [1, theirs])), 1e-3)
    row = compare(case, 1)
    assert not row["agree"] and "ratio_median" not in row and "no ratio" in capsys.readouterr().out


def test_a_long_video_passes_through_and_its_memory_is_told():
    found = long_video(0.1, (24, 32))
    assert found["frames"] == 96 and found["at_tenth_mb"] > 0 and found["at_end_mb"] <= found["most_mb"] + 1
    assert found["ratio"] == pytest.approx(found["at_end_mb"] / found["at_tenth_mb"])


def test_warps_are_timed_in_turn_and_told_how_right_they_are(capsys):
    rows = measure_warp((48, 80), frames=2, repeats=2, device="cpu")
    told = capsys.readouterr().out.splitlines()
    assert [row["side"] for row in rows][:3] == ["ours", "point splat", "published 4x4 mesh"]
    assert len(told) == len(rows) and all(row["side"] in line for row, line in zip(rows, told))
    for row in rows:
        assert row["pairs"] == 2 and 0 < row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]
        assert row["frames_per_s"] == pytest.approx(2 / row["s"])
    assert rows[0]["ratio_min"] == rows[0]["ratio_max"] == 1
    ours, points, published = (row["visibility_right_percent"] for row in rows[:3])
    assert ours > 97 and ours > points and ours > published
    assert rows[0]["psnr_db"] > max(row["psnr_db"] for row in rows[1:3])


def test_rooms_in_which_a_warp_is_wrong_are_named(capsys):
    """Rising over the box top of room 0 is what no single frame knows how to draw; turning is right everywhere."""
    rows = {row["move"]: row for row in judge_warp((192, 320), 1)}
    told = capsys.readouterr().out.splitlines()
    assert len(rows) == len(told) == 8
    assert rows["pedestal +1"]["visibility_right_percent"][0] < 99 < rows["pan"]["visibility_right_percent"][0]
    assert [line.split("  ")[0].strip() for line in told if "below 99 % in rooms [0]" in line][0].startswith("pedestal")


def small_vae(device):
    """Wan's VAE for a test, in clips."""
    import tempfile

    from diffusers import AutoencoderKLWan

    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(folder)
        return warp_overhead.WanCodec(folder, device=device, clip=9)


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_what_evidence_costs_a_chunk_is_told_in_turn(size, monkeypatch, capsys):
    """Beside the first stage's target and history stand as many tokens as are kept, and the other arms have none."""
    monkeypatch.setattr(warp_overhead, "random_vae", small_vae)
    small = ["model.heads=2", "model.head_dim=12", "model.layers=2", "model.text_width=16", "model.dtype=float32",
             "model.options={ffn_dim: 32, rope_dim: [4, 4, 4]}", "sampling.steps=1",
             "data.source.size_hw=[64,64]"]  # fmt: skip
    cfg = command.compose("train", [f"experiments={warp_overhead.PRESETS[size]}", *small])
    rows = {row["arm"]: row for row in warp_overhead.measure(cfg, "cpu", "known", 1)}
    told = capsys.readouterr().out.splitlines()
    assert list(rows) == list(warp_overhead.ARMS) and len(told) == 3
    plain, *shown = rows.values()
    assert plain["evidence_bytes"] == plain["warp_s"] == plain["encode_s"] == 0 and plain["kept"] is None
    frames, grid = {"tiny": 4, "full": 9}[size], 4 * 4
    for row in shown:
        evidence = round(row["kept"] * frames * grid)
        empty = {"tiny": 2, "full": 0}[size]  # slots without a frame: zeros, or left out beside evidence
        assert row["tokens"] == plain["tokens"] + evidence - empty
        assert row["evidence_bytes"] == 4 * 16 * frames * 4 * grid
        assert row["warp_s"] > 0 and row["encode_s"] > 0  # it was done; how long a machine takes is not tested
        assert row["ratio_median"] == pytest.approx(row["total_s"] / plain["total_s"])
        assert row["total_s"] == pytest.approx(sum(row[stage] for stage in warp_overhead.STAGES), rel=1e-3)


def test_loaders_give_the_same_clips_and_only_ours_keeps_its_order(tmp_path):
    pytest.importorskip("webdataset")
    from benchmarks.speed import loading

    found = loading.measure(loading.Case((4, 3, 6, 8), 9, (48, 64), 160, 1), tmp_path, 1)
    assert found["clips_compared"] == 160 and found["bytes_a_clip"] == 4 * 3 * 6 * 8 * 2
    assert found["same_order_by_workers"] == {"ours": True, "webdataset": False}
    for name in ("samples_per_s", "processor_ms"):
        assert all(x["least"] <= x["median"] <= x["most"] and x["least"] > 0 for x in found[name].values())
        ours, theirs = (found[name][side]["median"] for side in ("ours", "webdataset"))
        better = ours / theirs if name == "samples_per_s" else theirs / ours
        assert found[f"ours_{name}_times_as_good_as_webdataset"]["median"] == pytest.approx(better)

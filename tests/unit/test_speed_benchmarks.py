"""The timing of a training step, at the sizes that run on a CPU: both models, the causal one packed."""

import argparse

import pytest

from benchmarks.speed.training_step import measure

SETTINGS = {"device": "cpu", "scan": "torch", "attention": "torch", "compile": False, "repeats": 1}


@pytest.mark.parametrize("size,frames,tokens", [("tiny", 9, 2 * 48), ("causal_tiny", 13, 2 * 7 * 16)])
def test_a_training_step_is_timed(size, frames, tokens):
    row = measure(argparse.Namespace(size=size, **SETTINGS), frames, peak=1e12)
    assert row["tokens"] == tokens and row["mfu"] == pytest.approx(row["tflop"] / row["step_s"])
    # Each token meets most weights once forward, twice backward: products of two, so about 6 a weight.
    assert 2 < row["tflop"] * 1e12 / (tokens * row["parameters"]) < 12

"""Noise levels against published numbers, the reference scheduler, path counts and brute force."""

import itertools
import math
from collections import Counter

import pytest
import torch

from vgr.diffusion import timesteps
from vgr.types import Layout


def test_sigma_grid_is_the_published_one():
    grid = timesteps.sigma_grid(60, 9.8)
    expected = {0: 1.0, 1: 0.99826, 2: 0.99647, 57: 0.3072, 58: 0.2106, 59: 0.0877, 60: 0.0}
    for i, value in expected.items():
        assert abs(float(grid[i]) - value) < 6e-5, i
    assert int(1000 * grid[59]) == 87
    assert abs(float(timesteps.sigma_grid(10, 8.0)[-2]) - 0.0602) < 5e-5


@pytest.mark.parametrize(("steps", "shift"), [(4, 5.0), (10, 8.0), (60, 9.8)])
def test_sigma_grid_equals_reference_scheduler(steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(timesteps.sigma_grid(steps, shift).float(), scheduler.sigmas, atol=1e-6, rtol=0)


def test_student_times_are_the_published_lists():
    streaming, distillation = timesteps.few_step_sigmas(4, 8.0), timesteps.few_step_sigmas(4, 10.0, 60)
    assert (1000 * streaming).tolist() == [1000, 960, 889, 727, 0]
    assert (1000 * distillation).tolist() == [1000, 967, 908, 764, 0]
    by_hand = [8 * u / (1 + 7 * u) for u in (1, 0.75, 0.5, 0.25, 0)]
    assert [round(1000 * s) for s in by_hand] == [1000, 960, 889, 727, 0]
    low = 10 * 0.001 / (1 + 9 * 0.001)
    quarters = [1 - (1 - low) * i / 59 for i in (0, 15, 30, 45)]
    assert [round(1000 * 10 * u / (1 + 9 * u)) for u in quarters] == [1000, 967, 908, 764]
    assert (1000 * timesteps.few_step_sigmas(4, 9.8)).tolist() == [1000, 967, 907, 766, 0]
    # What a model that truncates its fp32 times will see.
    assert torch.floor(1000.0 * streaming.float().double() + 1e-4).tolist() == [1000, 960, 889, 727, 0]


@pytest.mark.parametrize("given", [(0, 8.0), (4, 0.0), (4, 8.0, 2), (4, 8.0, 62)])
def test_student_times_refuse_what_is_no_grid(given):
    with pytest.raises(ValueError, match="multiple of steps"):
        timesteps.few_step_sigmas(*given)


WHOLE = Layout.whole(1, 4).chunk
CHUNKS = Layout.chunked(1, 11, 3).chunk  # frames in chunks of 4, 3 and 4


def _levels(kind, count=2000, clean_first=0.0, shift=1.0):
    """Levels (count, chunks) that the mixture's `kind` alone gives, read at the chunks' last frames."""
    times = timesteps.training_times(torch.arange(count), CHUNKS, 0, shift, clean_first, {kind: 1.0})
    assert times.shape == (count, 11) and times.dtype == torch.float32
    for a, b in ((1, 4), (4, 7), (7, 11)):
        assert (times[:, a:b] == times[:, a : a + 1]).all()
    return (1000 * times[:, [3, 6, 10]].double()).round().long()


def test_training_times_depend_on_seed_and_position_only():
    positions = torch.tensor([5, 900, 7])
    for chunk in (WHOLE, CHUNKS):
        times = timesteps.training_times(positions, chunk, seed=3, shift=2.0, clean_first=0.9)
        alone = timesteps.training_times(positions[1:2], chunk, seed=3, shift=2.0, clean_first=0.9)
        assert torch.equal(times[1:2], alone)
        assert not torch.equal(times, timesteps.training_times(positions, chunk, seed=4, shift=2.0, clean_first=0.9))


def test_training_times_of_one_chunk_have_the_stated_distribution():
    times = timesteps.training_times(torch.arange(4000), WHOLE[:2], seed=0, shift=1.0, clean_first=0.9)
    assert abs(float((times[:, 0] == 0).float().mean()) - 0.9) < 0.02
    logit = torch.logit(times[:, 1].double().clamp(1e-3, 1 - 1e-3))
    assert abs(float(logit.mean())) < 0.05 and abs(float(logit.std()) - 1.0) < 0.05
    levels = times[:, 1].double() * 1000
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    shifted = timesteps.training_times(torch.arange(4000), WHOLE[:2], seed=0, shift=9.95, clean_first=0.9)
    torch.testing.assert_close(shifted[:, 1], timesteps.shifted(times[:, 1].double(), 9.95).float())


def test_one_chunk_gives_the_times_of_the_bidirectional_model():
    """The numbers that runs before the mixture saw, shift 9.95, seed 3."""
    times = timesteps.training_times(torch.tensor([0, 1, 2]), WHOLE, 3, 9.95, 0.9)
    torch.testing.assert_close(times[:, 1], torch.tensor([0.9622061, 0.7615635, 0.9435844]), atol=1e-6, rtol=0)


def test_chunk_mixture_keeps_its_shares_and_its_order():
    times = timesteps.training_times(torch.arange(4000), CHUNKS, 0, 1.0, 0.9)
    assert abs(float((times[:, 0] == 0).double().mean()) - 0.9) < 0.02
    turned = dict(reversed(timesteps.MIXTURE.items()))
    assert torch.equal(timesteps.training_times(torch.arange(20), CHUNKS, 0, 1.0, 0.9, turned), times[:20])
    per_chunk = times[:, [3, 6, 10]]
    assert (per_chunk.diff(dim=1) >= 0).all()
    same = (per_chunk == per_chunk[:, :1]).all(1).double().mean()
    prefix = ((per_chunk[:, 0] == 0) & (per_chunk[:, 2] > 0)).double().mean()
    assert abs(float(same) - 0.1) < 0.02 and abs(float(prefix) - 0.1) < 0.02


def test_each_part_of_the_mixture_is_what_its_name_says():
    same, last, prefix, free = (_levels(k) for k in ("same", "last_anchor", "clean_prefix", "incremental"))
    assert (same == same[:, :1]).all()
    # The drawn level is the last chunk's: the logit-normal of the one-chunk model, median 1/2.
    for levels in (same[:, 0], last[:, 2], prefix[:, 2]):
        logit = torch.logit((levels.double() / 1000).clamp(1e-3, 1 - 1e-3))
        assert abs(float(logit.mean())) < 0.08 and abs(float(logit.std()) - 1.0) < 0.08
    # Below the last anchor L the sequences (x0 <= x1) in [0, L] are uniform: E x1 = (2 L + 2/2) / 3 to 1/L.
    ratio = last.double() / last[:, 2:].double().clamp_min(1)
    assert abs(float(ratio[:, 0].mean()) - 1 / 3) < 0.02 and abs(float(ratio[:, 1].mean()) - 2 / 3) < 0.02
    clean = (prefix == 0).sum(1)
    assert clean.min() == 1 and clean.max() == 2 and abs(float((clean == 1).double().mean()) - 0.5) < 0.05
    # A random anchor: a third of the samples have their drawn level in each chunk, so the middle one has median 1/2.
    assert abs(float((free[:, 1] < 500).double().mean()) - 0.5) < 0.04
    assert float((free[:, 2] < 500).double().mean()) < 0.3 < 0.7 < float((free[:, 0] < 500).double().mean())


@pytest.mark.parametrize(("chunks", "anchor", "level"), [(4, 1, 2), (4, 3, 3), (3, 0, 1), (1, 0, 2)])
def test_monotone_levels_are_uniform_over_brute_force(chunks, anchor, level):
    every = [
        s
        for s in itertools.product(range(5), repeat=chunks)
        if s[anchor] == level and all(a <= b for a, b in itertools.pairwise(s))
    ]
    g = torch.Generator().manual_seed(0)
    draws = 150 * len(every)
    seen = Counter(tuple(timesteps.monotone_levels(chunks, anchor, level, g, 5).tolist()) for _ in range(draws))
    assert set(seen) == set(every)
    chi2 = sum((n - 150) ** 2 / 150 for n in seen.values())
    freedom = len(every) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 1e-9  # four sigma


def test_monotone_levels_have_the_path_counts_marginals_at_full_size():
    """P(x_i = t | x_c = L) = paths to t in chunk i times paths from there on, over 1000 levels (spec 5.1)."""
    chunks, anchor, level, count = 40, 25, 700, 1500
    g = torch.Generator().manual_seed(1)
    drawn = torch.stack([timesteps.monotone_levels(chunks, anchor, level, g) for _ in range(count)])
    assert (drawn.diff(dim=1) >= 0).all() and drawn.min() >= 0 and drawn.max() <= 999
    assert (drawn[:, anchor] == level).all()

    def moments(i, length, values):
        paths = [
            math.comb(t + i, i) * math.comb(values - 1 - t + length - 1 - i, length - 1 - i) for t in range(values)
        ]
        total = sum(paths)
        assert total == math.comb(values + length - 1, length)
        mean = sum(t * n for t, n in enumerate(paths)) / total
        return mean, math.sqrt(sum(t * t * n for t, n in enumerate(paths)) / total - mean**2)

    for i in (0, 7, 24):
        mean, std = moments(i, anchor, level + 1)
        assert abs(float(drawn[:, i].double().mean()) - mean) < 4 * std / math.sqrt(count), i
    for i in (26, 33, 39):
        mean, std = moments(i - anchor - 1, chunks - 1 - anchor, 1000 - level)
        assert abs(float(drawn[:, i].double().mean()) - level - mean) < 4 * std / math.sqrt(count), i


@pytest.mark.parametrize("mixture", [{"same_t": 1.0}, {"same": -1.0, "incremental": 2.0}, {"same": 0.0}, {}])
def test_mixture_refuses_weights_that_mean_nothing(mixture):
    with pytest.raises(ValueError, match="same, incremental, last_anchor, clean_prefix"):
        timesteps.training_times(torch.arange(1), CHUNKS, 0, 1.0, 0.9, mixture)


def test_uniform_times_are_one_a_sample_or_one_a_chunk():
    chunk = torch.tensor([0, 0, 0, 2, 2, 3])
    shared, own = (timesteps.chunk_uniform(torch.arange(4000), chunk, 0, s) for s in (True, False))
    assert torch.equal(shared, shared[:, :1].expand(-1, 6)) and torch.equal(own[:, [0, 3]], own[:, [2, 4]])
    for u in (shared[:, 0], *own[:, [0, 3, 5]].T):
        assert float(u.min()) > 0 and float(u.max()) <= 1
        assert float((u.sort().values - torch.linspace(0, 1, 4000).double()).abs().max()) < 0.03  # 1.9 / sqrt(n)
    assert abs(float(torch.corrcoef(own[:, [0, 3]].T)[0, 1])) < 0.05
    assert torch.equal(timesteps.chunk_uniform(torch.tensor([7]), chunk, 0, False)[0], own[7])


def test_the_bump_is_the_references_table():
    """C:SF utils/scheduler.py: y = exp(-2 ((x - 500) / 1000)^2) over the shifted table, less its minimum, mean 1."""
    x = 1000 * timesteps.shifted(torch.arange(1, 1001, dtype=torch.float64) / 1000, 5.0)
    y = torch.exp(-2 * ((x - 500) / 1000) ** 2)
    y = (y - y.min()) * 1000 / (y - y.min()).sum()
    torch.testing.assert_close(timesteps.bump(x / 1000, 5.0), y, rtol=1e-12, atol=1e-12)
    assert float(timesteps.bump(torch.tensor(0.5), 5.0)) == pytest.approx(2.08, abs=0.005)
    assert float(timesteps.bump(torch.tensor(1.0), 5.0)) == 0

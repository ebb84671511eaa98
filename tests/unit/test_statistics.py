import numpy as np
import pytest
from scipy import stats

from vgr.metrics.statistics import by_unit, discoveries, mean_interval, paired


def test_mean_interval_of_a_large_sample_is_the_normal_one_and_repeats():
    values = np.random.default_rng(1).gamma(2.0, 3.0, 2000)
    ours = mean_interval(values, draws=2000)
    half = 1.96 * values.std(ddof=1) / np.sqrt(2000)
    assert ours.value == pytest.approx(values.mean(), rel=1e-14) and ours.count == 2000
    assert (ours.low, ours.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert ours == mean_interval(values, draws=2000)


def test_the_interval_is_scipys_bca():
    values = np.random.default_rng(7).gamma(0.5, 3.0, 25)
    expected = stats.bootstrap((values,), np.mean, n_resamples=999, method="BCa", rng=np.random.default_rng(0))
    assert tuple(mean_interval(values, draws=999)[1:3]) == tuple(expected.confidence_interval)


def test_the_interval_of_paired_differences_is_narrower_than_two_intervals():
    rng = np.random.default_rng(2)
    level = rng.normal(0, 10, 50)
    a, b = level + 1 + rng.normal(0, 0.3, 50), level + rng.normal(0, 0.3, 50)
    difference, apart = mean_interval(a - b), mean_interval(a)
    assert 0.8 < difference.low < 1 < difference.high < 1.2
    assert apart.high - apart.low > 10 * (difference.high - difference.low)
    assert paired(a, b)[0] == difference


def test_mean_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        interval = mean_interval(rng.normal(2.0, 1.0, 30), draws=400)
        hits += interval.low <= 2.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_mean_interval_edges():
    assert mean_interval([3.0, 3.0, 3.0]) == (3.0, 3.0, 3.0, 3, 0, 3.0)
    one = mean_interval([1.5, np.nan])
    assert one.value == 1.5 and (one.count, one.failed) == (1, 1) and np.isnan(one.low) and np.isnan(one.high)
    assert mean_interval([np.nan]).count == 0


def test_the_unit_is_the_prompt_and_its_seeds_are_averaged_first():
    values, units = [1.0, 3.0, 10.0, np.nan, 6.0, np.nan], ["a", "a", "b", "b", "c", "d"]
    assert by_unit(values, units)[:3].tolist() == [2.0, 10.0, 6.0]
    found = mean_interval(values, units=units)
    assert (found.value, found.count, found.failed) == (6.0, 3, 1)
    # Ten seeds of each prompt are no more evidence than one: the interval is that of the prompts' means.
    rng = np.random.default_rng(3)
    prompts = rng.normal(size=20)
    seeds = np.repeat(prompts, 10) + rng.normal(0, 1e-9, 200)
    many, few = mean_interval(seeds, units=np.repeat(np.arange(20), 10).tolist()), mean_interval(prompts)
    assert (many.low, many.high) == pytest.approx((few.low, few.high), abs=1e-6)
    assert mean_interval(seeds).high - mean_interval(seeds).low < 0.5 * (few.high - few.low)
    with pytest.raises(ValueError, match="3 values and 2 units"):
        by_unit([1, 2, 3], ["a", "b"])


def test_failures_are_counted_and_can_be_imputed():
    found = mean_interval([2.0, 4.0, np.nan, np.inf], impute=90.0)
    assert (found.value, found.count, found.failed, found.imputed) == (3.0, 2, 2, 46.5)
    assert np.isnan(mean_interval([2.0, np.nan]).imputed)
    assert paired([1.0, 2.0, np.nan], [0.0, np.nan, 0.0])[0][3:5] == (1, 2)


def test_paired_p_is_the_exact_sign_flip_test_and_its_effect_the_rank_biserial():
    d = np.array([0.3, 1.2, -0.4, 2.0, 0.9, 1.1])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    means = np.abs((signs * d[:, None]).mean(0))
    _, p, effect = paired(d, np.zeros(6))
    assert p == pytest.approx((means >= abs(d.mean()) - 1e-12).mean())
    plus, minus = 20 - 1, 2  # ranks of |d|: 1 2 ... with -0.4 second; sum 21
    assert effect == pytest.approx((plus - minus) / 21)
    assert paired(np.ones(4), np.zeros(4))[2] == 1 and paired(np.ones(4), np.ones(4))[1:] == (1, 0)
    assert np.isnan(paired([1.0], [0.0])[1:]).all()


def test_paired_p_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(4)
    p = [paired(rng.normal(size=12), rng.normal(size=12), draws=499)[1] for _ in range(150)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_discoveries_are_benjamini_and_hochbergs():
    # Their example of 1995, fifteen tests of which four stand: the fourth by 0.0095 <= 4 / 15 * 0.05.
    p = [1e-4, 4e-4, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.324, 0.4262, 0.5719, 0.6528, 0.759, 1]
    assert discoveries(p).tolist() == [True] * 4 + [False] * 11
    assert discoveries([0.04, np.nan, 0.045]).tolist() == [True, False, True]
    assert not discoveries([np.nan]).any() and discoveries([]).size == 0
    rng, false, found = np.random.default_rng(5), 0, 0
    for _ in range(300):
        p = np.concatenate([rng.uniform(size=40), rng.uniform(size=10) * 1e-4])
        stands = discoveries(p)
        false, found = false + stands[:40].sum(), found + max(stands.sum(), 1)
    assert false / found <= 0.05

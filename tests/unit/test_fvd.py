import numpy as np
import pytest
import scipy.linalg

from benchmarks.few_steps import frechet_gain
from vgr.metrics.features import SIZE, clip_features, windows
from vgr.metrics.fvd import (
    Moments,
    frechet_between,
    frechet_distance,
    frechet_interval,
    kernel_distance,
    null_bias,
)


def golden():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2048, 400)).astype(np.float32)
    return x, (rng.normal(size=(2048, 400)) * 1.1 + 0.05).astype(np.float32)


def test_golden_values_of_torchmetrics_and_cdfvd():
    x, y = golden()
    assert frechet_distance(x, y) == pytest.approx(48.0720467, rel=2e-8)
    assert frechet_distance(x, y, ddof=0) == pytest.approx(48.0492425, rel=2e-8)


@pytest.mark.parametrize(("n", "m", "d"), [(100, 60, 12), (500, 400, 40)])
def test_equals_the_matrix_square_root(n, m, d):
    rng = np.random.default_rng(n)
    mix = rng.normal(size=(d, d))
    x, y = rng.normal(size=(n, d)) @ mix, rng.normal(size=(m, d)) + 0.3
    a, b = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(a @ b)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * np.real(root))
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)


def test_fewer_rows_than_features():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(16, 100)), rng.normal(size=(20, 100)) + 0.2
    xc, yc = x - x.mean(0), y - y.mean(0)
    # tr (Sx^1/2 Sy Sx^1/2)^1/2 is the nuclear norm of the cross product of the centred rows.
    cross = np.linalg.svd(xc @ yc.T, compute_uv=False).sum() / np.sqrt(15 * 19)
    mean = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = mean + (xc**2).sum() / 15 + (yc**2).sum() / 19 - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)


def test_analytic_gaussians_and_invariances():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(300, 6))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T  # exactly N(0, I) moments
    shift, s = np.arange(6) / 10, 1.7
    assert frechet_distance(x, s * x + shift) == pytest.approx(6 * (1 - s) ** 2 + (shift**2).sum(), rel=1e-9)
    y = rng.normal(size=(200, 6)) * 1.4
    base = frechet_distance(x, y)
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert frechet_distance(x @ q, y @ q) == pytest.approx(base, rel=1e-9)
    assert frechet_distance(x + 3, y + 3) == pytest.approx(base, rel=1e-9)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * base, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(base, rel=1e-9)
    assert frechet_distance(x, x) < 1e-6


@pytest.mark.parametrize("spectrum", ["isotropic", "1/k"])
def test_null_bias_law(spectrum):
    d, n = 40, 400
    eig = np.ones(d) if spectrum == "isotropic" else 1 / np.arange(1, d + 1)
    rng = np.random.default_rng(6)
    draws = [rng.normal(size=(3 * n, d)) * np.sqrt(eig) for _ in range(60)]
    simulated = np.mean([frechet_distance(x[:n], x[n:]) for x in draws])
    assert null_bias(np.diag(eig), n, 2 * n) == pytest.approx(simulated, rel=0.05)


def test_interval_covers_repeated_draws():
    rng = np.random.default_rng(8)
    truth = rng.normal(size=(64, 5))
    values, spreads = [], []
    for _ in range(40):
        x = rng.normal(size=(64, 5)) + 0.8
        interval = frechet_interval(x, truth, np.arange(64), np.arange(64), draws=40)
        assert interval.low <= interval.value <= interval.high and interval.count == 64
        values.append(interval.value)
        spreads.append((interval.high - interval.low) / 3.92)
    # the sub-samples also vary the other side, so they may be wider than draws against one fixed set
    assert 0.7 < np.mean(spreads) / np.std(values) < 2.2
    assert np.isnan(frechet_interval(truth[:3], truth, np.arange(3), np.arange(64)).low)


def test_paired_gain_is_around_zero_for_equal_sets_and_finds_the_better_one():
    truth, rng = np.random.default_rng(9).normal(size=(64, 2, 5)), np.random.default_rng(10)
    near, far = truth + 0.3 * rng.normal(size=truth.shape), truth + 0.5 + 0.3 * rng.normal(size=truth.shape)
    assert frechet_gain(near, near, truth)[:4] == (0.0, 0.0, 0.0, 64)
    better, worse = frechet_gain(near, far, truth), frechet_gain(far, near, truth)
    assert better.low > 0 and (worse.value, worse.high) == pytest.approx((-better.value, -better.low))
    assert better.value == frechet_distance(far.reshape(-1, 5), truth.reshape(-1, 5)) - frechet_distance(
        near.reshape(-1, 5), truth.reshape(-1, 5)
    )
    # pairing is worth something: the same sets with the videos of one in another order
    shuffled = frechet_gain(near, far[rng.permutation(64)], truth)
    assert shuffled.value == pytest.approx(better.value)
    with pytest.raises(ValueError, match="three equal"):
        frechet_gain(near, far[:, :1], truth)


def test_paired_gain_of_two_sets_as_good_covers_zero_and_no_more_than_that():
    rng, gains = np.random.default_rng(11), []
    for _ in range(40):
        truth = rng.normal(size=(48, 1, 5))
        a, b = (truth + 0.5 + 0.7 * rng.normal(size=truth.shape) for _ in "ab")
        gains.append(frechet_gain(a, b, truth, draws=40))
    assert sum(gain.low <= 0 <= gain.high for gain in gains) >= 35
    spread = np.mean([gain.high - gain.low for gain in gains]) / 3.92
    assert 0.7 < spread / np.std([gain.value for gain in gains]) < 1.6


def test_refusals():
    x = np.zeros((4, 3))
    with pytest.raises(ValueError, match="feature sizes differ"):
        frechet_distance(x, np.zeros((4, 2)))
    with pytest.raises(ValueError, match="NaN"):
        Moments.of(np.full((4, 3), np.nan))
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(np.zeros((1, 3)), x)


def texture_clip(seed, speed=1.5, frames=16):
    rng = np.random.default_rng(seed)
    import cv2

    image = cv2.GaussianBlur(rng.uniform(0, 255, (48, 128, 3)).astype(np.float32), (0, 0), 2.0)
    image = (image - image.mean()) * 4 + 110 + rng.normal(0, 20, 3)
    shift = [np.float32([[1, 0, -speed * f], [0, 1, 0]]) for f in range(frames)]
    moved = [cv2.warpAffine(image, m, (128, 48), borderMode=cv2.BORDER_WRAP)[:, 20:84] for m in shift]
    return np.stack(moved).clip(0, 255).astype(np.uint8)


def test_clip_features_are_finite_named_and_size_free():
    import cv2

    clip = texture_clip(0)
    f = clip_features(clip)
    assert f.shape == (SIZE,) and np.isfinite(f).all()
    large = np.stack([cv2.resize(x, (256, 192), interpolation=cv2.INTER_NEAREST) for x in clip])
    assert np.abs(clip_features(large) - f).max() < 0.02
    assert np.isfinite(clip_features(np.zeros_like(clip))).all()
    assert [len(w) for w in windows(np.zeros((97, 4, 4, 3), np.uint8), 16)] == [16] * 6
    with pytest.raises(ValueError, match="9 or more"):
        clip_features(clip[:5])


def test_shuffled_frames_control_and_direction_of_motion():
    """Spec 2.4: the distance of shuffled clips must be at least twice the null bias, or it is blind to
    motion.
    """
    truth = np.stack([clip_features(texture_clip(s)) for s in range(80)])
    other = np.stack([clip_features(texture_clip(s)) for s in range(100, 180)])
    rng = np.random.default_rng(0)
    shuffled = np.stack([clip_features(texture_clip(s)[rng.permutation(16)]) for s in range(100, 180)])
    backward = np.stack([clip_features(texture_clip(s, speed=-1.5)) for s in range(100, 180)])
    floor = frechet_distance(other, truth)
    assert floor == pytest.approx(null_bias(Moments.of(truth).covariance(), 80, 80), rel=0.5)
    assert frechet_distance(shuffled, truth) > 2 * floor
    assert frechet_distance(backward, truth) > 2 * floor


# ------------------------------------------------------------------------------- streamed moments and their files


def test_moments_of_any_split_merge_to_those_of_the_whole():
    rng = np.random.default_rng(12)
    x = 1e4 + rng.normal(size=(500, 8)) @ rng.normal(size=(8, 8))  # far from the origin: no cancellation
    whole = Moments.of(x)
    for cuts in ([1], [1, 2, 3], [100, 250, 251], sorted(rng.choice(499, 40, replace=False) + 1)):
        parts = [Moments.of(p) for p in np.split(x, cuts)]
        order = rng.permutation(len(parts))
        merged = parts[order[0]]
        for i in order[1:]:
            merged = merged.merged(parts[i])
        assert merged.count == 500
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
        np.testing.assert_allclose(merged.covariance(), np.cov(x.T), rtol=1e-9)
    assert frechet_between(whole, Moments.of(x[::2])) == pytest.approx(frechet_distance(x, x[::2]), rel=1e-12)


def test_statistics_files_come_back_and_refuse_other_features(tmp_path):
    rng = np.random.default_rng(13)
    x, y, about = rng.normal(size=(50, 6)), rng.normal(size=(40, 6)), {"extractor": "here", "frames": 16}
    path = tmp_path / "fd.npz"
    with path.open("wb") as file:
        Moments.of(x).save(file, about)
    assert frechet_between(Moments.load(path, about), Moments.of(y)) == frechet_distance(x, y)
    with pytest.raises(ValueError, match=r"other features \(frames: 16 there, 8 here\)"):
        Moments.load(path, {**about, "frames": 8})
    for name, broken in {"nan": {"mean": np.full(6, np.nan)}, "shape": {"scatter": np.zeros((5, 5))},
                         "one": {"count": np.int64(1)}, "objects": {"mean": np.array([{}], dtype=object)}}.items():
        with np.load(path) as file:
            arrays = dict(file) | broken
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match="no file of feature statistics"):
            Moments.load(tmp_path / f"{name}.npz", about)
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="no file of feature statistics"):
        Moments.load(tmp_path / "cut.npz", about)


# ---------------------------------------------------------------------------------------------- MMD, the companion


def test_kernel_distance_is_torchmetrics_and_free_of_the_number_of_rows():
    import torch
    from torchmetrics.image.kid import poly_mmd

    rng = np.random.default_rng(14)
    x, y = rng.normal(size=(60, 12)), rng.normal(size=(60, 12)) * 1.1 + 0.2
    assert kernel_distance(x, y) == pytest.approx(float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y))), rel=1e-9)
    for n in (20, 80):  # no bias, where the Frechet distance has null_bias
        draws = [kernel_distance(rng.normal(size=(n, 12)), rng.normal(size=(n, 12))) for _ in range(200)]
        assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(200) and min(draws) < 0
    interval = frechet_interval(x, y, np.arange(60), np.arange(60), 40, kernel_distance)
    assert interval.low < interval.value == kernel_distance(x, y) < interval.high


def test_the_distances_equal_torchmetrics_own():
    import torch
    from torchmetrics.image.fid import _compute_fid

    for n, m, d in ((300, 200, 16), (500, 2000, 100)):
        rng = np.random.default_rng(n)
        x, y = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / 4, rng.normal(size=(m, d))
        means = [torch.from_numpy(z.mean(0)) for z in (x, y)]
        covs = [torch.from_numpy(np.cov(z.T)) for z in (x, y)]
        theirs = float(_compute_fid(means[0], covs[0], means[1], covs[1]))
        assert frechet_distance(x, y) == pytest.approx(theirs, rel=1e-6)

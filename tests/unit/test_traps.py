"""Videos that game a measure must fail another: frozen, scrolling texture, shuffled frames, noise (spec 11.15)."""

import numpy as np
import pytest

from tests.unit.test_camera_pose import intrinsics, render, walk
from vgr.metrics.drift import PRIMARY, measure_drift, stagnation, time_to_failure
from vgr.metrics.egomotion import flow_rotation, score_motion
from vgr.metrics.features import clip_features, windows
from vgr.metrics.fvd import Moments, frechet_distance, null_bias
from vgr.metrics.image import psnr

FPS, FRAMES, W, H = 8.0, 33, 64, 48
KINDS = ("frozen", "scrolling", "shuffled", "noise")


def trapped(true, kind, seed):
    rng = np.random.default_rng(seed)
    if kind == "frozen":
        return np.repeat(true[:1], FRAMES, axis=0)
    if kind == "scrolling":
        return np.stack([np.roll(true[0], 2 * i, axis=1) for i in range(FRAMES)])
    if kind == "shuffled":
        return true[np.concatenate([[0], 1 + rng.permutation(FRAMES - 1)])]
    return rng.integers(0, 256, true.shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def measured():
    """Of six walks and their traps: drift, camera scores, PSNR and features of windows."""
    found = {kind: [] for kind in ("true", "further", *KINDS)}
    for seed in range(12):
        path = walk(seed, FRAMES)
        true = render(path, W, H, seed=seed, over=1)
        for kind in ("true", *KINDS) if seed < 6 else ("further",):
            video = true if kind in ("true", "further") else trapped(true, kind, seed)
            camera = None if kind == "further" else score_motion(flow_rotation(video, intrinsics(W, H)), path)
            table = [clip_features(w) for w in windows(video[1:], 16)]
            found[kind].append((measure_drift(video[1:], FPS), camera, psnr(video[1:], true[1:]).mean(), table))
    return found


def mean(rows, of):
    return float(np.mean([of(r) for r in rows]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_trap_is_told_from_the_true_videos(measured, kind):
    true, trap = measured["true"], measured[kind]

    def features(rows):
        return np.concatenate([r[3] for r in rows])

    reference = features(measured["further"])
    floor = max(frechet_distance(features(true), reference), null_bias(Moments.of(reference).covariance(), 12, 12))
    assert frechet_distance(features(trap), reference) > 2 * floor
    for error in ("rot_step_imputed_deg", "heading_imputed_deg"):
        wrong, right = (np.mean([r[1][error] for r in rows]) for rows in (trap, true))
        assert wrong > 2 * right, error
    assert mean(trap, lambda r: r[2]) < 25 < 100 == mean(true, lambda r: r[2])


def test_what_each_trap_wins_and_what_gives_it_away(measured):
    true = measured["true"]
    steadiness = {kind: mean(rows, lambda r: r[0].level["steadiness"]) for kind, rows in measured.items()}
    motion = {kind: mean(rows, lambda r: r[0].level["motion"]) for kind, rows in measured.items()}
    # Frozen: perfectly steady and without any drift, but it does not move.
    assert steadiness["frozen"] == 1 > steadiness["true"] and motion["frozen"] == 0 < motion["true"]
    assert all(stagnation(r[0].curve["motion"]) == 1 for r in measured["frozen"])
    assert all(stagnation(r[0].curve["motion"]) < 0.5 for r in true)
    # Scrolling: moves evenly for ever, but not as a camera that was told this way.
    assert motion["scrolling"] > 0 and all(stagnation(r[0].curve["motion"]) == 0 for r in measured["scrolling"])
    # Shuffled: the very frames, so levels are right, but not steady; noise: not steady and nothing to track.
    assert mean(measured["shuffled"], lambda r: r[0].level["lightness"]) == pytest.approx(
        mean(true, lambda r: r[0].level["lightness"]), abs=0.5)  # fmt: skip
    assert steadiness["noise"] < steadiness["shuffled"] < steadiness["true"]
    assert mean(measured["noise"], lambda r: r[1]["coverage"]) < 0.3 < 0.9 < mean(true, lambda r: r[1]["coverage"])
    # Against the true videos' band noise fails at once, and true videos hardly ever.
    bands = {n: tuple(np.percentile(np.concatenate([r[0].curve[n] for r in true]), (1, 99))) for n in PRIMARY}
    assert all(time_to_failure(r[0], bands) == (r[0].times_J[0], True) for r in measured["noise"])
    assert sum(time_to_failure(r[0], bands)[1] for r in true) <= 1

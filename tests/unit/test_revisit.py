"""Returns of a camera on exact renders: what remembers, what does not, and what never came back."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.unit.test_camera_pose import poses, render
from vgr.metrics.image import mean_ssim
from vgr.metrics.revisit import Pair, find_pairs, measure_revisit, returned

FPS = 8.0


def there_and_back(frames=33, degrees=70.0, metres=0.0):
    """Turning away (and walking) and back by the same way: exact returns."""
    u = 1 - np.abs(np.linspace(-1, 1, frames))
    turn = Rotation.from_euler("y", degrees * u[:, None], degrees=True)
    return poses(np.stack([0 * u, 0 * u, metres * u], 1), turn)


@pytest.fixture(scope="module")
def video():
    return render(there_and_back(), 64, 48, over=1)


def test_pairs_are_returns_after_another_view_with_a_control_as_far_apart():
    path = there_and_back(metres=1.5)
    pairs = find_pairs(path, FPS)
    assert pairs and len(pairs) <= 5
    for first, second, control in pairs:
        assert second - first >= 16 and np.allclose(path[first], path[second])
        if control is None:
            assert second - first > 26  # no room for another pair as far apart with two views
            continue
        a, b = path[first + control], path[second + control]
        turned = np.rad2deg(Rotation.from_matrix(a[:3, :3].T @ b[:3, :3]).magnitude())
        assert turned >= 40 or np.linalg.norm((a - b)[:3, 3]) >= 1.0
    assert all(abs(p.second - q.second) >= 4 for p in pairs for q in pairs if p is not q)
    assert find_pairs(poses(np.zeros((33, 3))), FPS) == []  # never left
    away = poses(np.stack([np.zeros(33), np.zeros(33), np.linspace(0, 6, 33)], 1))
    assert find_pairs(away, FPS) == []  # never came back


def test_a_perfect_world_has_the_cap_and_a_world_that_forgets_does_not(video):
    path = there_and_back()
    perfect = measure_revisit(video, path, FPS, path)
    assert perfect.psnr_db == 100 and perfect.ssim == pytest.approx(1) and perfect.dropped == 0 and perfect.pairs >= 2
    assert perfect.memory_db > 70 and perfect.memory_ssim > 0.2
    assert perfect.ssim_uniform == pytest.approx(1) and np.isnan(perfect.lpips)
    other = render(there_and_back(), 64, 48, seed=9, over=1)
    forgetful = np.concatenate([video[:17], other[17:]])  # another room on the way back, from the same path
    scores = measure_revisit(forgetful, path, FPS, path)
    assert abs(scores.memory_db) < 1.5 and scores.psnr_db < 20
    pairs = find_pairs(path, FPS)
    apart = measure_revisit(forgetful, path, FPS, path, lpips=lambda a, b: np.abs(a.astype(float) - b).mean((1, 2, 3)))
    both = [(forgetful[p.first], forgetful[p.second]) for p in pairs]
    assert apart.lpips == pytest.approx(np.mean([np.abs(a.astype(float) - b).mean() for a, b in both]))
    assert apart.ssim_uniform == pytest.approx(np.mean([mean_ssim(a, b, uniform=True) for a, b in both]))
    faded = (video * (1 - 0.01 * np.arange(33))[:, None, None, None]).astype(np.uint8)  # colour drift is no forgetting
    assert 3 < measure_revisit(faded, path, FPS, path).memory_db < perfect.memory_db


def test_frozen_videos_and_wrong_ways_are_no_memory(video):
    """The trap: without the check of the return a frozen camera has a perfect PSNR, but remembers nothing."""
    path = there_and_back(metres=1.5)
    still = np.repeat(video[:1], 33, axis=0)
    blind = measure_revisit(still, path, FPS, None)
    assert blind.psnr_db == 100 and blind.memory_db == 0
    seen = measure_revisit(still, path, FPS, np.tile(np.eye(4), (33, 1, 1)))
    assert seen.pairs == 0 and seen.dropped >= 2 and np.isnan(seen.psnr_db) and np.isnan(seen.memory_db)
    one_way = path.copy()
    one_way[17:] = path[16]  # goes, and never comes back
    assert measure_revisit(video, path, FPS, one_way).pairs == 0
    lost = np.full_like(path, np.nan)
    assert measure_revisit(video, path, FPS, lost).dropped == seen.dropped


def test_an_estimate_of_another_size_and_world_returns_too():
    path = there_and_back(metres=1.5)
    pair = Pair(4, 28, None)
    world = np.eye(4)
    world[:3, :3], world[:3, 3] = Rotation.random(random_state=0).as_matrix(), [3, 2, 1]
    assert returned(pair, path, world @ path)
    scaled = world @ path
    scaled[:, :3, 3] *= 0.1
    assert measure_revisit(np.zeros((33, 48, 64, 3), np.uint8), path, FPS, scaled).dropped == 0
    far = path.copy()
    far[28:, :3, 3] += [1.2, 0, 0]
    assert not returned(pair, path, far)


def test_paths_without_returns_have_no_scores(video):
    away = poses(np.stack([np.zeros(33), np.zeros(33), np.linspace(0, 6, 33)], 1))
    scores = measure_revisit(video, away, FPS, away)
    assert (scores.pairs, scores.dropped) == (0, 0) and np.isnan(scores.memory_db)

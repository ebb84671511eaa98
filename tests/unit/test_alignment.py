import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vgr.geometry.alignment import path_rank, rotation_mean, umeyama


def test_umeyama_finds_a_secret_similarity():
    rng = np.random.default_rng(0)
    src, R, t = rng.normal(size=(30, 3)), Rotation.random(random_state=1).as_matrix(), rng.normal(size=3)
    s, R_got, t_got = umeyama(src, 2.7 * src @ R.T + t, with_scale=True)
    np.testing.assert_allclose(s, 2.7)
    np.testing.assert_allclose(R_got, R, atol=1e-12)
    np.testing.assert_allclose(t_got, t, atol=1e-12)
    s, R_got, _ = umeyama(src, 2.7 * src @ R.T + t, with_scale=False)
    assert s == 1.0
    np.testing.assert_allclose(R_got, R, atol=1e-12)


def test_umeyama_is_a_minimum_and_never_a_reflection():
    rng = np.random.default_rng(2)
    src = rng.normal(size=(20, 3))
    dst = src * (1, 1, -1) + 0.1 * rng.normal(size=(20, 3))  # a mirrored path
    s, R, t = umeyama(src, dst, with_scale=True)
    assert np.linalg.det(R) == pytest.approx(1.0)
    cost = ((dst - (s * src @ R.T + t)) ** 2).sum()
    for _ in range(50):
        turn = Rotation.from_rotvec(0.05 * rng.normal(size=3)).as_matrix() @ R
        near = (s * np.exp(0.05 * rng.normal())) * src @ turn.T + t + 0.05 * rng.normal(size=3)
        assert ((dst - near) ** 2).sum() > cost


def test_rotation_mean_recovers_a_world_rotation_and_guards_the_determinant():
    src = Rotation.random(40, random_state=3)
    R = Rotation.random(random_state=4)
    noise = Rotation.from_rotvec(0.01 * np.random.default_rng(5).normal(size=(40, 3)))
    got = rotation_mean(src.as_matrix(), (R * noise * src).as_matrix())
    assert np.rad2deg((R.inv() * Rotation.from_matrix(got)).magnitude()) < 0.3
    half_turns = Rotation.from_rotvec(np.pi * np.eye(3)).as_matrix()  # their sum is -1: a reflection
    assert np.linalg.det(rotation_mean(np.tile(np.eye(3), (3, 1, 1)), half_turns)) == pytest.approx(1.0)


def test_path_rank():
    u = np.linspace(0, 1, 20)[:, None]
    rng = np.random.default_rng(6)
    assert path_rank(np.zeros((20, 3))) == 0
    assert path_rank(np.zeros((1, 3))) == 0
    assert path_rank(u * [1.0, 2.0, -1.0] + 0.005 * rng.normal(size=(20, 3))) == 1
    assert path_rank(np.concatenate([np.cos(2 * u), np.sin(2 * u), 0 * u], 1)) == 2
    assert path_rank(rng.normal(size=(20, 3))) == 3


def test_umeyama_refuses_other_shapes():
    with pytest.raises(ValueError, match="one shape"):
        umeyama(np.zeros((3, 3)), np.zeros((4, 3)))

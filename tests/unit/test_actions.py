import math

import numpy as np
import pytest

from vgr.geometry.actions import parse
from vgr.geometry.trajectories import from_actions


def angles_deg(pose):
    """Yaw to the right and pitch up of the view axis, degrees."""
    x, y, z = pose[:3, 2].numpy()
    return math.degrees(math.atan2(x, z)), math.degrees(math.asin(-y))


def test_first_release_dialect_equals_diffusers():
    reference = pytest.importorskip("diffusers.pipelines.sana_wm.cam_utils")
    rng = np.random.default_rng(0)
    texts = ["w-100,dw-60,w-100,aw-60", "i-90,jw-20,none-3,kl-33,ws-4,sd-10"]
    for _ in range(10):
        keys = ["".join(rng.choice(list("wasdijkl"), rng.integers(1, 5), replace=False)) for _ in range(6)]
        texts.append(",".join(f"{k}-{rng.integers(1, 30)}" for k in keys))
    for text in texts:
        got = from_actions(text, "sana-wm-1").numpy()
        np.testing.assert_allclose(got, reference.action_string_to_c2w(text), atol=2e-6)


def test_first_press_is_instant_and_directions_are_opencv():
    ends = {key: from_actions(f"{key}-1")[1] for key in "wsadikjl"}
    np.testing.assert_allclose(ends["w"][:3, 3], [0, 0, 0.025])
    np.testing.assert_allclose(ends["s"][:3, 3], [0, 0, -0.025])
    np.testing.assert_allclose(ends["l"][:3, 3], [0.025, 0, 0])
    np.testing.assert_allclose(ends["j"][:3, 3], [-0.025, 0, 0])
    np.testing.assert_allclose(angles_deg(ends["d"]), [0.6, 0], atol=1e-12)
    np.testing.assert_allclose(angles_deg(ends["a"]), [-0.6, 0], atol=1e-12)
    np.testing.assert_allclose(angles_deg(ends["i"]), [0, 0.6], atol=1e-12)
    np.testing.assert_allclose(angles_deg(ends["k"]), [0, -0.6], atol=1e-12)


def test_release_coasts_with_its_time_constant():
    """After release the speed falls by exp(-1 / (16 fps * 1 s)) a frame, a geometric series."""
    z = from_actions("w-10,none-40")[:, 2, 3].numpy()
    speed = np.diff(z)
    np.testing.assert_allclose(speed[:10], 0.025)
    np.testing.assert_allclose(speed[10:], 0.025 * math.exp(-1 / 16) ** np.arange(1, 41))


def test_a_kept_key_eases_to_its_new_target_and_a_new_key_takes_all_axes_at_once():
    # From wd to w nothing new is pressed: yaw coasts (1 s), forward stays at its target.
    poses = from_actions("wd-5,w-20").numpy()
    yaw = np.array([angles_deg(p)[0] for p in from_actions("wd-5,w-20")])
    np.testing.assert_allclose(np.diff(yaw)[5:], 0.6 * math.exp(-1 / 16) ** np.arange(1, 21), rtol=1e-9)
    speed = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    np.testing.assert_allclose(speed, 0.025)
    # From w to d the new key zeroes the forward speed at once.
    np.testing.assert_array_equal(np.diff(from_actions("w-5,d-3").numpy()[:, :3, 3], axis=0)[5:], 0)
    # Releasing one of two opposing keys is no new press: from rest towards 0.025 with 0.45 s.
    speed = np.diff(from_actions("ws-3,w-10")[:, 2, 3].numpy())
    np.testing.assert_allclose(speed[:3], 0)
    np.testing.assert_allclose(speed[3:], 0.025 * (1 - math.exp(-1 / (16 * 0.45)) ** np.arange(1, 11)), rtol=1e-9)


def test_pitch_limit_and_horizontal_translation():
    up = from_actions("i-200")
    assert angles_deg(up[-1])[1] == pytest.approx(60.0)
    walked = from_actions("i-200,w-20,dw-20").numpy()
    np.testing.assert_array_equal(walked[:, 1, 3], 0)  # looking up, one still walks on the ground
    np.testing.assert_allclose(np.linalg.norm(np.diff(walked[201:, :3, 3], axis=0), axis=1), 0.025)
    first = from_actions("i-200", "sana-wm-1")
    assert angles_deg(first[-1])[1] == pytest.approx(70 * 1.2), "70 steps fit below 85 degrees, the 71st is dropped"


def test_the_remap_between_dialects():
    """The same motion is written with a/d and j/l swapped (specs/world-model 4.1), apart from speed and smoothing."""
    for old, new in (("d", "l"), ("a", "j"), ("l", "d"), ("j", "a")):
        a, b = from_actions(f"{old}-1", "sana-wm-1")[1], from_actions(f"{new}-1", "sana-wm-2")[1]
        np.testing.assert_allclose(a[:3, 3], 2 * b[:3, 3])
        np.testing.assert_allclose(angles_deg(a), 2 * np.array(angles_deg(b)), atol=1e-12)
    strafed = from_actions("d-10", "sana-wm-1", strafe_yaw=0.4)[-1]
    assert angles_deg(strafed)[0] == pytest.approx(10 * 0.4 * 1.2)


def test_counts_and_frames():
    assert from_actions("w-30,dw-20,none-10").shape == (61, 4, 4)
    full = from_actions("w-10,d-10,none-7")
    np.testing.assert_array_equal(from_actions("w-10,d-10", frames=28), full)
    np.testing.assert_array_equal(from_actions("w-10,d-10", frames=5), full[:5])
    np.testing.assert_array_equal(from_actions(" W-10 ,\nd - 10,NONE-7 "), full)
    np.testing.assert_array_equal(from_actions("w-3")[0], np.eye(4))


def test_parse():
    assert parse("wd-3,none-2") == [(frozenset("wd"), 3), (frozenset(), 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("w-30,", r"segment 2, character 5: empty segment"),
        ("w-30,,d-3", r"segment 2, character 5: empty segment"),
        ("w-30,x-3", r"segment 2, character 5: unknown key 'x'"),
        ("w-30,dwq-3", r"segment 2, character 7: unknown key 'q'"),
        ("ww-3", r"segment 1, character 1: key 'w' is given twice"),
        ("w30", r"segment 1, character 3: 'w30' has no '-'"),
        ("w-0", r"segment 1, character 2: frames '0'"),
        ("w-1000000", r"segment 1, character 2: frames '1000000'"),
        ("w-3,d--4", r"segment 2, character 6: frames '-4'"),
        ("w-1.5", r"segment 1, character 2: frames '1.5'"),
        ("w-", r"segment 1, character 2: frames ''"),
        ("w-²", r"segment 1, character 2: frames"),
        ("-3", r"segment 1, character 0: no keys"),
        ("nonew-3", r"segment 1, character 0: unknown key 'n'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_and_position(text, message):
    with pytest.raises(ValueError, match=message):
        from_actions(text)


def test_bad_dialect_and_frames():
    with pytest.raises(ValueError, match="sana-wm-3.*sana-wm-1, sana-wm-2"):
        from_actions("w-3", "sana-wm-3")
    with pytest.raises(ValueError, match="frames"):
        from_actions("w-3", frames=0)

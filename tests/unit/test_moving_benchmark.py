"""The benchmark of moving things at a size that runs in seconds: its scenes are what they say, its measures right."""

import json
import sys
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import moving
from benchmarks.moving_scenes import CHUNK, FRAMES, LAST, PAST, SIZE_HW, grade, room
from vgr.geometry.moving import Moving
from vgr.models.codec import CosineCodec
from vgr.models.helios import Helios
from vgr.models.text import ByteTextEncoder
from vgr.models.warp_adapter import MOVING, WarpEvidence
from vgr.training.conditioning import conditioning


@lru_cache
def shot(share):
    return grade(room(np.random.default_rng(3)), share, 1)


@lru_cache
def found():
    return moving.sought(shot(0.2), shot(0.2).depth)


def exact(one):
    ways = one.where[PAST] - one.where[LAST]
    return [Moving(one.which[LAST] == i, way) for i, way in enumerate(ways, 1)]


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 1), (0.2, 2)])
def test_a_scene_has_the_share_that_was_asked_for_and_else_stays_as_it_was(share, count):
    one, still = shot(share), shot(0.0)
    assert one.share == pytest.approx(share, rel=0.15) and one.where.shape == (FRAMES, count, 3)
    moves = one.which > 0
    assert (one.depth[moves] < still.depth[moves]).all() and np.array_equal(one.depth[~moves], still.depth[~moves])
    away = np.abs(one.frames.astype(int) - still.frames).max(-1) > 0
    assert (not count or away[moves].mean() > 0.9) and away[~moves].mean() < 0.03  # edges are averages
    for f in (LAST, FRAMES - 1):
        for i, (x, y) in enumerate(one.pixels(one.where[f], f), 1):
            assert one.which[f, int(y), int(x)] == i
    gone = np.linalg.norm(one.pixels(one.where[-1], LAST) - one.pixels(one.where[LAST], LAST), axis=1)
    assert (gone > 8).all()


class Seen(CosineCodec):
    """Keeps what it was given to encode."""

    def encode(self, video):
        self.video = video
        return super().encode(video)


@pytest.mark.parametrize("arm", MOVING)
def test_warps_are_those_of_the_adapter(arm):
    one, codec = shot(0.2), Seen((4, 8, 8), (3, 2, 1), (1,))
    text = ByteTextEncoder(width=16, length=16, layers=1, heads=2)
    shots = torch.zeros(1, 9, dtype=torch.int64)
    cond = conditioning(text, (("",),), one.cameras(), shots, 4, 4).frames(5, 9)
    evidence = WarpEvidence(one.cameras(), lambda _, n: torch.from_numpy(one.depth[n]), codec, seed=1, rescale=False,
                            moving=arm)  # fmt: skip
    evidence(cond, torch.from_numpy(one.frames[:PAST]))
    own = moving.drawn(one, one.depth[LAST], *found(), arm).images
    assert (codec.video[0, :, 1:].transpose(0, 1).add(1) * 127.5 - own).abs().max() < 0.01


def test_a_warp_without_its_moving_things_is_righter_and_carried_by_the_truth_shows_more():
    one = shot(0.2)
    mask, things = one.which[LAST] > 0, exact(one)
    warps = [moving.drawn(one, one.depth[LAST], mask, things, arm) for arm in MOVING]
    keep, drop, carry = (moving.judge_warp(warp, one) for warp in warps)
    assert drop["right_of_shown"] > keep["right_of_shown"] + 0.05 and drop["shown"] < keep["shown"] - 0.1
    assert carry["right_of_all"] > keep["right_of_all"] and carry["right_of_shown"] > keep["right_of_shown"]
    depth = one.depth[LAST]
    assert moving.misplaced(one, depth, things) < 0.4 * moving.misplaced(one, depth, [])
    # Of the double depth, and on a way of the double length from there: in the picture it is the same.
    eye = one.c2w[-1, :3, 3] - one.c2w[LAST, :3, 3]
    twice = [Moving(thing.mask, 2 * thing.velocity - eye / CHUNK) for thing in things]
    assert moving.misplaced(one, 2 * depth, twice) == pytest.approx(moving.misplaced(one, depth, things))
    assert np.isnan(moving.misplaced(shot(0.0), shot(0.0).depth[LAST], []))


def test_where_nothing_moves_the_arms_are_one():
    row = moving.of_warp(shot(0.0), shot(0.0).depth)
    assert row["mask"]["share"] < 0.01 and np.isnan(row["mask"]["iou"])
    for arm in ("drop", "carry"):
        assert row[arm]["psnr_shown_db"] == pytest.approx(row["keep"]["psnr_shown_db"], abs=0.3)
    assert row["keep"]["right_of_shown"] > 0.97


def test_sparse_depth_is_near_the_true_one_where_nothing_moves():
    one = shot(0.1)
    depth = moving.sparse_depth(one, 1)
    still = one.which[:PAST] == 0
    assert depth.shape == (PAST, *SIZE_HW)
    assert (np.abs(depth / one.depth[:PAST] - 1)[still] < 0.1).mean() > 0.7


@pytest.mark.parametrize("off", [(0, 0), (3, -7), (-20, 12)])
def test_a_thing_is_found_where_it_was_put(off):
    one = shot(0.1)
    true, thing = one.frames[LAST], one.which[LAST] == 1
    made = np.full_like(true, 90)
    y, x = np.nonzero(thing)
    made[(y + off[0]).clip(0, SIZE_HW[0] - 1), (x + off[1]).clip(0, SIZE_HW[1] - 1)] = true[y, x]
    assert moving.astray(made, true, thing) == pytest.approx(np.hypot(*off))


def test_the_true_video_is_right_and_a_held_frame_is_not():
    one = shot(0.1)
    seen = moving.in_sight(one)
    videos = one.frames[LAST:], one.frames[LAST:PAST].repeat(1 + CHUNK, 0)
    true, held = (moving.of_video(video, one, seen) for video in videos)
    assert true["psnr_seen_db"] > 90 and true["motion_px"] == 0 and true["align_rot_deg"] < 1.0
    assert held["psnr_still_db"] < 30 and held["motion_px"] > 5 and held["align_rot_deg"] > 1


def test_a_model_goes_on_behind_the_true_past():
    torch.manual_seed(0)
    codec = CosineCodec((4, 8, 8), (3, 2, 1), (1,))
    model = Helios(codec.channels, 16, heads=2, head_dim=12, layers=1, text_length=16, truncate_times=False,
                   stage_times=(999.0, 571.4, 0.999), options={"ffn_dim": 16, "rope_dim": [4, 4, 4]})  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    text = ByteTextEncoder(width=16, length=16, layers=1, heads=2).eval()
    generator = SimpleNamespace(
        model=model.eval(), frozen=None, codec=codec, text=text,
        device="cpu", chunk=4, stride=4, size_hw=SIZE_HW, evidence={}, sigmas=torch.tensor([1.0, 0.0]), name="tiny",
        sampling={"method": "pyramid", "steps": 1},
    )  # fmt: skip
    one = shot(0.2)
    made = moving.Model(generator).made(one, one.depth, 1)
    assert list(made) == [moving.CEILING, moving.FLOOR, moving.NO_WARP, *MOVING]
    assert all(video.shape == (1 + CHUNK, *SIZE_HW, 3) for video in made.values())
    for video in list(made.values())[2:]:
        assert np.abs(video[0].astype(int) - made[moving.CEILING][0]).max() <= 1  # the true past, through the codec
    assert not np.array_equal(made["keep"], made["drop"]) and not np.array_equal(made["keep"], made[moving.NO_WARP])
    generator.chunk = 3
    with pytest.raises(ValueError, match="12 frames a chunk"):
        moving.Model(generator)


def test_the_command_writes_curves_with_intervals(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "moving.json", tmp_path / "moving.png"
    told = f"moving --kinds procedural --shares 0.1 --scenes 2 --depth sparse --out {out} --plot {picture}"
    monkeypatch.setattr(sys, "argv", told.split())
    moving.main()
    result = json.loads(out.read_text())
    (point,) = result["curves"]["procedural"]
    assert point["share"] == pytest.approx(0.1, rel=0.15) and result["device"] and result["versions"]
    gain = point["warp"]["carry"]["right_of_shown"]["difference"]
    assert gain["low"] <= gain["value"] <= gain["high"] and point["scenes"] == 2
    assert picture.stat().st_size > 10_000 and f"{100 * point['share']:.1f} % moving" in capsys.readouterr().out

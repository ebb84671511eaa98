"""A rollout's evidence: which camera each frame is warped to, whose scale depth has, and that memory is bounded."""

from functools import partial

import numpy as np
import pytest
import torch
from test_one_video import K, walk

from vgr.diffusion.pyramid import Streamed
from vgr.diffusion.rollout import Session
from vgr.diffusion.samplers import frame_noise
from vgr.geometry.cameras import relative_to_first
from vgr.metrics.image import psnr
from vgr.models import warp_adapter
from vgr.models.causal_video import CausalVideo
from vgr.models.codec import CosineCodec
from vgr.models.helios import Helios
from vgr.models.warp_adapter import WarpEvidence, with_evidence
from vgr.types import Cameras, TextStates

STRIDE, CHUNK, FPS = 4, 2, 16.0
CODEC = CosineCodec(stride=(STRIDE, 8, 8), luma=(8, 8, 8, 8), chroma=(8, 8, 8, 8))  # all bands: no loss


class Copier:
    """A denoiser that makes what its evidence shows."""

    takes_history, takes_cameras = True, False
    seen = ()

    def new_state(self):
        return 0

    def __call__(self, x, t, cond, state=None, *, commit=False):
        if commit:
            return torch.zeros_like(x), state + 1
        (block,) = cond.history
        assert block.position.tolist() == cond.layout.position.tolist()
        self.seen = (*self.seen, block)
        return (x - block.latents) / t.clamp_min(1e-6)[:, None, :, None, None], state


def no_text(captions):
    return TextStates(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, dtype=torch.bool))


def rolled(evidence, image, seconds, pieces=1):
    denoiser = Copier()
    settings = dict(sigmas=torch.tensor([1.0, 0.0]), chunk=CHUNK, fps=FPS, size_hw=(96, 128))
    session = Session(denoiser, CODEC, no_text, **settings, first_frame=torch.from_numpy(image), evidence=evidence)
    for _ in range(pieces):
        session.append("", seconds / pieces)
    return torch.cat(list(session.frames())).numpy(), denoiser


def path(frames):
    c2w, shown, depth = walk(frames)
    cameras = Cameras(relative_to_first(torch.from_numpy(c2w)[None]), torch.from_numpy(K).repeat(1, frames, 1))
    return cameras, shown, torch.from_numpy(depth)


def test_every_frame_is_warped_to_its_own_camera(monkeypatch):
    """Of a camera that moves, each frame is most like the true one of its own time, over chunk boundaries."""
    monkeypatch.setattr(warp_adapter, "evidence_block", partial(warp_adapter.evidence_block, noise=(0.0, 0.0)))
    cameras, shown, depth = path(25)
    evidence = WarpEvidence(cameras, lambda image, frame: depth[frame], CODEC, seed=1, rescale=False)
    made, denoiser = rolled(evidence, shown[0], 1.5)
    assert made.shape == shown.shape and len(denoiser.seen) == 3
    assert np.array_equal(made[0], shown[0])
    made, shown = made[:, :, :90], shown[:, :, :90]  # to the right of it what comes into view is not in the warp
    for f in range(1, 24):
        own, before, after = (psnr(made[f : f + 1], shown[g : g + 1])[0] for g in (f, f - 1, f + 1))
        assert own > before + 0.5 and own > after + 0.5, (f, own, before, after)


def test_appended_in_pieces_is_the_same():
    cameras, shown, depth = path(17)
    both = [rolled(WarpEvidence(cameras, lambda image, frame: depth[frame], CODEC, seed=1), shown[0], 1.0, n)[0]
            for n in (1, 2)]  # fmt: skip
    assert np.array_equal(*both)


def test_depth_of_any_scale_is_brought_to_the_first_frames():
    """Estimates that halve and double from keyframe to keyframe leave the same evidence as one scale throughout."""
    cameras, shown, depth = path(25)
    scale = {0: 1.0, 8: 0.5, 16: 2.0}
    given = WarpEvidence(cameras, lambda image, frame: depth[frame], CODEC, seed=1, moving="keep")
    off = WarpEvidence(cameras, lambda image, frame: depth[frame] * scale[frame], CODEC, seed=1, moving="keep")
    (a, seen_a), (b, seen_b) = (rolled(e, shown[0], 1.5) for e in (given, off))
    assert np.abs(a.astype(int) - b).mean() < 1
    for x, y in zip(seen_a.seen, seen_b.seen):
        assert float((x.keep == y.keep).float().mean()) > 0.99


def test_keyframes_are_bounded_and_the_first_one_stays():
    cameras, shown, depth = path(41)
    evidence = WarpEvidence(cameras, lambda image, frame: depth[frame], CODEC, seed=1, keyframes=2)
    rolled(evidence, shown[0], 2.5)
    assert [one.frame for one in evidence._kept] == [0, 24, 32]


def test_what_a_rollout_refuses():
    cameras, shown, depth = path(17)
    evidence = WarpEvidence(cameras, lambda image, frame: depth[frame], CODEC, seed=1)
    with pytest.raises(ValueError, match="goes to raw frame 24, but the camera's path has only 17 frames"):
        rolled(evidence, shown[0], 1.5)
    with pytest.raises(ValueError, match="keyframes=0"):
        WarpEvidence(cameras, lambda image, frame: depth[frame], CODEC, seed=1, keyframes=0)


@pytest.mark.parametrize("kind", ["causal", "helios"])
def test_both_models_follow_evidence_through_a_session(kind):
    """Random models: the video is whole, begins with its image, and is another with evidence than without."""
    cameras, shown, depth = path(25)
    codec = CosineCodec(stride=(STRIDE, 8, 8), luma=(3, 1), chroma=(1,))
    noise = frame_noise([0], (codec.channels, 12, 16))
    torch.manual_seed(0)
    if kind == "causal":
        model = CausalVideo(codec.channels, 32, 2, 2, 64, 4, 1, window=1)
        denoiser, sigmas = with_evidence(model), torch.tensor([1.0, 0.5, 0.0])
    else:
        options = {"ffn_dim": 32, "rope_dim": [8, 4, 4]}
        model = Helios(codec.channels, 4, 2, 16, 2, options, text_length=1, stage_times=(999.0, 571.0, 0.999))
        denoiser, sigmas = Streamed(model, noise, (1, 1)), torch.tensor([1.0, 0.0])
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    made = []
    for given in (None, WarpEvidence(cameras, lambda image, frame: depth[frame], codec, seed=1)):
        session = Session(denoiser, codec, no_text, sigmas=sigmas, chunk=CHUNK, fps=FPS, size_hw=(96, 128),
                          first_frame=torch.from_numpy(shown[0]), evidence=given)  # fmt: skip
        session.append("", 1.5)
        made.append(torch.cat(list(session.frames())))
    assert made[0].shape == (25, 96, 128, 3) and torch.equal(made[0][0], made[1][0])
    assert (made[0][1:].float() - made[1][1:].float()).abs().mean(dim=(1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("moving", ["drop", "carry"])
def test_where_all_that_is_known_moves_a_keyframe_still_shows_it(moving, monkeypatch):
    """A mask of everything, as of a scene that turns over: the plain warp is left, not an error."""
    monkeypatch.setattr(warp_adapter, "moving_mask", lambda frames, *_: np.ones(frames.shape[:3], bool))
    cameras, shown, depth = path(25)
    evidence = WarpEvidence(cameras, lambda image, frame: depth[frame], CODEC, seed=1, moving=moving)
    made, denoiser = rolled(evidence, shown[0], 1.5)
    assert len(made) == 25 and all(bool(block.keep.any()) for block in denoiser.seen)

"""A rollout's evidence: which camera each frame is warped to, whose scale depth has, and that memory is bounded."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_one_video import K, walk

from vgr.diffusion.pyramid import Streamed
from vgr.diffusion.rollout import Session
from vgr.diffusion.samplers import frame_noise
from vgr.generator import Generator
from vgr.geometry.cameras import relative_to_first
from vgr.metrics.image import psnr
from vgr.models import warp_adapter
from vgr.models.causal_video import CausalVideo
from vgr.models.codec import CosineCodec
from vgr.models.helios import Helios
from vgr.models.warp_adapter import WarpEvidence, with_evidence
from vgr.types import Cameras, Conditioning, HistoryBlock, Layout, TextStates

STRIDE, CHUNK, FPS = 4, 2, 16.0
CODEC = CosineCodec(stride=(STRIDE, 8, 8), luma=(8, 8, 8, 8), chroma=(8, 8, 8, 8))  # all bands: no loss


class Clips(CosineCodec):
    """A codec without loss whose every three latent frames are a clip of their own."""

    clip = 3

    def encode(self, video):
        whole, parts = super().encode, video.split(1 + 2 * STRIDE, 2)
        return torch.cat([whole(part) for part in parts], 2)

    def stream(self):
        return lambda latents: torch.cat([CODEC.decode(part) for part in latents.split(3, 2)], 2)


CLIPS = Clips(stride=(STRIDE, 8, 8), luma=(8, 8, 8, 8), chroma=(8, 8, 8, 8))


class Copier:
    """A denoiser that makes what its evidence shows."""

    takes_history, takes_cameras = True, False
    seen = ()

    def new_state(self, prefix=None, still=None):
        self.start = prefix, still
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


def rolled(evidence, image, seconds, pieces=1, codec=CODEC, **given):
    denoiser = Copier()
    settings = dict(sigmas=torch.tensor([1.0, 0.0]), chunk=codec.clip or CHUNK, fps=FPS, size_hw=(96, 128))
    image = torch.from_numpy(image)
    session = Session(denoiser, codec, no_text, **{**settings, **given}, first_frame=image, evidence=evidence)
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


def test_clips_of_their_own_are_warped_to_their_own_cameras(monkeypatch):
    """Of chunks of nine raw frames the first begins with the image; each is of its own cameras, with no frame before
    it, and the image and it standing still are what the first goes on from."""
    monkeypatch.setattr(warp_adapter, "evidence_block", partial(warp_adapter.evidence_block, noise=(0.0, 0.0)))
    cameras, shown, depth = path(27)
    asked = []

    def depth_of(image, frame):
        asked.append(frame)
        return depth[frame]

    evidence = WarpEvidence(cameras, depth_of, CLIPS, seed=1, rescale=False, moving="keep")
    made, denoiser = rolled(evidence, shown[0], 27 / FPS, codec=CLIPS)
    assert made.shape == shown.shape and asked == [0, 8, 17]
    assert [block.position.tolist() for block in denoiser.seen] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    prefix, still = denoiser.start
    image = torch.from_numpy(shown[:1]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    assert torch.equal(prefix, CODEC.encode(image))
    torch.testing.assert_close(still, CODEC.encode(image.expand(-1, -1, 9, -1, -1))[:, :, -1:])
    assert np.array_equal(made[0], shown[0])
    made, shown = made[:, :, :90], shown[:, :, :90]
    for f in range(1, 26):
        own, before, after = (psnr(made[f : f + 1], shown[g : g + 1])[0] for g in (f, f - 1, f + 1))
        assert own > before + 0.5 and own > after + 0.5, (f, own, before, after)
    assert all(block.latents.shape[2] == block.keep.shape[1] == 3 for block in denoiser.seen)


def test_what_clips_refuse():
    with pytest.raises(ValueError, match="chunk=2, but the codec's clips are 3"):
        rolled(None, np.zeros((96, 128, 3), np.uint8), 9 / FPS, codec=CLIPS, chunk=2)
    with pytest.raises(ValueError, match="chunks of 9 frames"):
        rolled(None, np.zeros((96, 128, 3), np.uint8), 8 / FPS, codec=CLIPS)


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


SAMPLED = [
    {"method": "stream"}, {"method": "stream", "from_time": 0.0}, {"method": "pyramid", "steps": 1},
    {"method": "pyramid", "steps": 1, "staged": {"shown": 2}},
]  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLED)
def test_a_run_says_how_long_evidence_is_read(sampling):
    """At high noise and in the first stage alone, as published, unless its sampling says otherwise."""
    told = []

    def watched(name):
        def call(x, t, cond, state=None, *, commit=False):
            told.append((name, cond.stage, round(float(t.max()), 1)))
            return 0 * x, state

        call.new_state, call.takes_history = (lambda: None), True
        return call

    generator = object.__new__(Generator)
    generator.size_hw, generator.codec, generator.device, generator.sampling = (96, 128), CODEC, "cpu", sampling
    generator.model = SimpleNamespace(stages=2)
    denoiser, noise = generator._streaming(watched("adapted"), [0], watched("base"))
    block = HistoryBlock(torch.zeros(1, CODEC.channels, CHUNK, 12, 16), torch.arange(CHUNK), "short", None)
    cond = Conditioning(Layout.chunked(1, CHUNK, CHUNK), no_text(()), history=(block,))
    x = noise(cond.layout.position, 0)
    for t in (1.0, 0.5) if sampling["method"] == "stream" else (1.0,):
        denoiser(x, torch.full((1, CHUNK), t), cond, denoiser.new_state())
    late = "adapted" if "from_time" in sampling or "staged" in sampling else "base"
    assert [name for name, *_ in told] == ["adapted", late]

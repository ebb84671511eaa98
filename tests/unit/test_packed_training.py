"""Training under a known past: the objective, the packed call against a stream, and a teacher's consistency."""

from functools import partial

import numpy as np
import pytest
import torch

from tests.unit.test_self_forcing import _batch, _network
from vgr.data.modules import collate
from vgr.data.shards import Sample
from vgr.diffusion import flow, objectives
from vgr.diffusion.guidance import guided, teacher_forced
from vgr.diffusion.rollout import Session
from vgr.diffusion.samplers import chunk_bounds
from vgr.distillation.consistency import consistency
from vgr.models.codec import CosineCodec
from vgr.models.text import ByteTextEncoder
from vgr.training import validation
from vgr.training.conditioning import conditioning
from vgr.training.world_model import WorldModelTraining
from vgr.types import Cameras, TextStates

FORCING = partial(objectives.teacher_forcing, shift=5.0, shared=False)
CONSISTENCY = partial(consistency, steps=8, shift=5.0)


def _module(objective, teacher=None, **settings):
    torch.manual_seed(0)
    parts = (_network("video"), ByteTextEncoder(16, 16, 1, 2), CosineCodec(stride=[4, 8, 8], luma=[2], chroma=[0]))
    settings = {"packed": True, "chunk": 2, "text_dropout": 0.0, **settings}
    return WorldModelTraining(
        *parts, seed=1, global_batch=2, max_samples=400, objective=objective, teacher=teacher, **settings
    )


def test_teacher_forcing_gives_noisy_chunks_and_a_past_of_its_own_noise():
    latents, positions, chunk = torch.randn(200, 4, 7, 4, 4), torch.arange(200), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    clean = objectives.teacher_forcing(latents, positions, chunk, 0, shift=5.0)
    assert torch.equal(clean.context, latents) and clean.context_t is None
    assert torch.equal(clean.t, clean.t[:, :1].expand(-1, 7)) and float(clean.t.mean()) > 0.6
    torch.testing.assert_close(flow.clean_estimate(clean.x, clean.target, clean.t), latents, rtol=1e-4, atol=1e-4)
    assert abs(float(clean.weight.mean()) - 1) < 0.1
    noisy = objectives.teacher_forcing(latents, positions, chunk, 0, shift=5.0, bump=False, context_noise=0.2)
    assert torch.equal(noisy.x, clean.x) and torch.equal(noisy.weight, torch.ones(200, 7))
    assert float(noisy.context_t.min()) > 0 and 0.19 < float(noisy.context_t.max()) <= 0.2
    own = (noisy.context - latents) / flow.per_frame(noisy.context_t) + latents
    assert abs(float(own.std()) - 1) < 0.02 and float((own * (clean.target + latents)).mean().abs()) < 0.02
    again = objectives.teacher_forcing(latents[7:8], positions[7:8], chunk, 0, shift=5.0, context_noise=0.2)
    assert torch.equal(again.context[0], noisy.context[7]) and torch.equal(again.x[0], noisy.x[7])
    with pytest.raises(ValueError, match="context_noise=2"):
        objectives.teacher_forcing(latents, positions, chunk, 0, shift=5.0, context_noise=2)


def test_a_first_frame_is_given_as_a_rollout_holds_it():
    """At t = 0, clean and not counted, beside the rest of its chunk; all else is as without."""
    latents, positions, chunk = torch.randn(200, 4, 7, 4, 4), torch.arange(200), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    forced = partial(objectives.teacher_forcing, latents, positions, chunk, 0, shift=5.0, shared=False)
    plain, given, half = (forced(first_frame_clean=share) for share in (0.0, 1.0, 0.5))
    assert (plain.t > 0).all() and (given.t[:, 0] == 0).all() and (given.weight[:, 0] == 0).all()
    assert torch.equal(given.x[:, :, 0], latents[:, :, 0])
    for ours, theirs in ((given.t, plain.t), (given.weight, plain.weight)):
        assert torch.equal(ours[:, 1:], theirs[:, 1:])
    assert torch.equal(given.x[:, :, 1:], plain.x[:, :, 1:]) and torch.equal(given.target, plain.target)
    some = half.t[:, 0] == 0
    assert 60 < int(some.sum()) < 140 and torch.equal(half.x[some], given.x[some])
    assert torch.equal(half.x[~some], plain.x[~some])
    with pytest.raises(ValueError, match="first_frame_clean=2"):
        forced(first_frame_clean=2.0)


@pytest.mark.parametrize("first_frame_clean", [0.0, 1.0])
def test_the_packed_loss_is_that_of_chunks_denoised_from_committed_true_ones(first_frame_clean):
    """The first one, where its first frame is given, with that frame at t = 0: as a rollout begins."""
    module, batch = _module(partial(FORCING, first_frame_clean=first_frame_clean)), _batch()
    noised = module.objective(batch.latents, batch.position, torch.tensor([0, 0, 0, 1, 1, 2, 2]), 1)
    with torch.no_grad():
        cond = conditioning(module.text, batch.captions, batch.cameras, batch.shot, 4, 2)
        state, parts = module.model.new_state(), []
        for a, b in chunk_bounds(cond.layout):
            part, still = cond.frames(a, b), torch.zeros(2, b - a)
            parts.append(module.model(noised.x[:, :, a:b], noised.t[:, a:b], part, state)[0])
            _, state = module.model(batch.latents[:, :, a:b], still, part, state, commit=True)
        error_BT = (torch.cat(parts, 2) - noised.target).square().mean((1, 3, 4))
    losses = module._sample_losses(batch)
    counted = (noised.weight > 0).sum(1)
    torch.testing.assert_close(losses, (error_BT * noised.weight).sum(1) / counted, rtol=1e-4, atol=1e-5)
    losses.sum().backward()
    assert all(p.grad is not None for p in module.model.parameters())


def test_validation_of_a_packed_run_has_the_clean_past():
    module, batch = _module(FORCING), _batch()
    found = validation.validate(
        module.model, module.text, [batch], [0.5], seed=1, stride=4, chunk=2, device="cpu", packed=True
    )
    seen = []

    def watched(x, t, cond):
        seen.append((x, t, cond))
        return torch.zeros_like(x), None

    watched.takes_cameras = False
    validation.validate(watched, module.text, [batch], [0.5], seed=1, stride=4, chunk=2, device="cpu", packed=True)
    x, t, cond = seen[0]
    assert torch.equal(x[:, :, :7], batch.latents) and t[0].tolist() == [0.0] * 7 + [0.5] * 7
    with torch.no_grad():
        v = teacher_forced(module.model, batch.latents)(x[:, :, 7:], t[:, 7:], cond.frames(0, 7))[0]
    noise = (x[:, :, 7:] - 0.5 * batch.latents) / 0.5
    expected = (v - noise + batch.latents).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(found.own_NL[:, 0].float(), expected, rtol=1e-3, atol=1e-4)


def test_consistency_asks_the_guided_teacher_and_the_average_and_trains_the_student():
    teacher = {"model": _network("video"), "text": ByteTextEncoder(16, 16, 1, 2)}
    module, batch = _module(CONSISTENCY, teacher, guidance=3.0, negative="bad"), _batch()
    for p in module.ema["model"].parameters():
        torch.nn.init.normal_(p, std=0.2)  # as far from the student as from the teacher
    cond = conditioning(module.text, batch.captions, batch.cameras, batch.shot, 4, 2)
    told = module._velocities(batch, cond)
    x, t = torch.randn(2, 4, 7, 4, 4), torch.full((2, 7), 0.4)
    own = conditioning(teacher["text"], batch.captions, batch.cameras, batch.shot, 4, 2)
    negative = teacher["text"]((("bad",) * 2,) * 2)
    expected = teacher_forced(guided(teacher["model"], 3.0, negative), batch.latents)(x, t, own)[0]
    assert torch.equal(told["teacher"](x, t), expected)
    expected = teacher_forced(module.ema["model"], batch.latents)(x, t, cond)[0]
    assert torch.equal(told["average"](x, t), expected)
    module._sample_losses(batch).sum().backward()
    assert all(p.grad is not None for p in module.model.parameters())
    assert all(p.grad is None for part in (module.teacher, module.ema) for p in part["model"].parameters())
    (optimizer,) = [module.configure_optimizers()]
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == {*module.model.parameters(), *module.text.parameters()}
    assert not any("teacher" in name for name in module.weights())


@pytest.mark.parametrize(
    "objective, settings, message",
    [
        (CONSISTENCY, {}, "needs a teacher: give"),
        (FORCING, {"teacher": {"model": torch.nn.Linear(1, 1)}}, "has no teacher: leave"),
        (FORCING, {"packed": False}, "gives the past of each chunk: change one"),
        (partial(objectives.flow_matching, shift=1.0, first_frame_clean=0.0), {}, "gives no past"),
    ],
)
def test_settings_that_do_not_fit_are_refused(objective, settings, message):
    with pytest.raises(ValueError, match=message):
        _module(objective, **settings)._sample_losses(_batch())


def test_cuts_move_to_chunk_edges():
    """Chunks of 3, 2, 2: the shot of most frames, of equals the earlier; without chunks frames keep theirs."""
    shot = torch.tensor([[0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2, 2]])
    cameras = Cameras(torch.eye(4).expand(2, 25, 4, 4), torch.full((2, 25, 4), 0.5))

    def text(captions):
        return TextStates(torch.zeros(len(captions), 3, 1, 4), torch.ones(len(captions), 3, 1, dtype=torch.bool))

    captions = (("a", "b", "c"),) * 2
    snapped = conditioning(text, captions, cameras, shot, 4, 2).layout
    assert snapped.chunk.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert snapped.shot.tolist() == [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 2, 2]]
    assert conditioning(text, captions, cameras, shot, 4, None).layout.shot.equal(shot)


def test_training_reads_what_a_session_reads_of_story_and_cuts():
    """The caption of the whole before each shot's, and the marker before both in the first chunk after a cut alone."""
    text, codec = ByteTextEncoder(16, 64, 1, 2), CosineCodec(stride=[4, 8, 8], luma=[2], chroma=[0])
    shots = [{"start": 0, "end": 9, "caption": "Kim"}, {"start": 9, "end": 25, "caption": "Bo"}]
    c2w, intrinsics = np.tile(np.eye(4), (25, 1, 1)), np.full((25, 4), 0.5)
    sample = Sample(np.zeros((2, 7, 2, 2), np.float16), c2w, intrinsics, 8.0, {"shots": shots, "story": "Rain."}, "a")
    batch = collate([sample], [0])
    assert batch.captions == (("Rain. Kim", "Rain. Bo"),)
    assert collate([sample], [0], story=False).captions == (("Kim", "Bo"),)
    args = (batch.cameras, batch.shot, 4, 2)
    cond = conditioning(text, batch.captions, *args, "Cut. ")
    assert cond.prompt.tolist() == [[0, 0, 0, 3, 3, 1, 1]] and cond.layout.shot.tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    heard = []

    def model(x, t, cond, state=None, *, commit=False):
        heard.append(cond)
        return torch.zeros_like(x), ()

    model.new_state = lambda: ()
    session = Session(
        model, codec, text, sigmas=torch.tensor([1.0, 0.0]), chunk=2, fps=8.0, size_hw=(16, 16), cut_prefix="Cut. ",
        story="Rain.",
    )  # fmt: skip
    session.append("Kim", 1.0)
    session.append("Bo", 2.0, cut=True)
    assert sum(map(len, session.frames())) == 25 and len(heard) == 6
    for told in heard:
        (row,) = set(cond.prompt[0, told.layout.position].tolist())
        torch.testing.assert_close(told.text.states[0, 0], cond.text.states[0, row][cond.text.mask[0, row]])
    plain = conditioning(text, batch.captions, *args)
    assert plain.prompt is None and plain.text.mask.shape[1] == 2
    null = conditioning(text, (("", ""),), *args, "Cut. ").text
    assert null.mask.sum((0, 2)).tolist() == [1, 1, 1, 1]  # text dropout: nothing but the null token

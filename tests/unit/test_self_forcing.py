"""Self-forcing over both kinds of model: causal scores, one graph at a time, growing sequences, the judge, health."""

from types import SimpleNamespace

import pytest
import torch

from vgr.diffusion import flow
from vgr.diffusion.guidance import guided, teacher_forced
from vgr.diffusion.rollout import self_forced
from vgr.diffusion.samplers import chunk_bounds, frame_noise
from vgr.models.causal_video import CausalVideo
from vgr.models.codec import CosineCodec
from vgr.models.critic import Judge
from vgr.models.text import ByteTextEncoder
from vgr.models.world_model import WorldModel
from vgr.training import health
from vgr.training.self_forcing import SelfForcing
from vgr.types import Cameras, Conditioning, Layout, TextStates, VideoBatch

SIZES = {"in_channels": 4, "width": 32, "heads": 2, "layers": 2, "text_width": 16}
KINDS = {
    "world": (WorldModel, {**SIZES, "raw_frames": 4, "softmax_every": 2}, {}),
    "video": (CausalVideo, {**SIZES, "ffn_width": 64, "text_length": 16}, {"scores": "causal", "image": False}),
}


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _batch(frames=7):
    raw = 1 + 4 * (frames - 1)
    cameras = Cameras(torch.eye(4).repeat(2, raw, 1, 1), torch.tensor((0.5, 0.6, 0.5, 0.5)).expand(2, raw, 4))
    shot = (torch.arange(frames) > 4).long().expand(2, frames)
    captions = (("a", "b"), ("c", "d"))
    return VideoBatch(
        _normal(2, 4, frames, 4, 4), cameras, torch.full((2,), 8.0), captions, shot, ("x", "y"), torch.tensor([6, 7])
    )


def _network(kind):
    make, sizes, _ = KINDS[kind]
    model = make(**sizes)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("policy", [{}, {"window": 1, "routed": 2}, {"window": 1, "routed": 2, "per_step": True}])
@pytest.mark.parametrize("exit_step", [0, 2])
def test_exits_made_again_read_what_they_read_before(policy, exit_step):
    """Which frames a chunk remembers is chosen at noise, or anew at each step; the samples are the same bits."""
    torch.manual_seed(0)
    model = CausalVideo(**KINDS["video"][1], **policy)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    text = TextStates(_normal(2, 1, 3, 16), torch.ones(2, 1, 3).bool())
    noise, sigmas = frame_noise([1, 2], (4, 4, 4)), torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64)
    cond = Conditioning(Layout.chunked(2, 13, 2), text)
    made, exits, _ = self_forced(model, model.new_state(), cond, sigmas, noise, exit_step=exit_step)
    again = torch.cat([exit_.again(model) for exit_ in reversed(exits)][::-1], 2)
    assert len(exits) == 6 and again.requires_grad and torch.equal(again.detach(), made)


def _module(kind, sigmas=(1.0, 0.75, 0.0), judge=False, **settings):
    """Ready to step on one process, without a trainer."""
    torch.manual_seed(0)
    model, teacher, text = _network(kind), _network(kind), ByteTextEncoder(16, 16, 1, 2)
    if judge:
        state = torch.get_rng_state()
        settings |= {"judge": Judge(32, [0, 1], inner=16, heads=2), "adversarial": 0.1}
        torch.set_rng_state(state)
    parts = (model, text, CosineCodec(stride=[4, 8, 8], luma=[2], chroma=[0]), {"model": teacher, "text": text})
    settings = {"critic_steps": 2, "guidance": 2.0, "negative": "bad", **KINDS[kind][2], **settings}
    module = SelfForcing(*parts, seed=1, global_batch=2, max_samples=400, sigmas=sigmas, chunk=2, **settings)
    optimizers = module.configure_optimizers()
    module.optimizers = lambda use_pl_optimizer: optimizers
    strategy = SimpleNamespace(backward=lambda loss, *_, **__: loss.backward(), reduce=lambda v, reduce_op: v)
    module._trainer = SimpleNamespace(world_size=1, strategy=strategy)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_steps_train_critic_and_student_by_turns(kind):
    module, batch = _module(kind), _batch()
    before = [[p.clone() for p in network.parameters()] for network in (module.model, module.critic)]
    for step in (1, 2):
        module.training_step(batch, 0)
        moved = [
            any(not torch.equal(p, q) for p, q in zip(network.parameters(), old))
            for network, old in zip((module.model, module.critic), before)
        ]
        assert moved == [step == 2, True] and module.samples_seen == 2 * step
    assert {"train/student_loss", "train/critic_gap", "train/dmd_drift", "train/lr"} <= module.last_step.keys()
    assert all(torch.isfinite(torch.tensor(list(module.last_step.values()))))


def test_a_packed_score_is_the_teachers_own_stream_over_the_clean_samples():
    """Guided, with text and negative text each in a history of its own: equal to denoising from committed chunks."""
    torch.manual_seed(0)
    model = _network("video")
    x, clean, t = _normal(2, 4, 7, 4, 4), _normal(2, 4, 7, 4, 4, seed=1), torch.full((2, 7), 0.6)
    text, negative = (TextStates(_normal(2, 1, 5, 16, seed=s), torch.ones(2, 1, 5).bool()) for s in (2, 3))
    cond, teacher = Conditioning(Layout.chunked(2, 7, 2), text), guided(model, 3.0, negative)
    with torch.no_grad():
        packed, _ = teacher_forced(teacher, clean)(x, t, cond)
        state, parts = teacher.new_state(), []
        for a, b in chunk_bounds(cond.layout):
            parts.append(teacher(x[:, :, a:b], t[:, a:b], cond.frames(a, b), state)[0])
            _, state = teacher(clean[:, :, a:b], 0 * t[:, a:b], cond.frames(a, b), state, commit=True)
    torch.testing.assert_close(packed, torch.cat(parts, 2), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="neither reads nor commits"):
        teacher_forced(model, clean)(x, t, cond, model.new_state())


def test_causal_scores_judge_every_chunk_under_the_clean_samples_before():
    module = _module("video")
    segment = next(module.segments(_batch()))
    clean, t = _normal(2, 4, 7, 4, 4), torch.full((2, 7), 0.5)
    seen = []

    def network(x, t, cond, state=None, *, commit=False):
        seen.append((x, t, cond.layout))
        return x, None

    v = module._score(network, clean.requires_grad_(), 2 * clean.detach(), t, segment)
    ((x, times, layout),) = seen
    assert torch.equal(v, 2 * clean) and torch.equal(x[:, :, :7], clean) and not x.requires_grad
    assert times[0].tolist() == [0.0] * 7 + [0.5] * 7 and layout.role.tolist() == [1] * 7 + [0] * 7
    assert layout.chunk.tolist() == [0, 0, 0, 1, 1, 2, 2] * 2 and layout.shot[0].tolist() == [0] * 5 + [1, 1] + [
        0
    ] * 5 + [1, 1]


class _Held:
    """Bytes that autograd keeps, now and at most."""

    now = most = 0

    def __init__(self, x):
        self.x, self.size = x, x.numel() * x.element_size()
        _Held.now += self.size
        _Held.most = max(_Held.most, _Held.now)

    def __del__(self):
        _Held.now -= self.size


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_is_alive_at_a_time(kind):
    module = _module(kind, guidance=1.0)
    segment = next(module.segments(_batch(13)))
    loss_B, sample, exits, _ = module.student_losses(segment)
    (dx,) = torch.autograd.grad(loss_B.mean(), sample)
    most = []
    for held in (False, True):
        _Held.now = _Held.most = 0
        with torch.autograd.graph.saved_tensors_hooks(_Held, lambda held: held.x):
            if held:
                (torch.cat([exit_.again(module.model) for exit_ in exits], 2) * dx).sum().backward()
            else:
                module._replay(list(exits), dx, True)
        most.append(_Held.most)
    assert len(exits) == 6 and most[0] < 0.35 * most[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_grown_by_segments_is_one_rollout(kind):
    """With a single step there is one exit: the same frames, whether the memory was handed on twice or never."""
    whole, grown = _module(kind, (1.0, 0.0)), _module(kind, (1.0, 0.0), segment=1, overlap=2)
    batch = _batch()
    (one,) = [whole.critic_losses(s)[1] for s in [next(whole.segments(batch))]]
    segments, parts, seen = grown.segments(batch), [], []
    segment = next(segments)
    with pytest.raises(StopIteration):
        while True:
            _, sample, state, _ = grown.critic_losses(segment)
            parts.append(sample)
            seen.append(segment)
            segment = segments.send((sample, state))
    torch.testing.assert_close(torch.cat(parts, 2), one, rtol=1e-4, atol=1e-5)
    assert [s.window.layout.position.tolist() for s in seen] == [[0, 1, 2], [1, 2, 3, 4], [3, 4, 5, 6]]
    assert [s.past.shape[2] for s in seen] == [0, 2, 2] and torch.equal(seen[2].past, parts[1])
    assert [s.number for s in seen] == [0, 1, 2] and seen[2].window.layout.shot[0].tolist() == [0, 0, 1, 1]
    window = torch.cat([seen[2].past, parts[2]], 2)
    _, t, noise, made = grown._noised(window, seen[2], "critic")
    assert made.tolist() == [[False, False, True, True]] * 2 and (t[:, 0] > 0).all() == (kind == "video")
    assert not torch.equal(noise, grown._noised(window, seen[1], "critic")[2])  # each segment's own
    loss_B, sample, exits, _ = grown.student_losses(seen[2])
    assert sample.shape[2] == 2 and len(exits) == 1 and torch.autograd.grad(loss_B.sum(), sample)[0].any()


def test_a_sequence_is_one_step_of_several_updates():
    module, batch = _module("video", segment=1, overlap=2, critic_steps=3), _batch()
    taken, update = [], module._update
    module._update = lambda segment: (taken.append(module._students_turn(segment)), update(segment))
    for _ in range(2):
        module.training_step(batch, 0)
    assert taken == [False, False, True] * 2 and module.samples_seen == 4 and module.step == 2
    module.global_batch = 4
    with pytest.raises(ValueError, match="segment=1 updates within a sequence"):
        module.training_step(batch, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_moves_the_samples_and_itself_but_not_the_critic(kind):
    plain, judged = _module(kind), _module(kind, judge=True)
    segments = [next(m.segments(_batch())) for m in (plain, judged)]
    losses = [m.critic_losses(s)[0] for m, s in zip((plain, judged), segments)]
    assert (losses[1] > losses[0]).all()
    for loss_B in losses:
        loss_B.sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.critic.parameters(), judged.critic.parameters()))
    assert all(p.grad.any() for n, p in judged.judge.named_parameters() if n != "mlp.3.bias")
    # Its part of the samples' gradient: the derivative of softplus(-logit), found again by a difference.
    loss_B, sample, _, values = judged.student_losses(segments[1])
    (dx,) = torch.autograd.grad(loss_B.sum(), sample)
    other, same, *_ = plain.student_losses(segments[0])
    (dx_plain,) = torch.autograd.grad(other.sum(), same)
    assert torch.equal(sample, same)
    x, t, noise, _ = judged._noised(sample.detach(), segments[1], "student")

    def fooled(clean):
        with torch.no_grad():  # a causal score's context is not moved
            x = flow.interpolate(clean, noise, t)
            _, seen = judged._follow(sample, x, t, segments[1])
            return torch.nn.functional.softplus(-judged._logits(seen)).sum()

    assert float(values["train/adversarial_loss"]) == pytest.approx(float(fooled(sample)) / 2, rel=1e-5)
    direction = torch.nn.functional.normalize((dx - dx_plain).flatten(), dim=0).view_as(sample)
    slope = (fooled(sample + 0.01 * direction) - fooled(sample - 0.01 * direction)) / 0.02
    assert float(((dx - dx_plain) * direction).sum()) == pytest.approx(0.1 * float(slope), rel=0.05)


def test_the_judge_learns_to_tell_two_kinds_of_video_and_reads_targets_only():
    torch.manual_seed(0)
    model, judge = _network("video"), Judge(32, [1, 0], inner=16, heads=2)
    text = TextStates(_normal(8, 1, 2, 16), torch.ones(8, 1, 2).bool())
    cond, t = Conditioning(Layout.whole(8, 3), text), torch.full((8, 3), 0.3)
    seen = []
    for shift in (0.0, 1.0):
        with torch.no_grad(), judge.watch(model) as tokens:
            model(_normal(8, 4, 3, 4, 4) + shift, t, cond)
        seen.append(tokens)
    assert len(seen[0]) == 2 and not any(b._forward_hooks for b in model.blocks)
    optimizer = torch.optim.Adam(judge.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        true, made = (judge(tokens) for tokens in seen)
        (torch.nn.functional.softplus(-true) + torch.nn.functional.softplus(made)).mean().backward()
        optimizer.step()
    assert (judge(seen[0]) > 0).all() and (judge(seen[1]) < 0).all()
    packed = [torch.cat([a, b], 1) for a, b in zip(*seen)]
    torch.testing.assert_close(judge(packed, 0.5), judge(seen[1]))
    with pytest.raises(ValueError, match="the critic has 2 blocks"), Judge(32, [2]).watch(model):
        pass


def test_health_says_what_grows():
    chunk = torch.tensor([-1, 0, 0, 1, 1, 2, 2])
    sample = _normal(2, 3, 7, 8, 8)
    sample[:, :, 5:] = 3 * sample[:, :, 1:3]
    real = sample - 1
    fake = real + torch.tensor([9.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])[:, None, None]
    values = health.scores(sample, fake, real, chunk)
    expected = {"critic_gap": 0.2, "dmd_drift": 3.0, "std_drift": 3.0, "sharpness_drift": 3.0}
    assert {k.removeprefix("train/"): float(v) for k, v in values.items()} == pytest.approx(expected, rel=1e-4)
    still = health.samples(sample[:, :, :1].expand_as(sample) / 2, sample)
    assert float(still["train/motion_ratio"]) == 0 and 0.2 < float(still["train/std_ratio"]) < 0.5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"scores": "both"}, "choose bidirectional or causal"),
        ({"adversarial": 0.1}, "give both or none"),
        ({"overlap": 3}, "give chunks, latent frames"),
        ({"segment": 0}, "give chunks, latent frames"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        _module("video", **settings)

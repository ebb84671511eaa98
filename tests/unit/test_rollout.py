"""Streaming and sessions against a linear-Gaussian world whose chunk conditionals are exact, and recorded calls."""

import dataclasses
import gc
import itertools
import weakref

import numpy as np
import pytest
import torch

from tests.unit.test_world_model import _inputs, _model
from vgr.diffusion import flow, rollout, samplers, timesteps
from vgr.diffusion.guidance import guided
from vgr.geometry.cameras import group_by_latent
from vgr.geometry.trajectories import from_actions
from vgr.models.codec import CosineCodec
from vgr.types import Cameras, Conditioning, Layout, TextStates

A = 0.8  # z_k = A z_(k-1) + sqrt(1 - A^2) e_k for every pixel: variance 1, covariance A^|i-j|


def _velocity(x, t, mean_T, cov_TT):
    """v = E[noise - z | x] for z ~ N(mean, cov) over T frames (pixels alike), x = (1 - t) z + t noise."""
    t = t[0].to(x.dtype)
    share = torch.diag(1 - t)
    inside = (x - (1 - t)[:, None, None] * mean_T).movedim(2, -1)[..., None]
    weight = torch.linalg.inv(share @ cov_TT @ share + torch.diag(t**2))
    noise = (torch.diag(t) @ weight @ inside).squeeze(-1).movedim(-1, 2)
    clean = mean_T + (cov_TT @ share @ weight @ inside).squeeze(-1).movedim(-1, 2)
    return noise - clean


def _prior(count):
    i = torch.arange(count, dtype=torch.float64)
    return A ** (i[:, None] - i).abs()


@dataclasses.dataclass(frozen=True)
class Memory:
    """All that an AR(1) world needs: the last committed frame and how many there were."""

    last: torch.Tensor | None = None
    frames: int = 0
    gathered: torch.Tensor | None = None


class World:
    """With a state, the chunk given the last clean frame; without, each chunk given all frames up to its end."""

    def __init__(self):
        self.calls = []
        self.fail = False

    def new_state(self, detach=True):
        return Memory()

    def __call__(self, x, t, cond, state=None, *, commit=False):
        assert not torch.is_grad_enabled()
        self.calls.append((cond.layout.position.tolist(), t[0].tolist(), commit))
        if self.fail:
            raise RuntimeError("out of memory")
        if state is None:
            rows = [
                _velocity(x[:, :, :b], t[:, :b], torch.zeros(b, 1, 1), _prior(b))[:, :, a:]
                for a, b in samplers.chunk_bounds(cond.layout)
            ]
            return torch.cat(rows, 2), None
        assert int(cond.layout.position[0]) == state.frames and len(cond.layout.chunk.unique()) == 1
        count = x.shape[2]
        mean, cov = torch.zeros_like(x), _prior(count)
        if state.last is not None:
            fade = A ** torch.arange(1, count + 1, dtype=torch.float64)
            mean, cov = fade[:, None, None] * state.last, cov - fade[:, None] * fade
        v = _velocity(x, t, mean, cov)
        if commit:
            assert bool((t == 0).all())
            state = Memory(x[:, :, -1:].clone(), state.frames + count)
        return v, state


def _cond(frames, chunk):
    text = TextStates(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool))
    return Conditioning(Layout.chunked(1, frames, chunk), text)


def _noise(position, step, seed=0):
    return samplers.frame_noise([seed], (1, 4, 4))(position, step).double()


def _whole(made):
    return torch.cat([latents for latents, _ in made], dim=2)


FIRST = torch.linspace(-1, 1, 16, dtype=torch.float64).view(1, 1, 1, 4, 4)


@pytest.mark.parametrize("first", [None, FIRST])
@pytest.mark.parametrize(("frames", "chunk"), [(10, 3), (8, 2), (7, 1), (4, 3)])
def test_streaming_equals_the_full_sequence_form(frames, chunk, first):
    """A chunk-flow run in which each chunk waits for the one before sees clean prefixes: the same video."""
    world, cond, sigmas = World(), _cond(frames, chunk), timesteps.few_step_sigmas(4, 8.0)
    streamed = _whole(rollout.stream(world, world.new_state(), cond, sigmas, _noise, first))
    noise = _noise(cond.layout.position, 0)
    masked = samplers.chunk_flow_euler(world, noise, cond, sigmas, first, stagger=1.0)
    torch.testing.assert_close(streamed, masked, atol=1e-10, rtol=1e-10)
    assert first is None or torch.equal(streamed[:, :, :1], first)


@pytest.mark.parametrize("changes", [{}, {"window": 1, "sink": 1}])
def test_the_world_model_streams_what_it_samples_in_one_call(changes):
    model, (x, _, cond) = _model(layers=3, **changes), _inputs("orbit", 9)
    cond = dataclasses.replace(cond, layout=Layout.chunked(2, 9, 2))
    noise, sigmas = samplers.frame_noise([1, 2], (x.shape[1], *x.shape[3:])), timesteps.few_step_sigmas(4, 8.0)
    with torch.no_grad():
        streamed = _whole(rollout.stream(model, model.new_state(), cond, sigmas, noise, x[:, :, :1]))
    start = noise(cond.layout.position, 0)
    masked = samplers.chunk_flow_euler(model, start, cond, sigmas, x[:, :, :1], stagger=1.0)
    assert float((streamed - start)[:, :, 1:].abs().mean()) > 0.05
    torch.testing.assert_close(streamed, masked, atol=2e-5 * float(masked.abs().max()), rtol=0)


def test_streaming_converges_to_the_exact_flow():
    """A chunk N(m, C) flows from noise to m + C^(1/2) noise, m and C given the chunks before: first order."""
    world, cond = World(), _cond(7, 3)
    noise = _noise(cond.layout.position, 0)

    def root(cov):
        values, vectors = torch.linalg.eigh(cov)
        return vectors * values.sqrt() @ vectors.T

    exact = torch.einsum("ij,bcjhw->bcihw", root(_prior(4)), noise[:, :, :4])
    fade = A ** torch.arange(1, 4, dtype=torch.float64)
    later = torch.einsum("ij,bcjhw->bcihw", root(_prior(3) - fade[:, None] * fade), noise[:, :, 4:])
    exact = torch.cat([exact, fade[:, None, None] * exact[:, :, 3:] + later], dim=2)
    errors = []
    for steps in (100, 200):
        grid = timesteps.sigma_grid(steps, 1.0)
        made = _whole(rollout.stream(world, world.new_state(), cond, grid, _noise))
        errors.append(float((made - exact).abs().max()))
    assert 1.8 < errors[0] / errors[1] < 2.2 and errors[1] < 0.03


def test_many_streams_have_the_worlds_covariance():
    world, cond = World(), _cond(7, 3)

    def wide(position, step):
        return samplers.frame_noise([0], (1, 100, 100))(position, step).double()

    z = _whole(rollout.stream(world, world.new_state(), cond, timesteps.sigma_grid(100, 1.0), wide))
    z = z[0, 0].flatten(1)
    torch.testing.assert_close(z @ z.T / z.shape[1], _prior(7), atol=0.06, rtol=0)


def test_stream_asks_five_calls_a_chunk_and_holds_the_first_frame():
    world, cond, sigmas = World(), _cond(7, 3), timesteps.few_step_sigmas(4, 8.0)
    list(rollout.stream(world, world.new_state(), cond, sigmas, _noise, FIRST))
    levels = torch.tensor([1.0, 0.96, 0.889, 0.727]).tolist()
    expected = [([0, 1, 2, 3], [0.0, s, s, s], False) for s in levels] + [([0, 1, 2, 3], [0.0] * 4, True)]
    expected += [([4, 5, 6], [s] * 3, False) for s in levels] + [([4, 5, 6], [0.0] * 3, True)]
    assert world.calls == expected


def test_stream_keeps_nothing_but_the_state():
    world, cond = World(), _cond(25, 3)
    made = []
    for latents, state in rollout.stream(world, world.new_state(), cond, timesteps.few_step_sigmas(4, 8.0), _noise):
        made.append(weakref.ref(latents))
        assert state.last.numel() == 16
        gc.collect()
        assert [ref() is not None for ref in made] == [False] * (len(made) - 1) + [True]
    assert len(made) == 8


def test_self_forcing_rollout_renoises_and_exits_at_the_posterior_mean():
    """x0 after two calls: E[z | x] at level s of x = (1 - s) E[z] + s noise(position, 1), chunk by chunk."""
    world, cond, s = World(), _cond(7, 3), 0.625
    sigmas = torch.tensor([1.0, s, 0.2, 0.0], dtype=torch.float64)
    with torch.no_grad():
        made = _whole(rollout.stream(world, world.new_state(), cond, sigmas, _noise, renoise=True, exit_step=1))
    mean, cov, parts = torch.zeros(1, 1, 4, 4, 4, dtype=torch.float64), _prior(4), []
    fade = A ** torch.arange(1, 4, dtype=torch.float64)
    for a, b in ((0, 4), (4, 7)):
        x = (1 - s) * mean + s * _noise(torch.arange(a, b), 1)
        gain = (1 - s) * cov @ torch.linalg.inv((1 - s) ** 2 * cov + s**2 * torch.eye(b - a, dtype=torch.float64))
        parts.append(mean + torch.einsum("ij,bcjhw->bcihw", gain, x - (1 - s) * mean))
        mean, cov = fade[:, None, None] * parts[-1][:, :, -1:], _prior(3) - fade[:, None] * fade
    torch.testing.assert_close(made, torch.cat(parts, 2), atol=1e-12, rtol=1e-12)


def _held(model, cond, sigmas, noise, first, exit_step):
    """Self-forcing by hand: every chunk's exit call with its graph, all of them kept; commits are constants."""
    state, parts = model.new_state(), []
    for a, b in ((0, 3), (3, 5), (5, 7)):
        part, x = cond.frames(a, b), noise(torch.arange(a, b), 0)
        for i in range(exit_step + 1):
            t = sigmas[i].to(x.dtype).repeat(x.shape[0], b - a)
            if a == 0:
                x, t[:, 0] = torch.cat([first, x[:, :, 1:]], 2), 0.0
            with torch.set_grad_enabled(i == exit_step):
                v, state = model(x, t.float(), part, state)
                clean = x - flow.per_frame(t) * v.to(x.dtype)
            if i < exit_step:
                following = float(sigmas[i + 1])
                x = (1 - following) * clean + following * noise(torch.arange(a, b), i + 1)
        with torch.no_grad():
            _, state = model(clean.detach(), torch.zeros(x.shape[0], b - a), part, state, commit=True)
        parts.append(clean)
    return torch.cat(parts, 2)


class Tanh(torch.nn.Module):
    """A learned world in fp64 whose chunks read the last committed frame."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def new_state(self):
        return Memory(0.0)

    def forward(self, x, t, cond, state=None, *, commit=False):
        past = state.last * torch.ones_like(x) if state.gathered is None else state.gathered
        v = torch.tanh(self.weight[0] * x + self.weight[1] * past)
        after = Memory(x[:, :, -1:], state.frames + x.shape[2])
        return v, after if commit else dataclasses.replace(state, gathered=past)

    def lean(self, state):
        return dataclasses.replace(state, gathered=None)


@pytest.mark.parametrize("kind", ["fp64", "world model"])
@pytest.mark.parametrize("exit_step", [0, 2])
def test_exits_made_again_one_by_one_have_the_gradient_of_all_graphs_held(exit_step, kind):
    """The replay of self-forcing, also in a model with every kind of memory: same samples to the bit, same gradient."""
    model, (x, _, cond) = _model(layers=3), _inputs("orbit", 7)
    cond, noise = dataclasses.replace(cond, layout=Layout.chunked(2, 7, 2)), samplers.frame_noise([1, 2], (4, 3, 4))
    sigmas, fp32_noise = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64), noise
    if kind == "fp64":
        model, x, noise = Tanh(), x.double(), lambda *args: fp32_noise(*args).double()
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    held = _held(model, cond, sigmas, noise, x[:, :, :1], exit_step)
    (held - target).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    args = (model.new_state(), cond, sigmas, noise, x[:, :, :1])
    made, exits, state = rollout.self_forced(model, *args, exit_step=exit_step)
    assert not made.requires_grad and state.frames == 7 and [e.state.frames for e in exits] == [0, 3, 5]
    assert all(getattr(e.state, "gathered", None) is None for e in exits)  # N gathered pasts would outweigh a graph
    torch.testing.assert_close(made, held.detach(), rtol=1e-5, atol=1e-5)
    made.requires_grad_()
    (dx,) = torch.autograd.grad((made - target).square().sum(), made)
    while exits:
        b = exits[-1].state.frames + exits[-1].x.shape[2]
        clean, a = exits[-1].again(model), exits.pop().state.frames
        assert torch.equal(clean, made[:, :, a:b])
        clean.backward(dx[:, :, a:b])
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        tolerance = 1e-6 if grad.dtype == torch.float64 else 1e-4
        assert float((grad - expected[name]).norm()) <= tolerance * float(expected[name].norm()) + 1e-12, name


def test_stream_refuses_a_first_frame_in_the_middle():
    world, cond = World(), _cond(7, 3).frames(4, 7)
    with pytest.raises(ValueError, match="cond starts at frame 4"):
        next(rollout.stream(world, Memory(None, 4), cond, torch.linspace(1, 0, 3), _noise, FIRST))
    assert not world.calls


# Sessions.

STRIDE, SIZE, FPS = 4, (8, 16), 8.0


class Text:
    """Prompts to their length, and what was asked."""

    width = 1

    def __init__(self):
        self.asked = []

    def __call__(self, captions):
        self.asked.append(captions[0][0])
        return TextStates(torch.full((1, 1, 1, 1), float(len(captions[0][0]))), torch.ones(1, 1, 1, dtype=torch.bool))


class Listener(World):
    """A world that notes the prompt and the cameras of each chunk it commits."""

    def __init__(self):
        super().__init__()
        self.heard, self.cameras = [], []

    def __call__(self, x, t, cond, state=None, *, commit=False):
        v, state = super().__call__(x.double(), t, cond, state, commit=commit)
        if commit:
            self.heard.append(float(cond.text.states))
            self.cameras.append(cond.cameras)
        return v, state


def _session(world=None, text=None, **kwargs):
    settings = {"sigmas": timesteps.few_step_sigmas(4, 8.0), "chunk": 2, "fps": FPS, "size_hw": SIZE, **kwargs}
    world, text = world or Listener(), text or Text()
    return rollout.Session(world, CosineCodec((STRIDE, 8, 8), (2, 1, 1), (1, 1, 1)), text, **settings)


def _path(frames):
    c2w = torch.as_tensor(np.asarray(from_actions(f"wl-{frames - 1}", "sana-wm-2")), dtype=torch.float32)[None]
    k = torch.tensor([0.8, 1.2, 0.5, 0.5]) + 0.01 * torch.arange(frames)[:, None]
    turn = torch.tensor([[0.0, 0, 1, 3], [0, 1, 0, 2], [-1, 0, 0, 1], [0, 0, 0, 1]])
    return Cameras(turn @ c2w, k[None])


def test_session_gives_the_video_of_the_pieces_whenever_they_are_appended():
    """One append, three appends, and appends while reading: the same bytes as decoding the whole stream."""
    whole, pieces, live = _session(), _session(), _session()
    whole.append("a", 6.0)
    for seconds in (1.0, 3.0, 2.0):
        pieces.append("a", seconds)
    one, three = list(whole.frames()), list(pieces.frames())
    assert [len(p) for p in one] == [9, 8, 8, 8, 8, 8] and one[0].shape == (9, *SIZE, 3)
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(one, three)) and one[0].dtype == torch.uint8
    live.append("a", 1.0)
    read = []
    for piece in live.frames():
        read.append(piece)
        if len(read) < 6:
            live.append("a", 1.0)
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(one, read))
    assert list(live.frames()) == []

    codec, noise = whole.codec, samplers.frame_noise([0], (whole.codec.channels, 1, 2))
    latents = _whole(rollout.stream(World(), Memory(), _cond(13, 2), whole.sigmas, lambda p, i: noise(p, i).double()))
    video = codec.decode(latents.float())[0].permute(1, 2, 3, 0)
    expected = ((video.clamp(-1, 1) + 1) * 127.5).round().byte()
    assert (torch.cat(one).int() - expected.int()).abs().max() <= 1
    other = _session(seed=1)
    other.append("a", 1.0)
    assert not torch.equal(next(other.frames()), one[0])


def test_session_changes_prompts_at_chunks_and_marks_cuts():
    world, text = Listener(), Text()
    session = _session(world, text, cut_prefix="CUT ")
    session.append("abc", 2.0)
    session.append("abcde", 2.0, cut=True)
    session.append("a", 1.0, cut=False)
    assert world.calls == []
    list(session.frames())
    assert world.heard == [3, 3, 9, 5, 1] and text.asked == ["abc", "abcde", "CUT abcde", "a"]
    positions = [p for p, _, commit in world.calls if commit]
    assert positions == [[0, 1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]


def test_session_cameras_are_those_of_the_whole_path():
    """Grouped piece by piece, relative to the session's first frame: as `group_by_latent` of the whole path."""
    path = _path(41)
    world = Listener()
    session = _session(world, group_cameras=group_by_latent)
    at = 0
    for seconds in (2.0, 1.0, 2.0):
        frames = session.frames_in(seconds)
        session.append("a", seconds, camera=path.frames(at, at + frames))
        at += frames
    assert at == 41
    list(session.frames())
    whole = group_by_latent(path, STRIDE)
    for field in dataclasses.fields(whole):
        given = torch.cat([getattr(c, field.name) for c in world.cameras], dim=1)
        torch.testing.assert_close(given, getattr(whole, field.name), atol=1e-6, rtol=0)


def test_session_starts_from_the_given_image():
    image = torch.randint(0, 256, (*SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    session = _session(first_frame=image)
    session.append("a", 2.0)
    shown = next(session.frames())[0]
    codec = session.codec
    video = image.permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    kept = codec.decode(codec.encode(video))[0, :, 0].permute(1, 2, 0)
    assert (shown.int() - ((kept.clamp(-1, 1) + 1) * 127.5).round().int()).abs().max() <= 1
    times = [t for p, t, _ in session.denoiser.calls if p[0] == 0]
    assert len(times) == 5 and all(t[0] == 0 for t in times)
    list(session.frames())
    assert all(0 not in t for p, t, commit in session.denoiser.calls if p[0] > 0 and not commit)


def test_session_goes_on_after_a_failed_chunk():
    session, calm = _session(), _session()
    for s in (session, calm):
        s.append("a", 3.0)
    read = [next(session.frames())]
    session.denoiser.fail = True
    with pytest.raises(RuntimeError):
        next(session.frames())
    session.denoiser.fail = False
    read += session.frames()
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(read, calm.frames()))


def test_session_takes_a_guided_denoiser():
    world = Listener()
    session = _session(guided(world, 2.0, Text()((("",),))))
    session.append("abc", 2.0)
    assert sum(len(p) for p in session.frames()) == 17 and world.heard == [3, 0, 3, 0]


def test_session_refuses_by_name_and_changes_nothing():
    world = Listener()
    session = _session(world)
    for seconds, nearest in ((1.4, "1"), (1.6, "2"), (0.2, "1"), (-3.0, "1"), (float("nan"), "1"), (float("inf"), "1")):
        with pytest.raises(
            ValueError, match=rf"chunks of 8 frames \(1 s\); the nearest that fits is seconds={nearest}$"
        ):
            session.append("a", seconds)
    with pytest.raises(ValueError, match="cut_prefix is None"):
        session.append("a", 1.0, cut=True)
    with pytest.raises(ValueError, match="takes no camera"):
        session.append("a", 1.0, camera=_path(9))
    with pytest.raises(ValueError, match="nothing to cut from"):
        _session(cut_prefix="").append("a", 1.0, cut=True)
    filmed = _session(group_cameras=group_by_latent)
    with pytest.raises(ValueError, match="camera=None: this model needs the cameras of the 17 frames"):
        filmed.append("a", 2.0)
    with pytest.raises(ValueError, match=r"c2w \(1,9,4,4\)"):
        filmed.append("a", 1.0, camera=_path(17))
    assert list(session.frames()) == list(filmed.frames()) == []
    assert session.frames_in(1.0) == 9 and session.frames_in(1.06) == 9
    session.append("a", 1.0)
    assert session.frames_in(1.0) == 8


def test_session_refuses_parts_and_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"euler has no new_state\(\)"):
        _session(samplers.euler)
    with pytest.raises(ValueError, match=r"multiples of the codec's stride \(8, 8\)"):
        _session(size_hw=(8, 12))
    with pytest.raises(ValueError, match=r"first_frame must be \(8, 16, 3\) uint8"):
        _session(first_frame=torch.zeros(8, 16, 3))
    for bad in ({"chunk": 0}, {"fps": 0.0}, {"fps": float("nan")}):
        with pytest.raises(ValueError, match="chunk >= 1 latent frame and fps > 0"):
            _session(**bad)

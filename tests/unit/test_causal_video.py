"""One set of weights, four forms: packed teacher forcing is the cached rollout, chunk by chunk, for every memory."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from vgr.models.causal_video import CausalVideo
from vgr.nn.rope import rope_table, rotate
from vgr.types import Conditioning, Layout, TextStates

FRAMES, CHUNK, HEIGHT, WIDTH = 22, 3, 4, 6
POLICIES = {
    "full": {},
    "window": {"window": 2},
    "window, absolute": {"window": 2, "relative": False},
    "sink": {"window": 2, "sink": 2},
    "sink, absolute": {"window": 2, "sink": 2, "relative": False},
    "shot sink": {"window": 1, "sink": 1, "shot_sink": 2},
    "routed": {"window": 2, "routed": 3},
    "routed, sink": {"window": 1, "sink": 1, "routed": 2},
    "routed, one layer": {"window": 1, "routed": 3, "route_layer": 1},
    "routed, absolute": {"window": 1, "routed": 2, "relative": False},
    "own chunk only": {"window": 0},
}


def random_model(layers=3, **policy):
    torch.manual_seed(0)
    model = CausalVideo(4, width=36, heads=3, layers=layers, ffn_width=50, text_width=10, text_length=9, **policy)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=0.0 if p.dim() > 1 else 0.4, std=0.25)
    return model


def story(batch=2, frames=FRAMES, shots=((3, 4), (2, 6))):
    """Conditioning of frames in chunks, whose shots change at chunk edges, differently in each sample."""
    layout = Layout.chunked(batch, frames, CHUNK)
    shot = torch.stack([sum((layout.chunk >= c).long() for c in row) for row in shots[:batch]])
    texts = torch.randn(batch, 3, 7, 10)
    mask = torch.arange(7) < torch.tensor([7, 4, 5])[:, None]
    return Conditioning(dataclasses.replace(layout, shot=shot), TextStates(texts, mask.expand(batch, 3, 7)))


def cached(model, x, noisy, t, cond, state=None, steps=1, past_t=None):
    """Denoise and commit chunk by chunk: velocities of both passes."""
    state = model.new_state() if state is None else state
    denoised, committed = [], []
    for chunk in cond.layout.chunk.unique().tolist():
        a, b = (cond.layout.chunk == chunk).nonzero()[[0, -1], 0].tolist()
        part = cond.frames(a, b + 1)
        for _ in range(steps):
            v, state = model(noisy[:, :, a : b + 1], t[:, a : b + 1], part, state)
        denoised.append(v)
        still = torch.zeros_like(t) if past_t is None else past_t
        v, state = model(x[:, :, a : b + 1], still[:, a : b + 1], part, state, commit=True)
        committed.append(v)
    return torch.cat(denoised, 2), torch.cat(committed, 2), state


def close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.fixture
def clips():
    return make_clips()


def make_clips():
    torch.manual_seed(1)
    x, noise = torch.randn(2, 2, 4, FRAMES, HEIGHT, WIDTH)
    cond = story()
    times = torch.rand(2, int(cond.layout.chunk.max()) + 1)[:, cond.layout.chunk]
    return x, noise, times, cond


@pytest.mark.parametrize("name", POLICIES)
def test_packed_chunk_equals_cached_chunk(clips, name):
    x, noisy, t, cond = clips
    model = random_model(**POLICIES[name])
    with torch.no_grad():
        packed, _ = model(torch.cat([x, noisy], 2), torch.cat([0 * t, t], 1), cond.packed())
        denoised, committed, _ = cached(model, x, noisy, t, cond)
        twice, *_ = cached(model, x, noisy, t, cond, steps=2)
    close(packed[:, :, FRAMES:], denoised)
    close(packed[:, :, :FRAMES], committed)
    close(twice, denoised)  # what a chunk has gathered serves its later steps


@pytest.mark.parametrize("name", ["full", "routed"])
def test_a_noisy_past_and_marked_cuts_too(clips, name):
    """The context has noise that the model is told (3.4), and a shot's first chunk reads a text of its own (8.2)."""
    x, noisy, t, cond = clips
    model, past_t = random_model(**POLICIES[name]), 0.1 * torch.rand(2, 1).expand(2, FRAMES)
    context = x + past_t[:, None, :, None, None] * torch.randn_like(x)
    first = F.pad(cond.layout.shot.diff() != 0, (1, 0)).long()
    first = sum(first.roll(i, 1) for i in range(CHUNK))
    texts = TextStates(torch.cat([cond.text.states, cond.text.states + 1], 1), torch.cat([cond.text.mask] * 2, 1))
    marked = dataclasses.replace(cond, text=texts, prompt=cond.layout.shot + 3 * first)
    with torch.no_grad():
        packed, _ = model(torch.cat([context, noisy], 2), torch.cat([past_t, t], 1), marked.packed())
        denoised, committed, _ = cached(model, context, noisy, t, marked, past_t=past_t)
        plain, *_ = cached(model, context, noisy, t, cond, past_t=past_t)
        clean, *_ = cached(model, context, noisy, t, marked)
    close(packed[:, :, FRAMES:], denoised)
    close(packed[:, :, :FRAMES], committed)
    assert (plain - denoised).abs().max() > 1e-3 and (clean - denoised).abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n in POLICIES if "routed" not in n])
def test_prefill_in_one_call_equals_chunk_by_chunk(clips, name):
    x, noisy, t, cond = clips
    model = random_model(**POLICIES[name])
    with torch.no_grad():
        _, committed, _ = cached(model, x, noisy, t, cond)
        whole, state = model(x, 0 * t, cond, model.new_state(), commit=True)
        _, _, other = cached(model, x, noisy, t, cond)
    close(whole, committed)
    assert [b.frames for b in state.blocks] == [b.frames for b in other.blocks]
    for ours, theirs in zip(state.blocks, other.blocks):
        for a, b in zip(ours.layers, theirs.layers):
            close(a.k, b.k)
            close(a.v, b.v)


def test_memory_is_what_the_policy_says(clips):
    x, noisy, t, cond = clips
    kept = {}
    for name, policy in POLICIES.items():
        with torch.no_grad():
            state = cached(random_model(layers=1, **policy), x, noisy, t, cond)[2]
        kept[name] = [f.position for block in state.blocks for f in block.frames]
    assert kept["full"] == kept["routed"] == list(range(FRAMES))
    assert kept["window"] == list(range(16, 22)) and kept["own chunk only"] == []
    assert kept["sink"] == [0, 1, 2, 3, *range(16, 22)]  # whole blocks
    # The last shots begin at chunk 4 (frame 13) and at chunk 6 (19), which is the window's too.
    assert kept["shot sink"] == [0, 1, 2, 3, 13, 14, 15, 19, 20, 21]


def test_few_old_frames_make_routing_full_attention(clips):
    x, noisy, t, cond = clips
    with torch.no_grad():
        full, routed, short = (
            cached(random_model(**p), x, noisy, t, cond)[0]
            for p in ({}, {"window": 2, "routed": FRAMES}, {"window": 2, "routed": 3})
        )
    close(routed, full)
    assert (short - full).abs().max() > 1e-3  # and it is not when there are more


def test_a_planted_key_is_found():
    """The frame whose keys look like a chunk's queries is read, however old, and only then changes the output."""
    model = random_model(window=1, routed=1)
    cond = story(1, 40, shots=((50, 60),))
    x = torch.randn(1, 4, 40, HEIGHT, WIDTH)
    with torch.no_grad():
        _, _, state = cached(model, x[:, :, :37], x[:, :, :37], torch.ones(1, 37), cond.frames(0, 37))
        part, t = cond.frames(37, 40), torch.ones(1, 3)
        _, after = model(x[:, :, 37:], t, part, state)
        queries = _mean_queries(model, x[:, :, 37:], t, part, state)
        for layer, old in ((0, 5), (1, 20), (2, 11)):
            block, inside = next(
                (i, [f.position for f in b.frames].index(old))
                for i, b in enumerate(state.blocks)
                if old in [f.position for f in b.frames]
            )
            layers = list(state.blocks[block].layers)
            mean = layers[layer].mean.clone()
            mean[:, inside] = 100 * queries[layer]
            layers[layer] = dataclasses.replace(layers[layer], mean=mean)
            blocks = list(state.blocks)
            blocks[block] = dataclasses.replace(blocks[block], layers=tuple(layers))
            v, planted = model(x[:, :, 37:], t, part, dataclasses.replace(state, blocks=tuple(blocks)))
            assert planted.choices[(layer, part.layout.chunk[0].item())].tolist() == [[old]]
            for frame, read in ((inside, True), (inside - 1, False)):  # what is chosen is what is read
                values = layers[layer].v.clone()
                values[:, frame] += 1.0
                layers_ = [*layers[:layer], dataclasses.replace(layers[layer], v=values), *layers[layer + 1 :]]
                blocks[block] = dataclasses.replace(blocks[block], layers=tuple(layers_))
                other, _ = model(x[:, :, 37:], t, part, dataclasses.replace(state, blocks=tuple(blocks)))
                assert torch.equal(other, v) != read
    assert set(after.choices) == {(layer, 12) for layer in range(3)}


def _mean_queries(model, x, t, part, state):
    found = []
    hooks = [
        block.attn.qkv.register_forward_hook(lambda m, i, out, a=block.attn: found.append(
            a.q_norm(out.chunk(3, -1)[0]).unflatten(-1, (a.heads, -1)).mean((1, 2))
        ))
        for block in model.blocks
    ]  # fmt: skip
    model(x, t, part, state)
    for hook in hooks:
        hook.remove()
    return found


def test_positions_stay_in_the_trained_span():
    """A thousand chunks: no chunk reads more than 5 + 9 + 3 frames, and positions count what is read, not time."""
    model = random_model(layers=1, window=3, routed=5)
    frames = 3001
    text = TextStates(torch.randn(1, 1, 4, 10), torch.ones(1, 1, 4, dtype=torch.bool))
    cond = Conditioning(Layout.chunked(1, frames, CHUNK), text)
    x = torch.randn(1, 4, 4, 2, 2)
    state, spans = model.new_state(), set()
    model.blocks[0].attn.register_forward_pre_hook(lambda m, args: spans.add(args[1].table.shape[0]))
    with torch.no_grad():
        for chunk in range(1000):
            a, b = (0, 4) if chunk == 0 else (1 + 3 * chunk, 4 + 3 * chunk)
            _, state = model(x[:, :, : b - a], torch.zeros(1, b - a), cond.frames(a, b), state, commit=True)
    assert state.frames == frames and max(spans) == 17


@pytest.mark.parametrize("name", ["window", "sink", "routed", "sink, absolute"])
def test_a_rollout_past_1024_frames_goes_on_as_it_began(name):
    """Under one picture again and again every chunk is the same once memory is full, at 17 times the trained 61 frames.

    Not with absolute positions, where the sink lies ever farther back.
    """
    model, chunks = random_model(layers=2, **POLICIES[name]), 346
    text = TextStates(torch.randn(1, 1, 4, 10), torch.ones(1, 1, 4, dtype=torch.bool))
    cond = Conditioning(Layout.chunked(1, 1 + CHUNK * chunks, CHUNK), text)
    x, state, made = torch.randn(1, 4, 1, 2, 4).expand(1, 4, 4, 2, 4), model.new_state(), []
    with torch.no_grad():
        for chunk in range(chunks):
            a, b = (0, 4) if chunk == 0 else (1 + 3 * chunk, 4 + 3 * chunk)
            v, state = model(x[:, :, : b - a], torch.zeros(1, b - a), cond.frames(a, b), state, commit=True)
            made.append(v)
    assert state.frames == 1039
    same = [(v - made[20]).abs().max() <= 1e-4 * made[20].abs().max() for v in made[21:]]
    assert all(same) if "absolute" not in name else not any(same[-40:])


def test_against_the_masked_reference(clips):
    """One layer by hand: softmax over an explicit mask, for a window with a sink at absolute positions."""
    x, noisy, t, cond = clips
    model = random_model(window=2, sink=2, relative=False)
    attn = model.blocks[0].attn
    tokens = torch.randn(2, 2 * FRAMES, 6, 36)
    layout = cond.layout.packed()
    seen = {}
    model.blocks[0].attn.register_forward_hook(lambda m, i, out: seen.update(x=i[0], out=out[0]))
    with torch.no_grad():
        model(torch.cat([x, noisy], 2), torch.cat([0 * t, t], 1), cond.packed())
        tokens = seen["x"]
        q, k, v = attn.qkv(tokens).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (3, 12)) for y in (attn.q_norm(q), attn.k_norm(k), v))
        table = rope_table(layout.position, 2, 3, 12)
        q, k = rotate(q, table), rotate(k, table)
        own, role, position = layout.chunk, layout.role, layout.position
        older = (role == 1)[None] & (own[None] < own[:, None])
        near = (own[None] >= own[:, None] - 2) | (position < 2)[None]
        allowed = (older & near) | ((own[None] == own[:, None]) & (role[None] == role[:, None]))
        mask = allowed.repeat_interleave(6, 0).repeat_interleave(6, 1)
        q, k, v = (y.flatten(1, 2).transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        expected = attn.proj(out.reshape(tokens.shape))
    close(seen["out"], expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_packed_equal_a_live_cache(clips, checkpointing):
    x, noisy, t, cond = clips
    model = random_model(window=1, routed=2)
    model.activation_checkpointing = checkpointing
    packed, _ = model(torch.cat([x, noisy], 2), torch.cat([0 * t, t], 1), cond.packed())
    grads = torch.autograd.grad(packed[:, :, FRAMES:].square().sum(), list(model.parameters()))
    live, *_ = cached(model, x, noisy, t, cond, model.new_state(detach=False))
    expected = torch.autograd.grad(live.square().sum(), list(model.parameters()))
    for ours, theirs in zip(grads, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_host_memory_gives_the_same(clips):
    x, noisy, t, cond = clips
    models = [random_model(window=1, routed=2, place=place) for place in ("device", "pinned")]
    with torch.no_grad():
        here, there = (cached(model, x, noisy, t, cond)[0] for model in models)
    assert torch.equal(here, there)


@pytest.mark.parametrize("name", [*POLICIES, "routed, per step"])
def test_history_made_again_gives_the_same(clips, name):
    """Also in a call with a graph, whose gradient stops at the past as with kept keys and values."""
    x, noisy, t, cond = clips
    policy = POLICIES.get(name) or ({"window": 1, "routed": 2, "per_step": True} if "step" in name else {})
    outputs, grads = [], []
    for place in ("device", "recomputed"):
        model = random_model(**policy, place=place)
        with torch.no_grad():
            denoised, committed, _ = cached(model, x, noisy, t, cond, steps=2)
            *_, state = cached(model, x[:, :, :16], noisy[:, :, :16], t[:, :16], cond.frames(0, 16))
        outputs.append((denoised, committed))
        part = cond.frames(16, 19)
        _, scratch = model(noisy[:, :, 16:19], t[:, 16:19], part, state)
        live, _ = model(noisy[:, :, 16:19], t[:, 16:19], part, model.lean(scratch))
        grads.append(torch.autograd.grad(live.square().sum(), list(model.parameters())))
    for ours, theirs in zip(outputs[1], outputs[0]):
        close(ours, theirs)
    for ours, theirs in zip(grads[1], grads[0]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_history_made_again_has_each_prompt_of_a_session(clips):
    """Chunks told one by one, each by a text of its own, and a given clip committed in one call before them."""
    x, noisy, t, cond = clips
    outputs = []
    for place in ("device", "recomputed"):
        model, parts = random_model(window=1, routed=2, place=place), []
        with torch.no_grad():
            _, state = model(x[:, :, :10], 0 * t[:, :10], cond.frames(0, 10), model.new_state(), commit=True)
            for i, a in enumerate(range(10, 22, 3)):
                text = TextStates(cond.text.states[:, :1] + i, cond.text.mask[:, :1])
                part = dataclasses.replace(cond.frames(a, a + 3), text=text)
                v, state = model(noisy[:, :, a : a + 3], t[:, a : a + 3], part, state)
                _, state = model(x[:, :, a : a + 3], 0 * t[:, a : a + 3], part, state, commit=True)
                parts.append(v)
        outputs.append(torch.cat(parts, 2))
    close(*outputs)


def test_texts_of_other_shots_do_not_leak(clips):
    x, noisy, t, cond = clips
    model = random_model()
    states = cond.text.states.clone()
    states[:, 2] += 1.0
    with torch.no_grad():
        before, _ = model(x, t, cond)
        after, _ = model(x, t, dataclasses.replace(cond, text=TextStates(states, cond.text.mask)))
    changed = (before != after).any(4).any(3).any(1)
    first = [int((row == 2).nonzero()[0]) for row in cond.layout.shot]
    assert [int(row.nonzero()[0]) for row in changed] == first
    with torch.no_grad():  # a single text is every shot's
        one = TextStates(states[:, :1], cond.text.mask[:, :1])
        thrice = TextStates(one.states.expand(-1, 3, -1, -1), one.mask.expand(-1, 3, -1))
        a, b = (model(x, t, dataclasses.replace(cond, text=text))[0] for text in (one, thrice))
    close(a, b, 1e-6)


BAD = {
    "window=null": {"routed": 3},
    "model.place=disk": {"place": "disk"},
    "shot_sink does not go": {"window": 1, "shot_sink": 1, "routed": 1},
    "must be an even number": {"heads": 5},
    "model.attention_backend=dense: choose torch or flex": {"attention_backend": "dense"},
}


@pytest.mark.parametrize("message", BAD)
def test_settings_that_do_not_go_together(message):
    with pytest.raises(ValueError, match=message):
        CausalVideo(4, **{"width": 36, "heads": 3, "layers": 1, **BAD[message]})


def test_calls_that_do_not_fit(clips):
    x, noisy, t, cond = clips
    model = random_model()
    two_texts = TextStates(cond.text.states[:, :2], cond.text.mask[:, :2])
    for message, args, kwargs in (
        ("takes x", (x[:, :3], t, cond), {}),
        ("must hold the 22", (x, t, cond.frames(0, 4)), {}),
        ("commit=True needs a state", (x, t, cond), {"commit": True}),
        ("holds one whole chunk", (x, t, cond, model.new_state()), {}),
        ("starts at frame 4", (x[:, :, 4:7], t[:, 4:7], cond.frames(4, 7), model.new_state()), {}),
        ("its own context", (torch.cat([x, x], 2), torch.cat([t, t], 1), cond.packed(), model.new_state()), {}),
        ("names shot 2", (x, t, dataclasses.replace(cond, text=two_texts)), {}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model(*args, **kwargs)


def test_memory_is_told_before_a_run():
    """Figures of spec 4.4 at 480x832: 14B holds 21.7 GB active and 155 GB of 30 s, an eighth of it on 8 ranks."""
    sizes = {"14B": {"width": 5120, "heads": 40, "layers": 40, "ffn_width": 13824}, "1.3B": {}}
    with torch.device("meta"):
        models = {k: CausalVideo(**size, window=3, routed=5) for k, size in sizes.items()}
    plan = {k: model.memory_plan(121, (30, 52), 3) for k, model in models.items()}
    assert [plan[k]["history"] for k in sizes] == pytest.approx([155, 34.8], rel=0.01)
    # 17 frames in the spec; the chunk of four may stand in the window.
    assert plan["14B"]["read"] == pytest.approx(21.7 * 18 / 17, rel=0.01)
    assert models["14B"].memory_plan(121, (30, 52), 3, ranks=8)["history"] == pytest.approx(19.3, rel=0.01)
    with pytest.raises(ValueError, match="12 heads and 1560 cells a frame cannot be split over 16 context ranks, 12"):
        models["1.3B"].memory_plan(121, (30, 52), 3, ranks=16)
    # Eight ranks hold one or two of twelve heads: the fullest has a sixth.
    assert models["1.3B"].memory_plan(121, (30, 52), 3, ranks=8)["history"] == pytest.approx(34.8 / 6, rel=0.01)
    assert plan["14B"]["means"] == pytest.approx(121 * 0.82e-3, rel=0.01)
    with torch.device("meta"):
        models = {k: CausalVideo(**size, window=3, routed=5, place="recomputed") for k, size in sizes.items()}
    again = {k: model.memory_plan(241, (30, 52), 3) for k, model in models.items()}
    # Of a forward of spec 8.4 (2.16e14 and 3.5e13 FLOP for 17 frames) as many as chunks have left the window.
    assert [again[k]["again_chunks"] for k in sizes] == [77, 77]
    assert [again[k]["again_pflop"] / 77e-15 for k in sizes] == pytest.approx([2.2e14, 3.6e13], rel=0.03)
    assert again["14B"]["history"] == pytest.approx(10 * 1.28, rel=0.01)  # the window, beside latents of 46 MB
    assert again["14B"]["again"] == pytest.approx(231 * 1560 * 5120 * 8e-9)  # tokens, and keys and values of one layer


@pytest.mark.parametrize("place", ["device", "recomputed"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_plan_is_what_a_state_holds(clips, name, place):
    x, noisy, t, _ = clips
    model = random_model(**POLICIES[name], place=place)
    with torch.no_grad():
        *_, state = cached(model, x[:1], noisy[:1], t[:1], story(1))
    held = sum(y.nbytes for block in state.blocks for kv in block.layers for y in (kv.k, kv.v)) / 1e9
    held += sum(block.made.x.nbytes for block in state.blocks if not block.layers) / 1e9
    assert all(bool(block.layers) or place == "recomputed" for block in state.blocks)
    plan = model.memory_plan(FRAMES, (HEIGHT // 2, WIDTH // 2), CHUNK, bytes_per_number=4)
    assert held <= plan["history"] * 1.001 and held >= 0.5 * plan["history"]

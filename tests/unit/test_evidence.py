"""Evidence of the chunk at work: packed calls and cached ones agree, nothing that is committed knows of it."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.float64 import Float64, wide  # noqa: F401
from tests.unit.test_causal_video import CHUNK, FRAMES, HEIGHT, POLICIES, WIDTH, cached, close, make_clips, random_model
from vgr.diffusion.guidance import guided, teacher_forced
from vgr.diffusion.rollout import Session, stream
from vgr.diffusion.samplers import chunk_bounds, few_step, frame_noise
from vgr.models.causal_video import CausalVideo
from vgr.models.codec import CosineCodec
from vgr.models.warp_adapter import evidence_block, select_tokens, with_evidence
from vgr.nn import lora
from vgr.nn.rope import rope_table, rotate
from vgr.types import Conditioning, HistoryBlock, Layout, TextStates

EMPTY, UNEVEN = 2, 4  # chunks of which nothing is kept: in both samples, in the first
ROUTED = ["routed", "routed, sink", "routed, one layer", "routed, absolute"]


def make_evidence(cond, seed=5):
    """Of all frames, half of their tokens kept."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, FRAMES, HEIGHT, WIDTH, generator=generator)
    keep = torch.rand(2, FRAMES, HEIGHT // 2, WIDTH // 2, generator=generator) < 0.5
    keep[:, cond.layout.chunk == EMPTY] = False
    keep[0, cond.layout.chunk == UNEVEN] = False
    return HistoryBlock(latents, torch.arange(FRAMES), "short", keep)


def of_frames(block, a, b):
    keep = None if block.keep is None else block.keep[:, a:b]
    return HistoryBlock(block.latents[:, :, a:b], block.position[a:b], block.tier, keep)


def showing(cond, *blocks):
    return dataclasses.replace(cond, history=blocks)


def rolled(model, x, noisy, t, cond, block, state=None, steps=1, committing=True):
    """`cached`, each chunk with its evidence, in commits too if `committing`; and the state after each chunk."""
    state, denoised, committed, states = model.new_state() if state is None else state, [], [], []
    for a, b in chunk_bounds(cond.layout):
        part = cond.frames(a, b)
        told = showing(part, of_frames(block, a, b))
        for _ in range(steps):
            v, state = model(noisy[:, :, a:b], t[:, a:b], told, state)
        denoised.append(v)
        v, state = model(x[:, :, a:b], 0 * t[:, a:b], told if committing else part, state, commit=True)
        committed.append(v)
        states.append(state)
    return torch.cat(denoised, 2), torch.cat(committed, 2), states


def packed(model, x, noisy, t, cond, *blocks):
    return model(torch.cat([x, noisy], 2), torch.cat([0 * t, t], 1), showing(cond, *blocks).packed())[0]


@pytest.fixture
def clips():
    x, noisy, t, cond = make_clips()
    return x, noisy, t, cond, make_evidence(cond)


def _both_forms(clips, name):
    x, noisy, t, cond, block = clips
    model = random_model(**POLICIES[name])
    with torch.no_grad():
        whole = packed(model, x, noisy, t, cond, block)
        denoised, committed, _ = rolled(model, x, noisy, t, cond, block)
        base = packed(model, x, noisy, t, cond)
    return whole, denoised, committed, base


@pytest.mark.parametrize("name", POLICIES)
def test_packed_chunk_equals_cached_chunk(clips, name):
    whole, denoised, committed, base = _both_forms(clips, name)
    # One of the processors tried leaves 1.4e-6 in fp32; the test below holds 1e-12 in float64.
    close(whole[:, :, FRAMES:], denoised, 2e-6)
    close(whole[:, :, :FRAMES], committed, 1e-6)
    told, plain = whole[:, :, FRAMES:], base[:, :, FRAMES:]
    layout, cond = clips[3].layout, clips[3]
    assert torch.equal(whole[:, :, :FRAMES], base[:, :, :FRAMES])  # the past does not know of evidence
    assert torch.equal(told[:, :, layout.chunk == EMPTY], plain[:, :, layout.chunk == EMPTY])
    assert torch.equal(told[0, :, layout.chunk == UNEVEN], plain[0, :, cond.layout.chunk == UNEVEN])
    changed = (told - plain).abs().amax((1, 3, 4)) > 1e-3
    shown = clips[4].keep.flatten(2).any(2)
    chunks = torch.stack([shown[:, layout.chunk == c].any(1) for c in layout.chunk], 1)
    assert torch.equal(changed, chunks)


@pytest.mark.parametrize("name", POLICIES)
def test_and_in_float64_it_is_no_matter_of_rounding(wide, name):  # noqa: F811
    x, noisy, t, cond = make_clips()
    with Float64():
        whole, denoised, committed, _ = _both_forms((x, noisy, t, cond, make_evidence(cond)), name)
    assert whole.dtype == torch.float64
    close(whole[:, :, FRAMES:], denoised, 1e-12)
    close(whole[:, :, :FRAMES], committed, 1e-12)


@pytest.mark.parametrize("place", ["device", "recomputed"])
@pytest.mark.parametrize("name", POLICIES)
def test_what_is_committed_does_not_depend_on_evidence(clips, name, place):
    x, noisy, t, cond, block = clips
    model = random_model(**POLICIES[name], place=place)
    with torch.no_grad():
        _, committed, states = rolled(model, x, noisy, t, cond, block)
        _, plain, state = cached(model, x, noisy, t, cond)
    assert torch.equal(committed, plain)
    for ours, theirs in zip(states[-1].blocks, state.blocks, strict=True):
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            assert torch.equal(a.k, b.k) and torch.equal(a.v, b.v)
            assert a.mean is None or torch.equal(a.mean, b.mean)
        assert ours.made is None or ours.made.cond.history == ()
        if ours.made is not None:
            assert all(torch.equal(ours.made.choices[key], c) for key, c in theirs.made.choices.items())
    assert states[-1].told is None


@pytest.mark.parametrize("name", ["full", "sink", "routed"])
def test_nothing_kept_is_the_base_bit_for_bit(clips, name):
    x, noisy, t, cond, block = clips
    model, none = random_model(**POLICIES[name]), dataclasses.replace(block, keep=torch.zeros_like(block.keep))
    with torch.no_grad():
        assert torch.equal(packed(model, x, noisy, t, cond, none), packed(model, x, noisy, t, cond))
        told = rolled(model, x, noisy, t, cond, none, steps=2)[0]
        assert torch.equal(told, cached(model, x, noisy, t, cond, steps=2)[0])


def test_what_lies_under_dropped_tokens_changes_no_bit(clips):
    x, noisy, t, cond, block = clips
    model = random_model(window=1, sink=2)
    dropped = ~block.keep.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None]
    other = dataclasses.replace(block, latents=block.latents.masked_fill(dropped, float("nan")))
    with torch.no_grad():
        assert torch.equal(packed(model, x, noisy, t, cond, other), packed(model, x, noisy, t, cond, block))
        ours, theirs = (rolled(model, x, noisy, t, cond, e)[0] for e in (other, block))
    assert torch.equal(ours, theirs)


def test_blocks_may_come_in_any_order_and_cut(clips):
    x, noisy, t, cond, block = clips
    model = random_model(window=2, routed=3)
    with torch.no_grad():
        whole = packed(model, x, noisy, t, cond, block)
        cut = packed(model, x, noisy, t, cond, of_frames(block, 9, FRAMES), of_frames(block, 0, 9))
        close(cut, whole, 1e-6)
        full = dataclasses.replace(block, keep=torch.ones_like(block.keep))
        all_kept = dataclasses.replace(block, keep=None)
        assert torch.equal(*(packed(model, x, noisy, t, cond, e) for e in (full, all_kept)))


@pytest.mark.parametrize("name", POLICIES)
def test_keys_of_evidence_are_those_of_the_clean_frame_it_shows(clips, name):
    """In the first layer and at time 0: also the position, which counts what a chunk reads."""
    x, noisy, t, cond, _ = clips
    model, block = random_model(**POLICIES[name]), HistoryBlock(x, torch.arange(FRAMES))
    policy, state = model.policy, model.new_state()
    with torch.no_grad():
        for a, b in chunk_bounds(cond.layout):
            part = cond.frames(a, b)
            _, state = model(noisy[:, :, a:b], t[:, a:b], showing(part, of_frames(block, a, b)), state)
            keys, values = (y.view(2, b - a, 6, 3, 12) for y in state.told.layers[0])
            read, valid = state.gathered[0][0].shape[1], state.gathered[0][2]
            _, state = model(x[:, :, a:b], 0 * t[:, a:b], part, state, commit=True)
            if policy.window != 0:
                own = state.blocks[-1].layers[0]
                for row in range(2):
                    start = read if valid is None else int(valid[row].sum())
                    table = rope_table(torch.arange(start, start + b - a), 2, 3, 12)
                    k = own.k[row : row + 1]
                    close(keys[row : row + 1], k if policy.rotates_once else rotate(k, table), 1e-6)
                close(values, own.v, 1e-6)


def test_against_the_table_of_the_specification(clips):
    """One layer by hand, under the mask of spec 8.3 over committed, noisy and evidence tokens."""
    x, noisy, t, cond, block = clips
    model, seen = random_model(window=2, sink=2, relative=False), {}
    attn = model.blocks[0].attn
    attn.register_forward_hook(lambda m, i, out: seen.update(x=i[0], e=i[5], out=out[0], said=out[3]))
    with torch.no_grad():
        packed(model, x, noisy, t, cond, block)
        layout, sample = cond.layout.packed(), 1
        order = [(f, s) for c in cond.layout.chunk.unique() for f in (cond.layout.chunk == c).nonzero()[:, 0].tolist()
                 for s in block.keep[sample, f].flatten().nonzero()[:, 0].tolist()]  # fmt: skip
        shown, first = torch.tensor(order), []
        for c in cond.layout.chunk.unique():  # the row holds a chunk's samples one after the other
            inside = cond.layout.chunk == c
            before = int(block.keep[:, cond.layout.chunk < c].sum()) + int(block.keep[0, inside].sum())
            first += list(range(before, before + int(block.keep[1, inside].sum())))
        tokens = torch.cat([seen["x"][sample].flatten(0, 1), seen["e"][0, 0, first]])
        table = torch.cat([rope_table(layout.position, 2, 3, 12).flatten(0, 1),
                           rope_table(torch.arange(FRAMES), 2, 3, 12)[shown[:, 0], shown[:, 1]]])  # fmt: skip
        chunk = torch.cat([layout.chunk.repeat_interleave(6), cond.layout.chunk[shown[:, 0]]])
        position = torch.cat([layout.position.repeat_interleave(6), shown[:, 0]])
        role = torch.cat([layout.role.repeat_interleave(6), torch.full_like(shown[:, 0], 2)])  # X 0, C 1, E 2
        older = (role == 1) & (chunk < chunk[:, None]) & ((chunk >= chunk[:, None] - 2) | (position < 2))
        same = (chunk == chunk[:, None]) & ((role == role[:, None]) | ((role[:, None] == 0) & (role == 2)))
        q, k, v = attn.qkv(tokens).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (3, 12)) for y in (attn.q_norm(q), attn.k_norm(k), v))
        q, k = (rotate(y[None, None], table)[0, 0] for y in (q, k))
        out = F.scaled_dot_product_attention(*(y.transpose(0, 1) for y in (q, k, v)), attn_mask=older | same)
        expected = attn.proj(out.transpose(0, 1).flatten(1))
    close(seen["out"][sample].flatten(0, 1), expected[: 12 * FRAMES], 1e-6)
    close(seen["said"][0, 0, first], expected[12 * FRAMES :], 1e-6)


@pytest.mark.parametrize("policy", [{"window": 1}, {"window": 1, "routed": 2}, {"place": "recomputed"}], ids=str)
def test_evidence_is_computed_once_a_chunk(clips, policy):
    x, noisy, t, cond, block = clips
    model, lengths = random_model(layers=2, **policy), []
    with torch.no_grad():
        *_, states = rolled(model, x[:, :, :13], noisy[:, :, :13], t[:, :13], cond.frames(0, 13), block)
        part = showing(cond.frames(16, 19), of_frames(block, 16, 19))
        _, _, state = cached(model, x[:, :, :16], noisy[:, :, :16], t[:, :16], cond.frames(0, 16))
        model.blocks[1].attn.qkv.register_forward_hook(lambda m, i, out: lengths.append(i[0].shape[2]))
        kept, outputs = int(block.keep[:, 16:19].sum()), []
        for step in range(3):
            lengths.clear()
            v, state = model(noisy[:, :, 16:19] + step, t[:, 16:19], part, state)
            assert lengths.count(kept) == (step == 0)
            again, _ = model(noisy[:, :, 16:19] + step, t[:, 16:19], part, model.lean(state))
            outputs.append(v)
            assert torch.equal(again, v) and model.lean(state).told is None
        assert not torch.equal(outputs[0], outputs[1])
        lengths.clear()
        other = dataclasses.replace(
            part.history[0], latents=part.history[0].latents + 1
        )  # another warp: not the old one
        v, _ = model(noisy[:, :, 16:19] + 2, t[:, 16:19], showing(part, other), state)
        assert kept in lengths and not torch.equal(v, outputs[2])
        lengths.clear()
        base, state = model(noisy[:, :, 16:19], t[:, 16:19], cond.frames(16, 19), state)
        _, state = model(x[:, :, 16:19], 0 * t[:, 16:19], part, state, commit=True)
        assert kept not in lengths and state.told is None
    with torch.enable_grad():  # what was made without a graph does not serve a call with one
        lengths.clear()
        _, _, state = cached(model, x[:, :, :16], noisy[:, :, :16], t[:, :16], cond.frames(0, 16))
        with torch.no_grad():
            v, state = model(noisy[:, :, 16:19], t[:, 16:19], part, state)
        lengths.clear()
        live, _ = model(noisy[:, :, 16:19], t[:, 16:19], part, state)
        assert kept in lengths and live.requires_grad and torch.equal(live.detach(), v)


def test_routing_chooses_as_without_evidence_in_each_step_too(clips):
    x, noisy, t, cond, block = clips
    model = random_model(window=1, routed=2, per_step=True)
    with torch.no_grad():
        _, _, state = cached(model, x[:, :, :16], noisy[:, :, :16], t[:, :16], cond.frames(0, 16))
        part = cond.frames(16, 19)
        for step in range(2):
            z = noisy[:, :, 16:19] + step
            _, told = model(z, t[:, 16:19], showing(part, of_frames(block, 16, 19)), state)
            _, base = model(z, t[:, 16:19], part, state)
            assert told.choices.keys() == base.choices.keys() and len(base.choices) == 3
            assert all(torch.equal(told.choices[key], base.choices[key]) for key in base.choices)
            state = told


@pytest.mark.parametrize("name", ["full", "shot sink", "routed"])
def test_gradients(clips, name):
    """Of a packed call, of one that recomputes its blocks, and of a live cache, to weights and to the warp itself."""
    x, noisy, t, cond, block = clips
    model, found = random_model(**POLICIES[name]), []
    latents = block.latents.requires_grad_()
    for form in ("packed", "checkpointed", "cached"):
        model.activation_checkpointing = form == "checkpointed"
        if form == "cached":
            out = rolled(model, x, noisy, t, cond, block, model.new_state(detach=False))[0]
        else:
            out = packed(model, x, noisy, t, cond, block)[:, :, FRAMES:]
        found.append(torch.autograd.grad(out.square().sum(), [*model.parameters(), latents]))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1]))
    for ours, theirs in zip(found[0], found[2]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    dropped = ~block.keep.repeat_interleave(2, 2).repeat_interleave(2, 3)
    alive = found[0][-1].abs().amax(1) > 0
    assert not (alive & dropped).any() and bool(alive[~dropped].all())


def test_the_choice_without_a_graph_leaves_no_weights_without_one(clips):
    """Autocast keeps its copies of weights for as long as it lasts, also those made without a graph."""
    x, noisy, t, cond, block = clips
    model = random_model(window=1, routed=2)
    with torch.autocast("cpu", torch.bfloat16):
        packed(model, x, noisy, t, cond, block).float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.blocks.parameters())


def test_adapters_work_on_evidence(clips):
    x, noisy, t, cond, block = clips
    model = random_model(window=1)
    before = packed(model, x, noisy, t, cond, block)
    lora.add(model, 4, 4.0, ["attn.qkv", "attn.proj"])
    assert torch.equal(packed(model, x, noisy, t, cond, block), before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    out = [packed(model, x, noisy, t, cond, *told)[:, :, FRAMES:].square().sum() for told in ((block,), ())]
    ours, base = (torch.autograd.grad(o, list(trained.values())) for o in out)
    for name, a, b in zip(trained, ours, base):
        assert (bool(a.any()) and not torch.equal(a, b)) == ("lora_B" in name)
    qkv, lengths = model.blocks[0].attn.qkv, []
    qkv.lora_A.register_forward_hook(lambda m, i, out: lengths.append(i[0].shape[2]))
    packed(model, x, noisy, t, cond, block)
    assert lengths == [6, int(block.keep.sum())]


def test_guidance_shows_it_to_both(clips):
    x, noisy, t, cond, block = clips
    model, negative = random_model(window=1, routed=2), TextStates(torch.randn(2, 1, 3, 10), torch.ones(2, 1, 3).bool())
    both = guided(model, 3.0, negative)
    away = dataclasses.replace(cond, text=negative)
    away = dataclasses.replace(away, prompt=torch.zeros_like(cond.layout.shot))
    with torch.no_grad():
        v, *_ = rolled(both, x, noisy, t, cond, block, steps=2)
        own, other = (rolled(model, x, noisy, t, c, block)[0] for c in (cond, away))
        close(v, other + 3.0 * (own - other), 1e-6)
        part = showing(cond.frames(0, 4), of_frames(block, 0, 4))
        _, states = both(noisy[:, :, :4], t[:, :4], part, both.new_state())
        assert all(state.told is not None for state in states)
        forced, _ = teacher_forced(both, x)(noisy, t, showing(cond, block))
        # Packed and streamed differ by 1e-6 of each branch, of which guidance takes three times one and two the other.
        assert (forced - v).abs().max() <= 1e-6 * (3 * own.abs().max() + 2 * other.abs().max())


def test_evidence_is_for_noisy_steps(clips):
    x, noisy, _, cond, block = clips
    model, part, one = random_model(window=1), cond.frames(0, 4), of_frames(block, 0, 4)
    gated = with_evidence(model, (one,))
    assert gated.new_state == model.new_state and gated.lean == model.lean and gated.takes_history
    told = []
    model.register_forward_pre_hook(lambda m, args: told.append(args[2].history))
    with torch.no_grad():
        state = gated.new_state()
        for t, shown in ((1.0, True), (0.74, True), (0.7399, False), (0.0, False)):
            times = torch.tensor([0.0, t, t, t]).expand(2, 4)  # a given first frame
            v, after = gated(noisy[:, :, :4], times, part, state)
            assert told.pop() == ((one,) if shown else ())
            expected, _ = model(noisy[:, :, :4], times, showing(part, one) if shown else part, state)
            assert torch.equal(v, expected)
            state = after
        gated(x[:, :, :4], torch.zeros(2, 4), part, state, commit=True)
        assert told.pop() == ()
        # Each sample's chunk has a time of its own in training, and the past stands at 0.
        times = torch.where(cond.layout.chunk % 2 == torch.tensor([[0], [1]]), 0.9, 0.5)
        v, _ = teacher_forced(with_evidence(model, (block,)), x)(noisy, times, cond)
        keep = block.keep & (times > 0.6)[:, :, None, None]
        assert torch.equal(told.pop()[0].keep, keep)
        assert torch.equal(
            v, packed(model, x, noisy, times, cond, dataclasses.replace(block, keep=keep))[:, :, FRAMES:]
        )
        with pytest.raises(ValueError, match="need evidence whose `keep`"):
            teacher_forced(with_evidence(model, (dataclasses.replace(block, keep=None),)), x)(noisy, times, cond)
    with pytest.raises(ValueError, match="SimpleNamespace does not read cond.history"):
        with_evidence(SimpleNamespace(), (one,))


def test_a_stream_of_gated_steps(clips):
    """Few steps of which the first have evidence: the sampler's chunks are the same calls by hand."""
    *_, cond, block = clips
    model, noise = random_model(window=1, routed=2), frame_noise([1, 2], (4, HEIGHT, WIDTH))
    sigmas, seen = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.0], dtype=torch.float64), []
    model.register_forward_hook(lambda m, args, out: seen.append((float(args[1].max()), args[2].history)))
    part = showing(cond.frames(0, 4), of_frames(block, 0, 4))
    latents, _ = few_step(with_evidence(model), noise, part, sigmas, model.new_state())
    assert [bool(history) for _, history in seen] == [True, True, False, False]
    made, _ = next(stream(with_evidence(model), model.new_state(), part, sigmas, noise))
    assert torch.equal(latents, made) and seen[-1] == (0.0, ())


BAD = {
    "shows frames": lambda b: HistoryBlock(b.latents[:, :, :4], torch.arange(4) + 1, "short", b.keep[:, :4]),
    "tier mid": lambda b: dataclasses.replace(of_frames(b, 0, 4), tier="mid"),
    "takes latents .2, 4, 4, 4, 6.": lambda b: dataclasses.replace(of_frames(b, 0, 4), latents=b.latents),
    "keep, if any, bool": lambda b: dataclasses.replace(of_frames(b, 0, 4), keep=b.keep[:, :4].float()),
}


@pytest.mark.parametrize("message", BAD)
def test_evidence_that_does_not_fit_is_refused(clips, message):
    x, noisy, t, cond, block = clips
    model, part = random_model(), cond.frames(0, 4)
    with pytest.raises(ValueError, match=message):
        model(noisy[:, :, :4], t[:, :4], showing(part, BAD[message](block)), model.new_state())


def test_calls_that_take_no_evidence(clips):
    x, noisy, t, cond, block = clips
    with pytest.raises(ValueError, match="would reach later chunks"):
        random_model()(noisy, t, showing(cond, block))
    with pytest.raises(ValueError, match="use model.attention_backend=torch"):
        packed(random_model(attention_backend="flex"), x, noisy, t, cond, block)
    shard = SimpleNamespace(rank=0, size=1, frames=lambda total, rank=None: (0, total))
    with pytest.raises(ValueError, match="use one context rank"):
        told = showing(cond.frames(0, 4), of_frames(block, 0, 4))
        random_model()(noisy[:, :, :4], t[:, :4], told, random_model().new_state(), shard=shard)
    whole = dataclasses.replace(cond, layout=dataclasses.replace(cond.layout, chunk=0 * cond.layout.chunk))
    with torch.no_grad():  # one chunk without a state is a call like any
        model = random_model()
        v, _ = model(noisy, t, showing(whole, block))
        close(v, model(noisy, t, showing(whole, block), model.new_state())[0], 1e-6)


def test_tokens_by_visibility():
    """Columns of a growing width: the share of a token is the share of its pixels."""
    visible = torch.zeros(1, 9, 32, 64, dtype=torch.bool)
    for frame in range(9):
        visible[:, frame, :, : 8 * frame] = True  # frame 4 sees 32 of 64 columns, frame 8 all
    keep = select_tokens(visible, (4, 8, 8), (1, 2, 2))
    assert keep.shape == (1, 3, 2, 4)
    assert keep.sum((0, 2, 3)).tolist() == [0, 4, 8]  # frames 0, 4 and 8, whatever lies between
    counts = [int(select_tokens(visible, (4, 8, 8), (1, 2, 2), x).sum()) for x in (0.0, 0.1, 0.5, 1.0, 1.01)]
    assert counts == [24, 12, 12, 12, 0]
    generator = torch.Generator().manual_seed(0)
    for rule in ("area", "center"):
        noise = torch.rand(2, 5, 48, 80, generator=generator)
        kept = [select_tokens(noise, (4, 8, 8), (1, 2, 2), x, rule) for x in torch.linspace(0, 1, 21).tolist()]
        assert all(bool((b <= a).all()) for a, b in zip(kept, kept[1:])) and kept[0].all() and not kept[-1].any()
    quarter = torch.zeros(1, 1, 16, 16)
    quarter[..., :8, :8] = 1.0  # exactly a quarter of the token
    assert select_tokens(quarter, (4, 8, 8), (1, 2, 2), 0.25).all()
    assert not select_tokens(quarter, (4, 8, 8), (1, 2, 2), 0.2501).any()
    specks = torch.zeros(1, 1, 16, 16)
    specks[..., 3:5, 3:5] = 1.0  # the centre of one latent of four: 4 of 256 pixels, which bilinear takes for a quarter
    assert [bool(select_tokens(specks, (4, 8, 8), (1, 2, 2), 0.1, rule).all()) for rule in ("area", "center")] == [
        False,
        True,
    ]
    assert bool(select_tokens(specks, (4, 8, 8), (1, 2, 2), 4 / 256, "area").all())
    sizes = {(1, 2, 2): 960, (2, 4, 4): 240, (4, 8, 8): 60}  # of 48x80 latents, spec 11.6
    assert {p: select_tokens(torch.ones(1, 1, 384, 640), (4, 8, 8), p).numel() for p in sizes} == sizes
    edge = torch.zeros(1, 1, 24, 16)
    edge[..., 16:, :] = 1.0  # the last row of latents stands for the one that is missing
    assert select_tokens(edge, (4, 8, 8), (1, 2, 2), 1.0)[0, 0, :, 0].tolist() == [False, True]
    with pytest.raises(ValueError, match="by rule centre"):
        select_tokens(edge, (4, 8, 8), (1, 2, 2), 0.1, "centre")
    with pytest.raises(ValueError, match="of 3 frames"):
        select_tokens(torch.ones(1, 3, 16, 16), (4, 8, 8), (1, 2, 2))


def test_noise_on_evidence_is_a_function_of_seed_and_position():
    latents, visible = torch.full((2, 16, 3, 32, 32), 2.0), torch.ones(2, 9, 64, 64)
    block = evidence_block(latents, visible, torch.tensor([7, 8, 9]), [1, 2], stride=(4, 2, 2))
    assert block.tier == "short" and block.keep.all() and block.keep.shape == (2, 3, 16, 16)
    mean, std = block.latents.mean((1, 3, 4)), block.latents.std((1, 3, 4))
    sigma = 1 - mean / 2
    assert bool((std > 0.109).all() and (std < 0.138).all()) and float((sigma - std).abs().max()) < 4e-3
    assert len({round(float(s), 3) for s in std.flatten()}) > 3
    alone = evidence_block(latents[1:, :, :2], visible[1:, :5], torch.tensor([8, 9]), [2], stride=(4, 2, 2))
    assert torch.equal(alone.latents[0], block.latents[1, :, 1:]) and bool((latents == 2).all())
    assert not torch.equal(block.latents[0], block.latents[1])
    with pytest.raises(ValueError, match="need 9 raw frames"):
        evidence_block(latents, visible[:, :5], torch.arange(3), [1, 2], stride=(4, 2, 2))


def _words(captions):
    return TextStates(torch.ones(1, 1, 2, 10), torch.ones(1, 1, 2, dtype=torch.bool))


def test_a_session_asks_for_each_chunk_as_it_is_made():
    codec, asked, calls = CosineCodec((4, 8, 8), (2, 1, 1), (1, 1, 1)), [], []
    torch.manual_seed(0)
    model = CausalVideo(
        codec.channels, width=36, heads=3, layers=1, ffn_width=50, text_width=10, text_length=9, window=1
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.register_forward_hook(lambda m, args, out: calls.append(args[2].history))
    settings = {"sigmas": torch.tensor([1.0, 0.5, 0.0]), "chunk": 2, "fps": 8.0, "size_hw": (16, 32)}

    def evidence(cond, before):
        asked.append((cond.layout.position.tolist(), before))
        latents = torch.randn(1, codec.channels, len(cond.layout.position), 2, 4)
        return (HistoryBlock(latents, cond.layout.position),)

    image = torch.randint(0, 256, (16, 32, 3), dtype=torch.uint8)
    for first in (image, None):
        asked.clear()
        session = Session(model, codec, _words, first_frame=first, evidence=evidence, **settings)
        session.append("a", 2.0)
        pieces = list(session.frames())
        assert [positions for positions, _ in asked] == [[0, 1, 2], [3, 4]]
        assert (asked[0][1] is None) if first is None else torch.equal(asked[0][1], first[None])
        assert torch.equal(asked[1][1], pieces[0])
        assert [len(history) for history in calls[-3:]] == [1, 1, 1]
    plain = Session(model, codec, _words, first_frame=image, **settings)
    plain.append("a", 2.0)
    assert not torch.equal(next(plain.frames()), pieces[0])
    calls.clear()
    session = Session(with_evidence(model), codec, _words, evidence=evidence, **settings)
    session.append("a", 1.0)
    list(session.frames())
    assert [len(history) for history in calls] == [1, 0, 0]  # the noisy step, the other, the commit
    with pytest.raises(ValueError, match="evidence is given, but call does not read cond.history; leave it out"):
        deaf = guided(model, 2.0, _words(None))
        deaf.takes_history = False
        Session(deaf, codec, _words, evidence=evidence, **settings)


def test_the_path_carries_signal():
    """A tiny model on one clip, whose noisy frames tell little: shown them it is right sooner (spec 11.13)."""
    generator = torch.Generator().manual_seed(0)
    phase = torch.rand(4, 1, 1, 1, generator=generator) * 6.3
    clip = torch.sin(phase + 0.7 * torch.arange(1.0, 5.0).view(4, 1, 1, 1) * torch.arange(64.0).view(1, 64, 1, 1))
    clip = (clip + 0.1 * torch.randn(4, 64, 4, 4, generator=generator)).expand(-1, -1, 4, 4)
    text, losses = TextStates(torch.zeros(8, 1, 1, 10), torch.ones(8, 1, 1, dtype=torch.bool)), {}
    for told in (True, False):
        torch.manual_seed(0)
        model = CausalVideo(4, width=36, heads=3, layers=2, ffn_width=72, text_width=10, text_length=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator, seen = torch.Generator().manual_seed(1), []
        for _ in range(120):
            starts = torch.randint(0, 62, (8,), generator=generator)
            x = torch.stack([clip[:, s : s + 3] for s in starts.tolist()])
            noise = torch.randn(x.shape, generator=generator)
            t = (0.74 + 0.26 * torch.rand(8, 1, generator=generator)).expand(8, 3)
            z = x + t[:, None, :, None, None] * (noise - x)
            cond = Conditioning(Layout.chunked(8, 3, CHUNK), text)
            block = HistoryBlock(x, torch.arange(3), keep=torch.rand(8, 3, 2, 2, generator=generator) < 0.7)
            loss = (model(z, t, showing(cond, block) if told else cond)[0] - (noise - x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(float(loss.detach()))
        losses[told] = sum(seen[-20:]) / 20
    assert losses[True] < 0.7 * losses[False], losses

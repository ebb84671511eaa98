"""The refiner's network on tiny random LTX-2 models in the real file format, against diffusers' own forward pass."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import LTX2VideoTransformer3DModel

from tests.unit.tiny_refiner import CELLS, FPS, GRID, inputs, refiner, save_transformer
from vgr.models.refiner import Refiner
from vgr.types import Layout, TextStates


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refiner")
    save_transformer(folder)
    return folder


@pytest.fixture(scope="module")
def original(folder):
    return LTX2VideoTransformer3DModel.from_pretrained(folder / "transformer").eval()


def _tokens(x):
    return x.permute(0, 2, 3, 4, 1).flatten(1, 3)


def _diffusers(original, x, t, cond, audio=0.0, **more):
    """diffusers' forward on the same arguments, its audio half fed `audio`, modalities apart."""
    batch, _, frames, *grid = x.shape
    states, mask = cond.text.states[:, 0], cond.text.mask[:, 0]
    with torch.no_grad():
        out = original(
            hidden_states=_tokens(x), audio_hidden_states=torch.full((batch, 4, 3), audio),
            encoder_hidden_states=states, audio_encoder_hidden_states=states + audio,
            timestep=1000 * t.repeat_interleave(math.prod(grid), 1), audio_timestep=torch.full((batch,), 100 * audio),
            encoder_attention_mask=mask.long(), audio_encoder_attention_mask=mask.long(), num_frames=frames,
            height=grid[0], width=grid[1], fps=FPS, audio_num_frames=4, isolate_modalities=True, return_dict=False,
            **more,
        )[0]  # fmt: skip
    return out.unflatten(1, (-1, *grid)).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("audio", [0.0, 3.0])
def test_one_chunk_is_diffusers_forward_whatever_the_audio(folder, original, audio):
    x, t, cond = inputs(5)
    with torch.no_grad():
        v, state = refiner(folder, fps=FPS, sink=0, window=3)(x, t, cond)
    assert state is None and v.dtype == torch.float32
    expected = _diffusers(original, x, t, cond, audio)
    torch.testing.assert_close(v, expected, atol=2e-6, rtol=1e-5)


def test_sink_and_blocks_are_diffusers_forward_under_a_mask(folder, original):
    """While the window drops nothing the sink stands where it was: diffusers' own masked attention is the reference."""
    x, t, cond = inputs(9)
    for block in (8, 3):
        layout = Layout.chunked(2, 9, block)
        chunk = torch.where(layout.position == 0, -1, layout.chunk).repeat_interleave(CELLS)
        mask = (chunk[:, None] >= chunk).float().expand(2, -1, -1)
        with torch.no_grad():
            v, _ = refiner(folder, fps=FPS)(x, t, dataclasses.replace(cond, layout=layout))
        expected = _diffusers(original, x, t, cond, video_self_attention_mask=mask)
        torch.testing.assert_close(v, expected, atol=1e-5, rtol=1e-4)


def _with_moved_sinks(original, x, t, cond, layout, window):
    """diffusers' forward with a copy of the sink for each later chunk, just in front of what it remembers."""
    frames, chunk = x.shape[2], [0, *(layout.chunk[1:] + 1).tolist()]  # 0: the sink
    position, owner = list(range(frames)), [None] * frames
    for c in range(2, chunk[-1] + 1):
        position.append(max(0, chunk.index(c) - window))
        owner.append(c)
    sinks = len(position) - frames
    x, t = torch.cat([x, x[:, :, :1].repeat(1, 1, sinks, 1, 1)], 2), torch.cat([t, t[:, :1].repeat(1, sinks)], 1)
    chunk += [None] * sinks

    def reads(i, j):
        if owner[i] is not None or owner[j] is not None:
            return i == j or (owner[j] is not None and owner[j] == chunk[i])
        if chunk[j] == 0:
            return chunk[i] < 2
        start = chunk.index(chunk[i])
        return j >= start - (window - 1) and chunk[j] <= chunk[i]

    mask = torch.tensor([[reads(i, j) for j in range(len(position))] for i in range(len(position))]).float()
    mask = mask.repeat_interleave(CELLS, 0).repeat_interleave(CELLS, 1).expand(len(x), -1, -1)
    coords = original.rope.prepare_video_coords(len(x), max(position) + 1, *GRID, x.device, fps=FPS)
    coords = coords.unflatten(2, (-1, CELLS))[:, :, position].flatten(2, 3)
    return _diffusers(original, x, t, cond, video_self_attention_mask=mask, video_coords=coords)[:, :, :frames]


def _streamed_equals(model, masked, x, t, cond):
    """Chunk by chunk, asked and then committed, against one masked call; the last state."""
    state, a = model.new_state(), 0
    for size in cond.layout.chunk.bincount().tolist():
        part = (x[:, :, a : a + size], t[:, a : a + size], cond.frames(a, a + size))
        asked, same = model(*part, state)
        assert same is state
        v, state = model(*part, state, commit=True)
        assert torch.equal(asked, v)
        torch.testing.assert_close(v, masked[:, :, a : a + size], atol=1e-5, rtol=1e-4)
        a += size
    return state


@pytest.mark.parametrize("rope", ["split", "interleaved"])
@pytest.mark.parametrize("window,block,frames", [(11, 3, 22), (5, 3, 13), (4, 2, 8), (1, 3, 7)])
@torch.no_grad()
def test_streaming_masked_and_moved_sinks_are_one_function(folder, rope, window, block, frames, tmp_path):
    """Blocks cut by the window among them: 11 frames are the sink, three blocks and one frame of a fourth."""
    original = LTX2VideoTransformer3DModel.from_pretrained(folder / "transformer", rope_type=rope).eval()
    original.save_pretrained(tmp_path / "transformer")
    model = refiner(tmp_path, fps=FPS, window=window)
    x, t, cond = inputs(frames)
    cond = dataclasses.replace(cond, layout=Layout.chunked(2, frames, block))
    masked, _ = model(x, t, cond)
    expected = _with_moved_sinks(original, x, t, cond, cond.layout, window)
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=1e-4)
    state = _streamed_equals(model, masked, x, t, cond)
    memory = state.blocks[-1].k
    assert memory.shape[1] == min(frames - 1, window - 1) * CELLS
    assert memory.untyped_storage().nbytes() == memory.nbytes  # nothing else is kept alive


@pytest.mark.parametrize("sink,window,reach", [(0, 4, 9), (0, 0, 3), (2, 5, 11), (3, None, 11)])
@torch.no_grad()
def test_streaming_equals_masked_without_and_with_longer_sinks(folder, sink, window, reach):
    """reach: frames that frame 0 can reach in two blocks; chunks begin at 3, 5, 7, 9."""
    model = refiner(folder, sink=sink, window=window)
    x, t, cond = inputs(11)
    cond = dataclasses.replace(cond, layout=Layout.chunked(2, 11, 2))
    masked, _ = model(x, t, cond)
    _streamed_equals(model, masked, x, t, cond)
    x[:, :, 0] += 1.0
    changed = (model(x, t, cond)[0] - masked).abs().amax((0, 1, 3, 4)) > 0
    assert changed.tolist() == [True] * reach + [False] * (11 - reach)


def test_frames_of_one_cell_are_diffusers_to_the_bit(folder, original):
    """With as many times as tokens even the time embedding is computed alike."""
    x, t, cond = inputs(6, grid=(1, 1))
    with torch.no_grad():
        v, _ = refiner(folder, fps=FPS, sink=0)(x, t, cond)
    assert torch.equal(v, _diffusers(original, x, t, cond))


def test_fps_and_sigma_of_each_frame_are_told(folder):
    x, t, cond = inputs(4)
    with torch.no_grad():
        v, _ = refiner(folder, fps=16.0)(x, t, cond)
        faster, _ = refiner(folder, fps=24.0)(x, t, cond)
        t[:, 2] = 0.0
        other, _ = refiner(folder, fps=16.0)(x, t, cond)
    assert (v - faster).abs().max() > 1e-4 and (v - other).abs().max() > 1e-4


def test_half_precision_weights_keep_the_function(folder):
    x, t, cond = inputs(8)
    cond = dataclasses.replace(cond, layout=Layout.chunked(2, 8, 3))
    half = Refiner.from_pretrained(folder, window=5).eval()
    with torch.no_grad():
        v, expected = (model(x, t, cond)[0] for model in (half, refiner(folder, window=5)))
    assert half.transformer.proj_in.weight.dtype == torch.bfloat16 and v.dtype == torch.float32
    assert (v - expected).square().mean() < 1e-3 * expected.square().mean()


def test_recomputed_blocks_have_the_same_gradient(folder):
    x, t, cond = inputs(4)
    cond = dataclasses.replace(cond, layout=Layout.chunked(2, 4, 1))
    gradients = []
    for again in (False, True):
        model = refiner(folder, activation_checkpointing=again).train()
        model(x, t, cond)[0].square().sum().backward()
        gradients.append(model.transformer.transformer_blocks[0].attn1.to_k.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda x, t, c: (x[0], t, c), r"x \(B,4,T,H,W\)"),
        (lambda x, t, c: (x[:, :3], t, c), r"x \(B,4,T,H,W\).*got \(2, 3,"),
        (lambda x, t, c: (x, t[:, :2], c), r"t \(B,T\)"),
        (lambda x, t, c: (x, t, dataclasses.replace(c, layout=Layout.whole(2, 5).frames(1, 5))), "positions"),
        (lambda x, t, c: (x, t, dataclasses.replace(c, text=TextStates(torch.zeros(2, 2, 5, 10), None))), "one prompt"),
        (lambda x, t, c: (x, t, dataclasses.replace(c, text=TextStates(torch.zeros(2, 1, 5, 9), None))), "LTX2Text"),
    ],
)
def test_calls_that_do_not_fit_are_refused(folder, change, message):
    with pytest.raises(ValueError, match=message):
        refiner(folder)(*change(*inputs(4)))


def test_states_are_guarded(folder):
    model = refiner(folder)
    x, t, cond = inputs(7)
    cond = dataclasses.replace(cond, layout=Layout.chunked(2, 7, 3))
    with pytest.raises(ValueError, match="needs a state"):
        model(x, t, cond, commit=True)
    with pytest.raises(ValueError, match="one whole chunk unless it commits"):
        model(x, t, cond, model.new_state())
    with torch.no_grad():
        _, state = model(x[:, :, :4], t[:, :4], cond.frames(0, 4), model.new_state(), commit=True)
    with pytest.raises(ValueError, match="4 frames in 1 chunks came before"):
        model(x[:, :, :4], t[:, :4], cond.frames(0, 4), state)
    with pytest.raises(ValueError, match=r"frames of \(2, 3\) cells"):
        model(x[:, :, 4:, :1], t[:, 4:], cond.frames(4, 7), state)
    with pytest.raises(ValueError, match="sink=6, window=5"):
        refiner(folder, sink=6, window=5)
    with pytest.raises(ValueError, match="first chunk holds the sink of 5 frames, got 4"):
        refiner(folder, sink=5)(x, t, cond)
    for detach in (True, False):
        x.requires_grad_()
        _, state = model(x, t, cond, model.new_state(detach), commit=True)
        assert state.blocks[0].k.requires_grad is not detach

"""A refiner behind a generator: what is decoded are the refined latents, whole or chunk by chunk."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from tests.unit.test_refiner_weights import _text_parts
from tests.unit.tiny_refiner import save_transformer
from vgr.diffusion.refine import refine
from vgr.generator import Generator
from vgr.models.codec import CosineCodec
from vgr.models.ltx2_text import LTX2Text
from vgr.models.text import ByteTextEncoder
from vgr.models.world_model import WorldModel
from vgr.training import refining
from vgr.types import Cameras

K = [0.5, 0.6, 0.5, 0.5]
STREAM = {"method": "stream", "steps": 2, "shift": 3.0, "guidance": 1.0, "sigmas": None}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """transformer/ and connectors/; Gemma 3 gives fixed states."""
    save_transformer(tmp_path)
    _, states, mask = _text_parts(tmp_path)
    known = lambda prompts: (states[: len(prompts)], mask[: len(prompts)])  # noqa: E731
    monkeypatch.setattr(refining, "LTX2Text", lambda source: LTX2Text(source, prompt_states=known))
    return tmp_path


def _generator(sampling, chunk, luma=(2,)):
    torch.manual_seed(0)
    codec = CosineCodec(stride=(4, 8, 8), luma=luma, chroma=(0,))
    model = WorldModel(codec.channels, width=32, heads=2, layers=2, softmax_every=2, text_width=16, raw_frames=4)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    record = {"fps": 8.0, "max_frames": 29, "size_hw": [16, 24], "intrinsics": K, "chunk": chunk}
    parts = {"model": model, "text": ByteTextEncoder(16, 16, 1, 2), "codec": codec}
    return Generator(parts, record, "x", "", {}, sampling, "cpu")


@pytest.mark.parametrize("sampling, chunk", [({**STREAM, "method": "joint"}, None), (STREAM, 3)])
def test_what_is_decoded_is_refined(folder, sampling, chunk, monkeypatch):
    generator = _generator(sampling, chunk)
    cameras = Cameras(torch.eye(4).expand(1, 29, 4, 4), torch.tensor(K).expand(1, 29, 4))
    call = (None, cameras, (("a room",),), [1])
    plain, latents, pieces = generator(*call)[0], [], []
    denoise = generator._denoise

    def watched(*args):
        for piece in denoise(*args):
            pieces.append(piece)
            yield piece

    monkeypatch.setattr(generator, "_denoise", watched)
    own = refining.Refinement(folder, generator.codec, 8.0, sampling["method"] == "stream", "cpu")
    generator.refine = lambda *args: (latents.append(x) or x for x in own(*args))
    videos, timings = generator(*call)
    assert [x.shape[2] for x in latents] == ([8] if chunk is None else [4, 4]) == [x.shape[2] for x in pieces]
    decoded = generator.decoded(generator.codec.decode, torch.cat(latents, dim=2))
    assert np.abs(videos.astype(int) - decoded).max() <= 1 and timings["frames"] == 29
    assert (videos[:, 0] == plain[:, 0]).all() and (videos[:, 1:] != plain[:, 1:]).any()
    if chunk is None:
        assert own.refiner.window is None
        assert torch.equal(latents[0], refine(own.refiner, pieces[0], own.text((("a room",),))))
    else:
        assert own.refiner.window == 11


def test_other_latents_are_refused(folder):
    with pytest.raises(ValueError, match="takes latents of 4 channels, .* CosineCodec has 9"):
        refining.Refinement(folder, _generator(STREAM, 3, (3,)).codec, 8.0, True, "cpu")

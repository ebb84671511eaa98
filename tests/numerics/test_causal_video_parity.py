"""The bidirectional form against diffusers' WanTransformer3DModel, random weights, fp32; weights in all forms."""

import pytest
import torch

from vgr.models import causal_video_weights
from vgr.models.causal_video import CausalVideo
from vgr.types import Conditioning, Layout, TextStates

LENGTH = 20
# heads, head width, layers, frames, height, width, text tokens
SIZES = [
    (3, 16, 2, 5, 4, 6, 7),
    (2, 24, 3, 3, 8, 4, 20),
    (4, 12, 2, 4, 6, 6, 11),
    (1, 128, 1, 2, 4, 4, 1),
    (2, 10, 2, 1, 2, 8, 5),
]


def port(heads, head_dim, layers, seed=0):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, text_dim=24, ffn_dim=50, num_layers=layers
    )
    for p in model.parameters():  # every one: zero tables or gates would hide errors
        torch.nn.init.normal_(p, mean=0.0 if p.dim() > 1 else 0.5, std=0.2)
    return model


def inputs(frames, height, width, tokens):
    x, t = torch.randn(2, 16, frames, height, width), torch.rand(2, frames)
    mask = torch.arange(tokens) < torch.tensor([[tokens], [max(1, tokens - 4)]])
    states = torch.randn(2, tokens, 24)
    padded = torch.zeros(2, LENGTH, 24)
    padded[:, :tokens] = states * mask[..., None]
    return x, t, Conditioning(Layout.whole(2, frames), TextStates(states[:, None], mask[:, None])), padded


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_output_and_gradients_equal_the_port(tmp_path, size):
    heads, head_dim, layers, frames, height, width, tokens = size
    theirs = port(heads, head_dim, layers)
    theirs.save_pretrained(tmp_path / "port")
    ours = CausalVideo.from_pretrained(tmp_path / "port", text_length=LENGTH)
    x, t, cond, padded = inputs(frames, height, width, tokens)
    v, _ = ours(x, t, cond)
    times = 1000 * t.repeat_interleave(height * width // 4, dim=1)
    expected = theirs(x, times, padded, return_dict=False)[0]
    assert (v - expected).abs().max() <= 1e-5 * expected.abs().max()
    for model, out in ((ours, v), (theirs, expected)):
        out.square().mean().backward()
        model.gradients = {n: p.grad for n, p in model.named_parameters()}
    _, named = causal_video_weights.to_diffusers(ours.config, ours.gradients)
    assert named.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert (named[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-8, name


def test_diffusers_folder_comes_back_bit_for_bit(tmp_path):
    from diffusers import WanTransformer3DModel

    theirs = port(2, 12, 2)
    theirs.save_pretrained(tmp_path / "port")
    ours = CausalVideo.from_pretrained(tmp_path / "port")
    config, tensors = causal_video_weights.to_diffusers(ours.config, ours.state_dict())
    again = WanTransformer3DModel.from_config({"_class_name": "WanTransformer3DModel", **config})
    again.load_state_dict(tensors)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in theirs.state_dict().items())
    ours.save_pretrained(tmp_path / "own")
    own = CausalVideo.from_pretrained(tmp_path / "own")
    assert own.config == ours.config and all(torch.equal(v, own.state_dict()[k]) for k, v in ours.state_dict().items())


def test_original_names(tmp_path):
    from safetensors.torch import save_file

    ours = CausalVideo.from_pretrained(_saved(port(1, 128, 1), tmp_path / "port"))
    _, tensors = causal_video_weights.to_original(ours.config, ours.state_dict())
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    assert "blocks.0.self_attn.q.weight" in tensors and "head.modulation" in tensors
    save_file(tensors, tmp_path / "wan.safetensors")
    original = CausalVideo.from_pretrained(tmp_path / "wan.safetensors")
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in ours.state_dict().items())


def _saved(model, folder):
    model.save_pretrained(folder)
    return folder


def test_refusals(tmp_path):
    folder = _saved(port(2, 12, 2), tmp_path / "port")
    with pytest.raises(ValueError, match="takes no wndow"):
        CausalVideo.from_pretrained(folder, wndow=3)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"image_dim": null', '"image_dim": 1280'))
    with pytest.raises(ValueError, match="image_dim=1280"):
        CausalVideo.from_pretrained(folder)


@pytest.mark.parametrize(
    "size,count",
    [({}, 1_418_996_800), ({"width": 5120, "heads": 40, "layers": 40, "ffn_width": 13824}, 14_288_491_584)],
    ids=["1.3B", "14B"],
)
def test_parameter_counts(size, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in CausalVideo(**size).parameters()) == count

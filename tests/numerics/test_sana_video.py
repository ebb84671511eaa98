"""SANA-Video's weights in a linear-attention world model without a camera: the same function as diffusers' model."""

import pytest
import torch

from vgr.geometry.cameras import group_by_latent
from vgr.models import surgery, weights, world_model_weights
from vgr.models.world_model import WorldModel
from vgr.types import Cameras, Conditioning, Layout, TextStates

CHANNELS, FRAMES, GRID = 6, 5, (4, 6)


def _theirs(patch, **changes):
    from diffusers import SanaVideoTransformer3DModel

    torch.manual_seed(0)
    model = SanaVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=24, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=24, cross_attention_dim=48, caption_channels=16,
        mlp_ratio=3.0, patch_size=(1, patch, patch), **changes,
    )  # fmt: skip
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.2 if p.dim() > 1 else 0.1)
        if "norm" in name:
            p.data += 1.0
    return model.eval()


def _inputs(patch):
    """A call in diffusers' terms, and the same one in ours on latents packed into patches."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, CHANNELS, FRAMES, *(n * patch for n in GRID), generator=g)
    t = torch.tensor([[0.0, 0.3, 0.5, 0.7, 0.9], [0.1] * 5])
    mask = torch.arange(7).view(1, 1, -1) < torch.tensor([4, 7]).view(2, 1, 1)
    text = TextStates(torch.randn(2, 1, 7, 16, generator=g), mask)
    packed = x.unflatten(-2, (-1, patch)).unflatten(-1, (-1, patch)).permute(0, 4, 6, 1, 2, 3, 5).flatten(1, 3)
    per_token = (1000 * t).repeat_interleave(GRID[0] * GRID[1], dim=1)
    theirs = {"timestep": per_token, "encoder_attention_mask": text.mask[:, 0].float()}
    return {"hidden_states": x, "encoder_hidden_states": text.states[:, 0], **theirs}, packed, t, text


def _unpacked(v, patch):
    v = v.unflatten(1, (patch, patch, -1)).permute(0, 3, 4, 5, 1, 6, 2)
    return v.flatten(-2).flatten(-3, -2)


@pytest.mark.parametrize("patch", [1, 2])
def test_outputs_agree(tmp_path, patch):
    theirs = _theirs(patch)
    theirs.save_pretrained(tmp_path)
    ours = WorldModel.from_pretrained(tmp_path, partial=True, raw_frames=4).eval()
    call, x, t, text = _inputs(patch)
    cond = Conditioning(Layout.whole(2, FRAMES), text)
    with torch.no_grad():
        expected = theirs(**call).sample
        actual = _unpacked(ours(x, t, cond)[0], patch)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_only_the_camera_branch_is_missing_and_surgery_starts_it(tmp_path):
    _theirs(2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="0 unknown .*, 0 of another shape"):
        WorldModel.from_pretrained(tmp_path)
    config, stored = weights.load_folder(tmp_path, world_model_weights.ADAPTERS)
    model = WorldModel(**{**config, "in_channels": 8, "raw_frames": 4}).eval()  # another codec's channels
    model.load_state_dict(surgery.convert(stored, model.state_dict(), ["latents", "camera"]))
    for name in stored.keys() - {n for n in stored if n.startswith(("x_embedder", "final_linear"))}:
        assert torch.equal(model.state_dict()[name], stored[name]), name
    assert torch.equal(model.blocks[0].attn.qkv_cam.weight, stored["blocks.0.attn.qkv.weight"])
    _, _, t, text = _inputs(2)
    x, raw = torch.randn(2, 8, FRAMES, *GRID), 1 + (FRAMES - 1) * 4
    still = Cameras(torch.eye(4).expand(2, raw, 4, 4), torch.full((2, raw, 4), 0.5))
    torch.nn.init.normal_(model.final_linear.weight)
    layout = Layout.whole(2, FRAMES)
    with torch.no_grad():
        outputs = [model(x, t, Conditioning(layout, text, c))[0] for c in (None, group_by_latent(still, 4))]
    assert torch.equal(*outputs) and outputs[0].abs().max() > 0.1


@pytest.mark.parametrize("changes", [{"guidance_embeds": True}, {"attention_bias": True}])
def test_other_forms_are_refused(tmp_path, changes):
    _theirs(1, **changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="guidance_embeds=True|blocks.0.attn1.to_k.bias"):
        WorldModel.from_pretrained(tmp_path)

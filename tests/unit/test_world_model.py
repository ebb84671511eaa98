"""The world model's own promises: conditioning reaches the output, folders round-trip, wrong input is refused."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from vgr.geometry.cameras import group_by_latent
from vgr.geometry.trajectories import named_cameras
from vgr.models.text import ByteTextEncoder
from vgr.models.world_model import WorldModel
from vgr.nn.attention import CameraFrames
from vgr.nn.camera import ray_transforms
from vgr.nn.embed import sinusoid
from vgr.nn.rope import axis_pairs, rope_table
from vgr.types import Cameras, Conditioning, Layout, TextStates

CONFIG = {"in_channels": 4, "width": 32, "heads": 2, "layers": 2, "softmax_every": 2, "text_width": 16, "raw_frames": 4}


def _model(**changes):
    torch.manual_seed(0)
    model = WorldModel(**{**CONFIG, **changes})
    for p in model.parameters():  # the start has zero outputs
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def _inputs(path="orbit", frames=3, batch=2):
    g = torch.Generator().manual_seed(1)
    c2w, k = named_cameras(path, 1 + (frames - 1) * 4, 8.0)
    cameras = Cameras(c2w.float().expand(batch, -1, -1, -1), k.float().expand(batch, -1, -1))
    text = TextStates(torch.randn(batch, 1, 5, 16, generator=g), torch.ones(batch, 1, 5, dtype=torch.bool))
    x = torch.randn(batch, 4, frames, 3, 4, generator=g)
    cond = Conditioning(Layout.whole(batch, frames), text, group_by_latent(cameras, 4))
    return x, torch.full((batch, frames), 0.5), cond


def test_new_model_predicts_zero_and_every_used_parameter_learns():
    model = WorldModel(**CONFIG)
    x, t, cond = _inputs()
    assert torch.equal(model(x, t, cond)[0], torch.zeros_like(x))
    trained = _model()
    trained(x, t, cond)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.parameters())


def test_camera_text_and_time_reach_the_output():
    model = _model()
    x, t, cond = _inputs()
    base = model(x, t, cond)[0]
    for other in (
        model(x, t, _inputs("truck")[2])[0],
        model(x, t, dataclasses.replace(cond, cameras=None))[0],
        model(x, t, dataclasses.replace(cond, text=TextStates(cond.text.states + 1, cond.text.mask)))[0],
        model(x, t + 0.2, cond)[0],
    ):
        assert (other - base).abs().max() > 1e-3


def test_rays_stay_fp32_under_autocast():
    """A metre far from the origin must survive: bf16 poses would move it by centimetres."""
    model = _model()
    x, t, cond = _inputs()
    expected = model(x, t, cond)[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(x, t, cond)[0]
        camera, _ = model._cameras(cond, 3, 4)
    assert camera.matrix.dtype == camera.inverse.dtype == torch.float32
    assert torch.equal(camera.matrix, model._cameras(cond, 3, 4)[0].matrix)
    assert actual.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), 0) > 0.999


@pytest.mark.parametrize("mixer", ["gdn", "linear"])
def test_bf16_weights_run_without_autocast_by_the_caller(tmp_path, mixer):
    """As fp32 arithmetic on the same rounded weights, up to bf16 products; chunk by chunk too."""
    _model(mixer=mixer, layers=4).save_pretrained(tmp_path)
    half = WorldModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    rounded = WorldModel.from_pretrained(tmp_path).eval()
    rounded.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    x, t, cond = _inputs(frames=5)
    cond = dataclasses.replace(cond, layout=Layout.chunked(2, 5, 2))
    with torch.no_grad():
        expected, (actual, _) = rounded(x, t, cond)[0], half(x, t, cond)
        state, parts = half.new_state(), []
        for a, b in ((0, 3), (3, 5)):
            v, state = half(x[:, :, a:b], t[:, a:b], cond.frames(a, b), state, commit=True)
            parts.append(v)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and actual.dtype == torch.float32
    for v in (actual, torch.cat(parts, dim=2)):
        assert (v - expected).norm() < 0.03 * expected.norm()


def test_gates_and_times_of_bf16_weights_are_exact():
    model = _model()
    gdn, x = model.blocks[0].attn, torch.randn(2, 3, 12, 32)
    model.bfloat16()
    actual = gdn._gates(x)
    time = model.t_embedder(sinusoid(torch.tensor([1.0, 999.0])))
    model.float()
    torch.testing.assert_close(actual, gdn._gates(x), rtol=0, atol=0)
    assert torch.equal(time, model.t_embedder(sinusoid(torch.tensor([1.0, 999.0]))))


def test_samples_of_a_batch_do_not_mix():
    model = _model()
    x, t, cond = _inputs()
    whole = model(x, t, cond)[0]
    changed = x.clone()
    changed[1] += 1.0
    torch.testing.assert_close(model(changed, t, cond)[0][0], whole[0])


def test_each_frame_reads_the_prompt_of_its_shot():
    model = _model(layers=1, softmax_every=1)
    x, t, cond = _inputs()
    states = torch.cat([cond.text.states, cond.text.states + 1.0], dim=1)
    text = TextStates(states, torch.ones(2, 2, 5, dtype=torch.bool))
    for shot, row in ((0, 0), (1, 1)):
        layout = dataclasses.replace(cond.layout, shot=torch.full((2, 3), shot))
        one = TextStates(states[:, row : row + 1], text.mask[:, row : row + 1])
        alone = dataclasses.replace(cond, text=one)
        told = Conditioning(layout, text, cond.cameras)
        changed = Conditioning(cond.layout, text, cond.cameras, torch.full((2, 3), row))  # within one shot
        for many in (told, changed):
            torch.testing.assert_close(model(x, t, many)[0], model(x, t, alone)[0], atol=1e-5, rtol=1e-5)


def test_checkpointing_changes_no_gradient():
    x, t, cond = _inputs()
    grads = []
    for flag in (False, True):
        model = _model(activation_checkpointing=flag).train()
        model(x, t, cond)[0].square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_folder_round_trip(tmp_path):
    model = _model()
    model.save_pretrained(tmp_path)
    again = WorldModel.from_pretrained(tmp_path).eval()
    x, t, cond = _inputs()
    assert torch.equal(again(x, t, cond)[0], model(x, t, cond)[0])


def test_damaged_missing_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        WorldModel.from_pretrained(tmp_path)
    _model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged or truncated"):
        WorldModel.from_pretrained(tmp_path)
    weights.write_bytes(data)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"width": 32', '"width": 48'))
    with pytest.raises(ValueError, match="does not fit the model"):
        WorldModel.from_pretrained(tmp_path)
    config.write_text('{"_class_name": "os.system"}')
    with pytest.raises(ValueError, match=r"os\.system"):
        WorldModel.from_pretrained(tmp_path)


def test_wrong_input_is_named():
    model = _model()
    x, t, cond = _inputs()
    with pytest.raises(ValueError, match="4,T,H,W"):
        model(x[:, :3], t, cond)
    with pytest.raises(ValueError, match="cameras must hold 2 latent frames of 4"):
        model(x[:, :, :2], t[:, :2], cond)
    with pytest.raises(ValueError, match="new_state"):
        model(x, t, cond, commit=True)
    with pytest.raises(ValueError, match="multiple of 8"):
        WorldModel(width=40, heads=4)


def test_full_size_has_the_published_parameter_count():
    with torch.device("meta"):
        model = WorldModel()
    count = sum(p.numel() for p in model.parameters())
    # The released file holds 2,662.5 M; of these the null text embedding, the unused map embedding and the
    # gate parameters of softmax blocks have no effect here and are not built.
    unused = 300 * 2304 + 2240 * 3 + 2240 + 5 * (2 * (20 * 2240 + 20) + 40)
    assert abs(count + unused - 2662.5e6) < 0.1e6


def test_text_encoder_pads_without_effect_and_knows_null():
    torch.manual_seed(0)
    text = ByteTextEncoder(32, length=16, layers=1, heads=2).eval()
    short, both = text((("hall",),)), text((("hall",), ("a much longer caption",)))
    torch.testing.assert_close(both.states[0, :, :4], short.states[0, :, :4], atol=1e-5, rtol=1e-5)
    assert both.mask.sum(-1).tolist() == [[4], [16]]
    null = text((("",),))
    assert null.mask.sum() == 1 and not torch.allclose(null.states[0, 0, 0], short.states[0, 0, 0])
    ragged = text((("a", "b"), ("c",)))
    assert ragged.mask.any(-1).tolist() == [[True, True], [True, False]] and torch.isfinite(ragged.states).all()


def test_a_new_softmax_block_looks_up_clean_frames_along_rays():
    torch.manual_seed(0)
    model = WorldModel(8, width=64, heads=2, layers=2, softmax_every=2, text_width=16, cam_renorm_softmax=False,
                       camera_start="rays")
    with torch.no_grad():
        clean = model.t_block(F.silu(model.t_embedder(sinusoid(torch.tensor([0.0, 100, 500, 1000])))))[:, 0]
        assert clean[0] > 8 and clean[1:].abs().max() < 0.5
        # Frame 0 is clean; frame 1, noisy, has turned by 40 degrees and moved.
        turn = torch.tensor(40.0).deg2rad()
        c2w = torch.eye(4).repeat(1, 2, 1, 1)
        c2w[0, 1, 0, [0, 2]] = torch.stack([turn.cos(), turn.sin()])
        c2w[0, 1, 2, [0, 2]] = torch.stack([-turn.sin(), turn.cos()])
        c2w[0, 1, :3, 3] = torch.tensor([0.3, 0.0, 1.0])
        matrix, inverse = ray_transforms(c2w, torch.tensor([0.5, 0.8, 0.5, 0.5]).expand(1, 2, 4), 6, 8)
        table = rope_table(torch.arange(2), 6, 8, 32, keep=tuple(map(min, axis_pairs(16), axis_pairs(32))))
        x = F.layer_norm(torch.randn(1, 2, 48, 64), (64,))
        x[..., 0] = clean[:2, None]
        attention = model.blocks[1].attn
        q, k, v = attention.qkv_cam(x).chunk(3, dim=-1)
        parts = (attention._heads(y) for y in (attention.q_norm_cam(q), attention.k_norm_cam(k), v))
        q, k, _ = attention._camera_qkv(*parts, CameraFrames(matrix, inverse, table))
    q, k = (y[..., :16].flatten(1, 2)[0].transpose(0, 1) for y in (q, k))  # the geometric half, (N,T*S,16)
    rays = inverse[0, ..., :3, 2].flatten(0, 1)
    read = (q[:, 48:] @ k.mT).argmax(-1)
    assert (read < 48).all()
    agreement = rays[48:] @ rays[:48].T  # cosines; cells are 11 degrees wide, 0.02 of a cosine
    assert (agreement.max(1).values - 0.06 < agreement.gather(1, read.T).T).all()

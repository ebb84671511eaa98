"""Blocks against slow literal forms: rotary positions, ray frames, Pluecker packing, feed-forward, K filter."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

from vgr.nn.attention import CrossAttention, padded_head_dim
from vgr.nn.camera import cell_directions, limit_rms, pluecker_tokens, ray_transforms, transform_groups
from vgr.nn.embed import sinusoid
from vgr.nn.ffn import ConvFeedForward
from vgr.nn.rope import axis_pairs, rope_table, rotate
from vgr.nn.temporal import mix_frames, symmetric_filter


def _poses(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    c2w = torch.eye(4).repeat(1, count, 1, 1)
    c2w[0, :, :3, :3] = torch.from_numpy(Rotation.random(count, random_state=seed).as_matrix()).float()
    c2w[0, :, :3, 3] = torch.randn(count, 3, generator=g)
    return c2w, torch.tensor([0.5, 0.7, 0.48, 0.53]).expand(1, count, 4)


def test_axis_pairs_of_the_released_model():
    assert axis_pairs(112) == (20, 18, 18)
    assert axis_pairs(56) == (10, 9, 9)


def test_rotary_scores_depend_on_offsets_only():
    table = rope_table(torch.arange(6), 3, 4, 24)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(24, generator=g), torch.randn(24, generator=g)
    spread = lambda x: rotate(x.expand(1, 6, 12, 1, 24), table)[0, :, :, 0].unflatten(1, (3, 4))  # noqa: E731
    q_rot, k_rot = spread(q), spread(k)
    torch.testing.assert_close(q_rot[1, 1, 1] @ k_rot[3, 2, 0 + 2], q_rot[2, 0, 2] @ k_rot[4, 1, 3])
    assert (q_rot[1, 1, 1] @ k_rot[3, 2, 2] - q_rot[1, 1, 1] @ k_rot[4, 2, 2]).abs() > 1e-4
    back = rotate(rotate(q.expand(1, 6, 12, 1, 24), table), table.conj())
    torch.testing.assert_close(back, q.expand(1, 6, 12, 1, 24))


def test_positions_survive_slicing():
    whole = rope_table(torch.arange(8), 2, 2, 16)
    torch.testing.assert_close(rope_table(torch.arange(5, 8), 2, 2, 16), whole[5:8])


def test_camera_table_is_cut_from_the_main_one():
    main, cut = rope_table(torch.arange(3), 2, 2, 112), rope_table(torch.arange(3), 2, 2, 112, keep=(10, 9, 9))
    expected = torch.cat([main[..., :10], main[..., 20:29], main[..., 38:47]], dim=-1)
    torch.testing.assert_close(cut, expected)


def test_ray_frames_are_rigid_and_look_along_the_ray():
    c2w, k = _poses(5)
    matrix, inverse = ray_transforms(c2w, k, 3, 4)
    torch.testing.assert_close(matrix @ inverse, torch.eye(4).expand_as(matrix), atol=1e-5, rtol=1e-5)
    directions = cell_directions(k, 3, 4) @ c2w[..., :3, :3].mT
    local = (matrix[..., :3, :3] @ directions.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(local, torch.tensor([0.0, 0.0, 1.0]).expand_as(local), atol=1e-5, rtol=0)
    origin = F.pad(c2w[..., :3, 3], (0, 1), value=1.0)
    at_zero = matrix @ origin[..., None, :, None]
    torch.testing.assert_close(at_zero[..., :3, 0], torch.zeros_like(at_zero[..., :3, 0]), atol=1e-5, rtol=0)


def test_broken_camera_gives_identity():
    c2w, k = _poses(2)
    c2w = c2w.clone()
    c2w[0, 1] = float("nan")
    matrix, _ = ray_transforms(c2w, k, 2, 2)
    assert torch.equal(matrix[0, 1], torch.eye(4).expand(4, 4, 4))
    assert torch.isfinite(matrix).all()


def test_scores_of_ray_features_are_invariant_to_the_world_frame():
    """q' = P^T q, k' = P^-1 k: only P_i P_j^-1 enters, so moving the world changes nothing (section 3.3)."""
    c2w, k = _poses(3)
    world = _poses(1, seed=9)[0]
    g = torch.Generator().manual_seed(0)
    q, key = torch.randn(1, 3, 4, 2, 8, generator=g), torch.randn(1, 3, 4, 2, 8, generator=g)

    def scores(c2w):
        matrix, inverse = ray_transforms(c2w, k, 2, 2)
        a, b = transform_groups(q, matrix.mT), transform_groups(key, inverse)
        return torch.einsum("btsnk,bucnk->bntsuc", a, b)

    torch.testing.assert_close(scores(c2w), scores(world[:, :1] @ c2w), atol=1e-3, rtol=1e-3)


def test_group_transform_is_the_matrix_product():
    c2w, k = _poses(2)
    matrix, _ = ray_transforms(c2w, k, 2, 3)
    x = torch.randn(1, 2, 6, 3, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("btsij,btsngj->btsngi", matrix, x.unflatten(-1, (2, 4))).flatten(-2)
    torch.testing.assert_close(transform_groups(x, matrix), expected)


def test_pluecker_moment_is_orthogonal_and_frame_major():
    c2w, k = _poses(4)
    rays = pluecker_tokens(c2w.unflatten(1, (2, 2)), k.unflatten(1, (2, 2)), 2, 3)
    assert rays.shape == (1, 2, 6, 12)
    d, m = rays[..., :3], rays[..., 3:6]
    torch.testing.assert_close((d * m).sum(-1), torch.zeros(1, 2, 6), atol=1e-5, rtol=0)
    second = pluecker_tokens(c2w[:, 1:2].unsqueeze(2), k[:, 1:2].unsqueeze(2), 2, 3)
    torch.testing.assert_close(rays[:, :1, :, 6:], second)


def test_limit_rms_never_lengthens():
    g = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 8, generator=g), torch.randn(2, 8, generator=g) * torch.tensor([[10.0], [0.1]])
    out = limit_rms(new, old)
    torch.testing.assert_close(out[1], new[1])
    torch.testing.assert_close(out[0].square().mean().sqrt(), old[0].square().mean().sqrt(), rtol=1e-3, atol=0)


def test_feed_forward_equals_convolutions_on_images():
    ffn = ConvFeedForward(8, 2.0)
    torch.nn.init.normal_(ffn.temporal.weight, std=0.2)
    x = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    image = x.reshape(6, 3, 4, 8).permute(0, 3, 1, 2)
    h = F.silu(F.conv2d(image, ffn.expand.weight[..., None, None], ffn.expand.bias))
    h = F.conv2d(h, ffn.depthwise.weight, ffn.depthwise.bias, padding=1, groups=32)
    value, gate = h.chunk(2, 1)
    z = F.conv2d(value * F.silu(gate), ffn.project.weight[..., None, None])
    z = z.reshape(2, 3, 8, 12).transpose(1, 2)  # B,C,T,S
    expected = (z + F.conv2d(z, ffn.temporal.weight, padding=(1, 0))).permute(0, 2, 3, 1)
    torch.testing.assert_close(ffn(x, 3, 4, (3,))[0], expected, atol=1e-5, rtol=1e-4)


def test_long_clips_are_split_without_effect(monkeypatch):
    ffn = ConvFeedForward(8, 2.0)
    x = torch.randn(2, 5, 12, 8, generator=torch.Generator().manual_seed(0))
    whole = ffn(x, 3, 4, (5,))[0]
    monkeypatch.setattr("vgr.nn.ffn._MAX_ELEMENTS", 3 * 12 * 32)
    torch.testing.assert_close(ffn(x, 3, 4, (5,))[0], whole)


def _filter_reference(k, taps, chunks, before, isolated):
    """Spec 3.1 and 3.8 frame by frame: sum over the frames within reach that may be read."""
    reach, offset = taps.shape[-1] - 1, 0 if before is None else before.shape[1]
    frames = k if before is None else torch.cat([before, k], 1)
    owner = [-1] * offset + [i for i, n in enumerate(chunks) for _ in range(n)]
    out = torch.zeros_like(k)
    for t in range(k.shape[1]):
        for u in range(frames.shape[1]):
            distance = u - offset - t
            own = owner[u] == owner[t + offset]
            if abs(distance) <= reach and (own or (distance < 0 and not isolated)):
                out[:, t] += taps[:, 0, reach - abs(distance)] * frames[:, u]
    return out


@pytest.mark.parametrize("chunks", [(6,), (1,), (4, 2), (1, 3, 2), (2, 2, 2)])
@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize("isolated", [False, True])
def test_key_filter_reads_the_past_and_its_own_chunk(chunks, remembered, isolated):
    g = torch.Generator().manual_seed(0)
    taps, k = torch.randn(16, 1, 4, generator=g), torch.randn(1, sum(chunks), 3, 16, generator=g)
    before = torch.randn(1, 3, 3, 16, generator=g) if remembered else None
    expected = _filter_reference(k, taps, chunks, before, isolated)
    torch.testing.assert_close(symmetric_filter(k, taps, chunks, before, isolated), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunks", [(5,), (1,), (3, 2), (1, 2, 2)])
@pytest.mark.parametrize("remembered", [False, True])
def test_frame_mixing_ends_with_the_chunk(chunks, remembered):
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 4, 3, 1, generator=g), torch.randn(2, sum(chunks), 3, 4, generator=g)
    before = torch.randn(2, 1, 3, 4, generator=g) if remembered else None
    edge = torch.zeros(2, 1, 3, 4)
    frames = torch.cat([edge if before is None else before, x, edge], 1)
    ends = {sum(chunks[: i + 1]) - 1 for i in range(len(chunks))}
    expected = torch.stack(
        [
            sum(frames[:, t + j] @ weight[:, :, j, 0].T for j in range(2 if t in ends else 3))
            for t in range(x.shape[1])
        ],
        dim=1,
    )
    torch.testing.assert_close(mix_frames(x, weight, chunks, before), expected, atol=1e-5, rtol=1e-4)


def test_padded_head_dim():
    assert [padded_head_dim(d) for d in (16, 32, 64, 112, 128, 160)] == [128, 32, 64, 128, 128, 256]


def test_cross_attention_ignores_padding():
    layer = CrossAttention(16, 2)
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 3, 4, 16, generator=g), torch.randn(2, 5, 16, generator=g)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool().view(2, 1, 1, 5)
    changed = torch.where(mask[:, 0, 0].unsqueeze(-1), text, text + 7.0)
    torch.testing.assert_close(layer(x, text, mask), layer(x, changed, mask))


def test_sinusoid_layout():
    out = sinusoid(torch.tensor([0.0, 3.0]), 8)
    expected = [math.cos(3 * 10 ** (-j)) for j in range(4)] + [math.sin(3 * 10 ** (-j)) for j in range(4)]
    torch.testing.assert_close(out[1], torch.tensor(expected))
    torch.testing.assert_close(out[0], torch.tensor([1.0] * 4 + [0.0] * 4))

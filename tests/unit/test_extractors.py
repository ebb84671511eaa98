"""Networks for clip features by their real doors, with tiny random weights saved in the published formats."""

import hashlib

import numpy as np
import pytest
import torch

from vgr.metrics import extractors
from vgr.metrics.extractors import clip_of, load_i3d, load_videomae, missing


class TinyI3D(torch.nn.Module):
    """The call of the published TorchScript: uint8 range in, own resize and scaling, logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(3, 7, (3, 5, 5), stride=(2, 8, 8))

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False):
        b, c, t, h, w = x.shape
        if resize:
            x = x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)
            x = torch.nn.functional.interpolate(x, size=(56, 56), mode="bilinear", align_corners=False)
            x = x.reshape(b, t, c, 56, 56).permute(0, 2, 1, 3, 4)
        if rescale:
            x = 2 * x / 255 - 1
        logits = self.conv(x).mean(dim=(2, 3, 4))
        return logits if return_features else logits.softmax(1)


@pytest.fixture(scope="module")
def i3d(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "i3d_torchscript.pt"
    network = TinyI3D().eval()
    torch.jit.script(network).save(str(path))
    return network, path, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size


def clips(count=2, frames=16):
    return np.random.default_rng(0).integers(0, 256, (count, frames, 48, 64, 3), dtype=np.uint8)


def test_i3d_gives_the_logits_of_resized_scaled_clips(i3d):
    network, path, sha256, size = i3d
    loaded = load_i3d(path, sha256=sha256, size=size)
    x = torch.from_numpy(clips()).permute(0, 4, 1, 2, 3).float()
    with torch.no_grad():
        want = network(x, True, True, True)
    np.testing.assert_allclose(loaded.features(clips()), want.numpy(), rtol=1e-6)
    assert loaded.frames == 16 and loaded.about["sha256"] == sha256


def test_other_bytes_are_never_run(i3d, tmp_path, monkeypatch):
    _, path, sha256, size = i3d
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("it was run"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    flipped = tmp_path / "i3d_torchscript.pt"
    flipped.write_bytes(data)
    with pytest.raises(ValueError, match=r"is not the published I3D \(sha256 [0-9a-f]{64}, not"):
        load_i3d(flipped, sha256=sha256, size=size)
    with pytest.raises(ValueError, match=rf"\({size} bytes, not 51235320\).*flateon/FVD-I3D-torchscript"):
        load_i3d(path)
    with pytest.raises(ValueError, match=r"fvd.frames=9.*10 or more"):
        load_i3d(path, frames=9, sha256=sha256, size=size)


@pytest.fixture(scope="module")
def videomae(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=16, tubelet_size=2, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, num_labels=5, use_mean_pooling=True,
    )  # fmt: skip
    network = transformers.VideoMAEForVideoClassification(config).eval()
    folder = tmp_path_factory.mktemp("weights") / "videomae"
    network.save_pretrained(folder)
    return network, folder


def test_videomae_gives_what_its_classifier_sees(videomae):
    network, folder = videomae
    loaded = load_videomae(folder)
    got = loaded.features(clips())
    assert got.shape == (2, 24) and got.dtype == np.float64 and loaded.frames == 16
    with torch.no_grad():
        head = network.classifier(torch.from_numpy(got).float())
    pixels = torch.from_numpy(clips()).permute(0, 1, 4, 2, 3).float() / 255
    small = torch.nn.functional.interpolate(pixels.flatten(0, 1), (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    mean, sd = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    scaled = ((small - mean[:, None, None]) / sd[:, None, None]).unflatten(0, (2, 16))
    with torch.no_grad():
        np.testing.assert_allclose(head, network(scaled).logits, atol=1e-5)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.about["sha256"] == digest
    # Order of frames is seen: the second extractor is there for time.
    assert np.abs(loaded.features(clips()[:, ::-1].copy()) - got).max() > 1e-4


def test_folders_without_a_classifier_are_refused_by_name(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no VideoMAEForVideoClassification"):
        load_videomae(tmp_path)


def test_a_network_with_missing_tensors_is_not_filled_up_at_random(videomae, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(videomae[1] / "model.safetensors")
    gone = next(k for k in tensors if "layer.1" in k)
    (tmp_path / "config.json").write_bytes((videomae[1] / "config.json").read_bytes())
    rest = {k: v for k, v in tensors.items() if k != gone}
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors are missing: \['videomae.encoder.layer.1"):
        load_videomae(tmp_path)


def test_missing_weights_say_what_to_put_where(i3d, videomae, tmp_path, monkeypatch):
    lacking = missing(tmp_path)
    assert set(lacking) == {"fvd", "fd_videomae"} and extractors.load(tmp_path, 16) == {}
    assert str(tmp_path / "i3d_torchscript.pt") in lacking["fvd"]["why"]
    for told in ("51 MB", extractors.I3D_SHA256, "flateon/FVD-I3D-torchscript"):
        assert told in lacking["fvd"]["get"]
    assert "model.safetensors" in lacking["fd_videomae"]["get"]
    (tmp_path / "videomae").symlink_to(videomae[1])
    assert set(extractors.load(tmp_path, 16)) == {"fd_videomae"} and set(missing(tmp_path)) == {"fvd"}


def test_clips_are_taken_from_the_start_or_at_a_seeded_chance():
    video = np.arange(40, dtype=np.uint8)[:, None, None, None]
    assert clip_of(video, 16).ravel().tolist() == list(range(16))
    assert clip_of(video, 5, stride=8).ravel().tolist() == [0, 8, 16, 24, 32]
    assert clip_of(video, 41) is None and clip_of(video, 6, stride=8) is None
    starts = [int(clip_of(video, 16, chance=np.random.default_rng(s))[0, 0, 0, 0]) for s in range(300)]
    assert set(starts) == set(range(25))  # every offset that fits, the last one too
    assert clip_of(video, 40, chance=np.random.default_rng(0)).ravel().tolist() == list(range(40))

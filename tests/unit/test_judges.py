"""Networks that judge frames by their real doors, with random weights saved in the published formats."""

import hashlib
import json

import numpy as np
import pytest
import torch

from vgr.report import judges

RNG = np.random.default_rng(0)


def frames(count=5, size=(64, 80)):
    return RNG.integers(0, 256, (count, *size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """torchvision's AlexNet, random, as its file stores it, and the lpips package's own network on the same."""
    import lpips
    from torchvision.models import alexnet

    torch.manual_seed(0)
    backbone = alexnet(weights=None)
    path = tmp_path_factory.mktemp("weights") / "alexnet-owt-7be5be79.pth"
    torch.save(backbone.state_dict(), path)
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    layers = {n: m for part in theirs.net.children() for n, m in part.named_children()}  # by their place in features
    for name, layer in backbone.features.named_children():
        if isinstance(layer, torch.nn.Conv2d):
            layers[name].load_state_dict(layer.state_dict())
    return path, hashlib.sha256(path.read_bytes()).hexdigest(), theirs.eval()


def test_lpips_is_the_packages_own_on_the_backbone_of_the_file(alexnet):
    path, sha256, theirs = alexnet
    a, b = frames(19), frames(19)
    judge = judges.load_lpips(path, digest=sha256[:8])
    scaled = [torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (a, b)]
    with torch.no_grad():
        want = theirs(*scaled, normalize=True).flatten().numpy()
    found = judge.frames(a, b)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert found.min() > 0.01  # heads are the trained ones: they tell noise from other noise
    np.testing.assert_allclose(judge.frames(b, a), found, rtol=1e-5)
    assert np.abs(judge.frames(a, a)).max() < 1e-12
    assert judge.about["sha256"] == sha256


def test_another_file_is_no_lpips(alexnet, tmp_path):
    path, sha256, _ = alexnet
    with pytest.raises(ValueError, match=rf"is another file \(sha256 {sha256}, not 7be5be79"):
        judges.load_lpips(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / path.name).write_bytes(data)
    with pytest.raises(ValueError, match="download.pytorch.org"):
        judges.load_lpips(tmp_path / path.name, digest=sha256[:8])


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.ViTConfig(image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2,
                                    num_attention_heads=2, intermediate_size=32)  # fmt: skip
    network = transformers.ViTModel(config, add_pooling_layer=False).eval()
    folder = tmp_path_factory.mktemp("weights") / "dino"
    network.save_pretrained(folder)
    return network, folder


def test_dino_sees_the_whole_picture_at_its_shorter_side(dino):
    network, folder = dino
    found, video = judges.load_dino(folder), frames(3)
    x = torch.from_numpy(video).permute(0, 3, 1, 2).float() / 255
    x = torch.nn.functional.interpolate(x, (32, 40), mode="bilinear", antialias=False)
    mean, sd = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        want = network((x - mean[:, None, None]) / sd[:, None, None], interpolate_pos_encoding=True)
    np.testing.assert_allclose(found.frames(video), want.last_hidden_state[:, 0].numpy(), atol=1e-5)
    assert found.frames(video).shape == (3, 24)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("weights") / "clip"
    folder.mkdir()
    words, letters = ["a", "red", "blue", "door", "room", "walks"], sorted(set("aredbluedoorroomwalks"))
    known = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{w}</w>" for w in [*words, *letters[1:]])]
    tokens = {token: i for i, token in enumerate(known)}
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    text = {"vocab_size": len(tokens), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
              "num_attention_heads": 2}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    network = transformers.CLIPModel(config).eval()
    network.save_pretrained(folder)
    return network, tokenizer, folder


def test_clip_embeds_frames_and_captions_as_its_model_does(clip):
    network, tokenizer, folder = clip
    found, video, captions = judges.load_clip(folder), frames(4), ["a red door", "a blue room a blue room a blue room"]
    x = torch.from_numpy(video).permute(0, 3, 1, 2).float() / 255
    x = torch.nn.functional.interpolate(x, (32, 40), mode="bicubic", antialias=True).clamp(0, 1)[..., 4:36]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    sd = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    given = tokenizer(captions, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        both = network(**given, pixel_values=(x - mean) / sd)
    image, text = found.frames(video), found.text(captions)
    assert image.shape == (4, 8) and text.shape == (2, 8)
    for ours, theirs in ((image, both.image_embeds), (text, both.text_embeds)):
        unit = ours / np.linalg.norm(ours, axis=1, keepdims=True)
        np.testing.assert_allclose(unit, theirs.numpy(), atol=1e-5)
    assert np.abs(text[0] - text[1]).max() > 1e-4


def test_networks_that_lack_tensors_are_refused(dino, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(dino[1] / "model.safetensors")
    gone = next(k for k in tensors if "layer.1" in k or "layers.1" in k)
    (tmp_path / "config.json").write_bytes((dino[1] / "config.json").read_bytes())
    rest = {k: v for k, v in tensors.items() if k != gone}
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds no ViTModel \(1 tensors are missing.*facebook/dino-vitb16"):
        judges.load_dino(tmp_path)
    with pytest.raises(ValueError, match="holds no CLIPModel"):
        judges.load_clip(tmp_path)


def test_only_what_lies_there_is_loaded_and_the_rest_told(dino, tmp_path):
    assert judges.load(tmp_path) == {} and set(judges.missing(tmp_path)) == set(judges.OF)
    (tmp_path / "dino").symlink_to(dino[1])
    assert set(judges.load(tmp_path)) == {"dino"}
    lacking = judges.missing(tmp_path)
    assert set(lacking) == {"lpips", "background_consistency", "clip_score"}
    assert "233 MB" in lacking["lpips"]["get"] and str(tmp_path / "clip") in lacking["clip_score"]["why"]

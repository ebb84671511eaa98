"""Files of weights: whole or absent, read in every form they come in, and refused by name when they do not fit."""

import json
import logging
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vgr.models import weights


class Small(nn.Module):
    def __init__(self, width=3, bias=True):
        super().__init__()
        self.first, self.second = nn.Linear(2, width, bias), nn.Linear(width, 1)


ADAPTERS = {"Small": lambda config, tensors: (config, tensors), None: lambda config, tensors: ({"width": 3}, tensors)}


def _tensors(seed=0):
    torch.manual_seed(seed)
    return {k: v.clone() for k, v in Small().state_dict().items()}


def _equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    weights.save_folder(tmp_path / "a" / "good", "Small", {"width": 3}, _tensors())
    assert {p.name for p in (tmp_path / "a" / "good").iterdir()} == {"model.safetensors", "config.json"}
    assert len({p.stat().st_mode for p in (tmp_path / "a" / "good").iterdir()}) == 1  # readable as other files are
    config, tensors = weights.load_folder(tmp_path / "a" / "good", ADAPTERS)
    assert config == {"width": 3} and _equal(tensors, _tensors())
    with pytest.raises(FileExistsError, match="not empty"):
        weights.save_folder(tmp_path / "a" / "good", "Small", {}, {})
    with pytest.raises(TypeError):
        weights.save_folder(tmp_path / "bad", "Small", {"width": object()}, _tensors())
    with pytest.raises(KeyboardInterrupt), weights.new_folder(tmp_path / "stopped") as part:
        (part / "half").write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and [p.name for p in (tmp_path / "a").iterdir()] == ["good"]


def test_every_arrangement_of_files_gives_the_same_tensors(tmp_path):
    expected, names = _tensors(), list(_tensors())
    whole, shards, single, nested = (tmp_path / n for n in ("whole", "shards", "single", "nested"))
    for folder in (whole, shards, single, nested / "dit"):
        folder.mkdir(parents=True)
    save_file(expected, whole / "diffusion_pytorch_model.safetensors")
    save_file({"first.bias": torch.zeros(9)}, whole / "diffusion_pytorch_model.fp16.safetensors")  # a variant beside it
    split = {"model-1.safetensors": names[:1], "model-2.safetensors": names[1:]}
    for file, keys in split.items():
        save_file({k: expected[k] for k in keys}, shards / file)
    table = {"weight_map": {k: file for file, keys in split.items() for k in keys}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(table))
    torch.save(expected, single / "weights.pt")
    torch.save({"generator": expected, "step": 3}, nested / "dit" / "model.pt")
    for source in (whole, shards, single, nested, single / "weights.pt"):
        assert _equal(weights.load_folder(source, ADAPTERS, inside=("dit",))[1], expected), source
    (shards / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 shards.*model-2"):
        weights.load_folder(shards, ADAPTERS)
    torch.save(expected, single / "other.pt")
    with pytest.raises(ValueError, match=r"2 weight files \(other\.pt, weights\.pt\)"):
        weights.load_folder(single, ADAPTERS)
    (single / "config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON table"):
        weights.load_folder(single / "weights.pt", ADAPTERS)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("nest", [lambda x: {"generator": x}, lambda x: {"w": x}], ids=["nested", "beside"])
def test_objects_in_a_pytorch_file_are_never_unpickled(tmp_path, monkeypatch, nest):
    monkeypatch.chdir(tmp_path)
    torch.save(nest(Harmful()), "evil.pt")
    with open("bare.pt", "wb") as file:
        pickle.dump(nest(Harmful()), file)
    for name, told in (("evil.pt", "could run code"), ("bare.pt", r"no \.safetensors or PyTorch")):
        with pytest.raises(ValueError, match=told):
            weights.load_folder(name, ADAPTERS)
    assert not (tmp_path / "harm").exists()
    torch.save({"epoch": 3, "lr": 0.1}, "numbers.pt")
    with pytest.raises(ValueError, match="no table of tensors"):
        weights.load_folder("numbers.pt", ADAPTERS)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path, name, share):
    file = tmp_path / name
    save_file(_tensors(), file) if name.endswith("safetensors") else torch.save(_tensors(), file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(ValueError, match=rf"{name} is damaged or truncated"):
        weights.load_folder(file, ADAPTERS)


def test_what_does_not_fit_is_counted_and_named():
    model, before = Small(), None
    tensors = _tensors(1)
    del tensors["first.weight"]
    tensors |= {"third.bias": torch.zeros(1), "second.weight": torch.zeros(1, 5)}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        weights.assign(model, tensors, "here")
    for told in ("here", "1 tensors missing ['first.weight']", "1 unknown ['third.bias']", "second.weight (1, 5) for"):
        assert told in str(error.value)
    assert _equal(model.state_dict(), before)
    weights.assign(model, tensors, "here", partial=True)
    after = model.state_dict()
    assert torch.equal(after["first.bias"], tensors["first.bias"])
    assert all(torch.equal(after[k], before[k]) for k in ("first.weight", "second.weight"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(value):
    model, tensors = Small(), _tensors()
    tensors["first.weight"][1, 0] = value
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 tensors \['first\.weight'\]"):
        weights.assign(model, tensors, "here")
    assert _equal(model.state_dict(), before)


def test_tensors_are_copies_in_the_asked_precision(caplog):
    model = weights.build(Small, {"width": 3})
    assert all(p.is_meta for p in model.parameters())
    tensors = {k: v.bfloat16() for k, v in _tensors().items()} | {"unused.pos": torch.full((1,), float("nan"))}
    with caplog.at_level(logging.INFO):
        weights.assign(model, tensors, "here")
    assert "here: 4 of the model's 4 tensors loaded" in caplog.text
    kept = {k: v.float() for k, v in tensors.items() if k != "unused.pos"}
    tensors["first.bias"].zero_()
    assert _equal(model.state_dict(), kept) and all(p.requires_grad for p in model.parameters())
    half = weights.build(Small, {})
    weights.assign(half, {k: v for k, v in tensors.items()}, "here", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_unknown_constructor_arguments_and_classes_are_named(tmp_path):
    with pytest.raises(ValueError, match="Small takes no depth; it takes width, bias"):
        weights.build(Small, {"depth": 2})
    weights.save_folder(tmp_path / "x", "Large", {}, _tensors())
    with pytest.raises(ValueError, match="describes a Large; accepted: Small"):
        weights.load_folder(tmp_path / "x", ADAPTERS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no weights"):
        weights.load_folder(tmp_path / "empty", ADAPTERS)


def test_hub_ids_need_a_revision_and_errors_say_what_to_get(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for source, revision, told in (
        ("some/model", None, r"some/model is no file.*revision=<commit>\. Get it there"),
        ("no/such/folder", "main", r"no/such/folder is no file"),
        ("some/model", "main", r"some/model at main could not be fetched.*Get it there"),
    ):
        with pytest.raises(FileNotFoundError, match=told) as error:
            weights.fetch(source, revision, ("*",), "Get it there")
        assert "\n" not in str(error.value)
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.update(id=a, **k) or str(tmp_path))
    assert weights.fetch("some/model", "abc", ("dit/*",), "") == tmp_path
    assert asked == {"id": ("some/model",), "revision": "abc", "allow_patterns": ["dit/*"]}
    (tmp_path / "some" / "model").mkdir(parents=True)
    asked.clear()
    assert weights.fetch("some/model", "abc", (), "").name == "model" and not asked


def test_saved_files_are_plain_safetensors(tmp_path):
    weights.save_folder(tmp_path / "x", None, {}, {"a": torch.arange(6.0).view(2, 3).T}, stem="other")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["other.safetensors"]
    assert torch.equal(load_file(tmp_path / "x" / "other.safetensors")["a"], torch.arange(6.0).view(2, 3).T)

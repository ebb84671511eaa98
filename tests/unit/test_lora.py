"""Adapters: no effect at the start, frozen base, PEFT's names and numbers, the same model once merged."""

import json
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import save_file
from test_world_model import _inputs, _model

from vgr import command
from vgr.diffusion.objectives import flow_matching
from vgr.models.text import ByteTextEncoder
from vgr.models.world_model import WorldModel
from vgr.nn import lora
from vgr.training.world_model import WorldModelTraining

TARGETS = ["qkv", "qkv_cam", "proj", "q_linear", "kv_linear", "expand", "project"]


def _adapted(targets=TARGETS, rank=3, alpha=6, **changes):
    """The model with adapters that have an effect."""
    model = _model(**changes)
    lora.add(model, rank, alpha, targets)
    g = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=g)
    return model


def _adapters(model):
    return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}


def test_new_adapters_change_no_bit_and_alone_learn():
    base, model = _model(), _model()
    lora.add(model, 3, 6, TARGETS)
    x, t, cond = _inputs()
    out = model(x, t, cond)[0]
    assert torch.equal(out, base(x, t, cond)[0])
    own = base.state_dict()
    assert {k: v for k, v in model.state_dict().items() if "lora_" not in k}.keys() == own.keys()
    out.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        if name.endswith("lora_B.weight"):
            assert p.grad.abs().sum() > 0, name
        elif name in own:
            assert p.grad is None and torch.equal(p, own[name])


@pytest.mark.parametrize(
    "targets, names",
    [
        (["proj"], ["blocks.0.attn.proj", "blocks.0.cross_attn.proj"]),
        (["attn.proj"], ["blocks.0.attn.proj"]),
        (["proj", "attn.proj", "t_embedder.0"], ["blocks.0.attn.proj", "blocks.0.cross_attn.proj", "t_embedder.0"]),
        (["blocks.0.mlp.expand", "x_embedder"], ["blocks.0.mlp.expand", "x_embedder"]),
    ],
)
def test_targets_are_ends_of_names(targets, names):
    model = _adapted(targets, layers=1)
    assert sorted(n for n, m in model.named_modules() if isinstance(m, lora.LoRALinear)) == names
    assert len(_adapters(model)) == 2 * len(names)


@pytest.mark.parametrize(
    "arguments, told",
    [
        ((4, 4, ["qkv", "to_q"]), "lora.targets: to_q; choose from beta_proj, expand"),
        ((4, 4, ["roj"]), "lora.targets: roj; choose"),
        ((4, 4, ["depthwise"]), "depthwise"),  # a convolution
        ((4, 4, []), "none given"),
        ((0, 4, ["qkv"]), "rank=0"),
        ((4, 0.0, ["qkv"]), "alpha=0.0"),
        ((1.5, 4, ["qkv"]), "rank=1.5"),
    ],
)
def test_mistakes_are_named_and_change_nothing(arguments, told):
    model = _model()
    with pytest.raises(ValueError, match="lora") as caught:
        lora.add(model, *arguments)
    assert told in str(caught.value)
    assert all(p.requires_grad for p in model.parameters()) and not _adapters(model)


def test_merged_weights_are_the_same_model():
    model = _adapted()
    merged = lora.merge(_model().state_dict(), _adapters(model), 6 / 3)
    whole = _model()
    whole.load_state_dict(merged)
    x, t, cond = _inputs()
    out = model(x, t, cond)[0]
    torch.testing.assert_close(whole(x, t, cond)[0], out, rtol=1e-4, atol=1e-4)
    assert (out - _model()(x, t, cond)[0]).abs().max() > 0.1
    changed = {k.replace("lora_A.", "") for k in _adapters(model) if "lora_A" in k}
    assert {k for k, v in _model().state_dict().items() if not torch.equal(merged[k], v)} == changed


def test_merging_into_bf16_keeps_what_adapters_add():
    base = {k: v.bfloat16() for k, v in _model().state_dict().items()}
    adapters = {k: 1e-3 * v for k, v in _adapters(_adapted()).items()}
    merged = lora.merge(base, adapters, 1.0)
    name = "blocks.0.attn.qkv."
    added = adapters[f"{name}lora_B.weight"] @ adapters[f"{name}lora_A.weight"]
    torch.testing.assert_close(merged[f"{name}weight"] - base[f"{name}weight"].float(), added, rtol=0, atol=1e-7)


def test_peft_reads_our_adapters_and_computes_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    ours = _adapted()
    config, tensors = lora.to_peft(_adapters(ours), str(tmp_path), 3, 6, TARGETS)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    theirs = peft.PeftModel.from_pretrained(_model(), str(tmp_path)).eval()
    stored = peft.get_peft_model_state_dict(theirs)
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[k], tensors[k]) for k in tensors)
    x, t, cond = _inputs()
    out = ours(x, t, cond)[0]
    assert torch.equal(theirs(x, t, cond)[0], out)
    merged = lora.merge(_model().state_dict(), _adapters(ours), 2.0)
    unloaded = theirs.merge_and_unload()
    assert isinstance(unloaded, WorldModel)
    for name, tensor in unloaded.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)


def test_peft_starts_with_the_same_layers_and_sizes():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS)
    theirs = peft.get_peft_model_state_dict(peft.inject_adapter_in_model(config, _model()))
    ours = _adapters(_adapted())
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}


def test_peft_format_there_and_back_and_foreign_adapters_are_refused():
    adapters = _adapters(_adapted())
    config, tensors = lora.to_peft(adapters, "base", 3, 6, TARGETS)
    again, scale = lora.from_peft(config, tensors)
    assert scale == 2.0 and again.keys() == adapters.keys() and all(again[k] is tensors[lora._PEFT + k] for k in again)
    for change in ({"use_dora": True}, {"peft_type": "LOHA"}, {"bias": "all"}, {"rank_pattern": {"qkv": 4}}):
        with pytest.raises(ValueError, match=next(iter(change))):
            lora.from_peft({**config, **change}, tensors)
    with pytest.raises(ValueError, match="lora_embedding_A"):
        lora.from_peft(config, {"base_model.model.text.lora_embedding_A": torch.zeros(2, 2)})


@pytest.mark.parametrize("broken", ["lora_A.weight", "lora_B.weight", "base", "rank"])
def test_adapters_that_do_not_fit_the_base_are_refused(broken):
    base, adapters, name = _model().state_dict(), _adapters(_adapted(["x_embedder"])), "x_embedder."
    if broken == "base":
        base.pop(f"{name}weight")
    elif broken == "rank":
        adapters[f"{name}lora_A.weight"] = adapters[f"{name}lora_A.weight"][:2]
    else:
        adapters.pop(name + broken)
    with pytest.raises(ValueError, match=r"adapter x_embedder.lora_\*"):
        lora.merge(base, adapters, 1.0)


def test_training_holds_the_frozen_base_once():
    """Only adapters are optimised, averaged apart and saved; the average reads the base's own memory."""
    model = _model()
    lora.add(model, 3, 6, TARGETS)
    text = ByteTextEncoder(16, 8, 1, 2).requires_grad_(False)
    codec = SimpleNamespace(stride=(4, 8, 8))
    module = WorldModelTraining(model, text, codec, seed=1, global_batch=1, max_samples=8, objective=flow_matching)
    names = {f"model.{name}" for name in _adapters(model)}
    assert module.weights().keys() == module.ema_weights().keys() == names
    trained = [p for group in module.configure_optimizers().param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    own = dict(model.named_parameters())
    for name, p in module.ema["model"].named_parameters():
        assert (p is own[name]) == ("lora_" not in name) and torch.equal(p, own[name])
    assert all(p is q for p, q in zip(module.ema["text"].parameters(), text.parameters()))


def test_the_preset_adapts_a_release_and_its_twin_the_tiny_run():
    for words, base in (([], "weights/SANA-WM_bidirectional"), (["size=tiny"], "runs/world_model/tiny/seed1")):
        cfg = command.compose("train", ["experiments=world_model/lora", *words])
        assert cfg.init_from == base and (cfg.lora.rank, list(cfg.lora.targets)) == (16, TARGETS)
        with torch.device("meta"):
            lora.add(model := instantiate(cfg.model), **cfg.lora)
        if not words:
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 20_070_400

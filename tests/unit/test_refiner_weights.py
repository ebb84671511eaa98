"""What the refiner reads beside its latents: weights, LoRA adapters, and text through Gemma 3 and the connectors."""

import dataclasses

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import LTX2VideoTransformer3DModel
from safetensors.torch import save_file

from tests.unit.tiny_refiner import SIZES, TARGETS, TINY, inputs, refiner, save_transformer
from vgr.models.ltx2_text import Gemma3, LTX2Text
from vgr.models.refiner import Refiner
from vgr.nn import lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refiner")
    save_transformer(folder)
    return folder


def _trained_lora(model, rank=3):
    lora.add(model, rank, rank, TARGETS)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.copy_(torch.randn(parameter.shape))
    return model


def test_lora_trains_attention_and_feed_forward_alone(folder):
    model = refiner(folder)
    half = Refiner.from_pretrained(folder)
    lora.add(half, 3, 3, TARGETS)
    kinds = {p.dtype for p in half.parameters() if p.requires_grad}, {p.dtype for p in half.parameters()}
    assert kinds == ({torch.float32}, {torch.float32, torch.bfloat16})
    lora.add(model, 3, 3, TARGETS)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    names = {n.removeprefix("transformer.transformer_blocks.")[2:].split(".lora_")[0] for n in trained}
    attention = {f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")}
    assert names == attention | {"ff.net.0.proj", "ff.net.2"}
    x, t, cond = inputs(3)
    assert torch.equal(model(x, t, cond)[0], refiner(folder)(x, t, cond)[0])  # B starts at zero


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model."])
def test_lora_merges_into_the_distilled_model(folder, tmp_path, prefix):
    """Trained on the base; loaded and merged, the distilled weights plus B A, and the same outputs as unmerged."""
    trained = _trained_lora(refiner(folder))
    tensors = {k.removeprefix("transformer."): v for k, v in trained.state_dict().items() if ".lora_" in k}
    sound = {"transformer_blocks.0.audio_attn1.to_q.lora_A.weight": torch.ones(3, 16)}
    file = tmp_path / "adapter.safetensors"
    save_file({prefix + k: v for k, v in {**tensors, **sound}.items()}, file)
    original = LTX2VideoTransformer3DModel.from_pretrained(folder / "transformer")
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    original.save_pretrained(tmp_path / "transformer")
    model = refiner(tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, t, cond = inputs(4)
    with torch.no_grad():
        plain, _ = model(x, t, cond)
        model.load_lora(file)
        unmerged, _ = model(x, t, cond)
        model.merge_lora()
        merged, _ = model(x, t, cond)
    assert (unmerged - plain).abs().max() > 0.01
    torch.testing.assert_close(merged, unmerged, atol=1e-5, rtol=1e-5)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, weight in before.items():
        layer = name.removeprefix("transformer.").removesuffix(".weight")
        if f"{layer}.lora_A.weight" in tensors:
            weight = weight + tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(after[name], weight, atol=1e-5, rtol=1e-5)


def test_lora_keeps_the_alpha_it_was_trained_with(folder, tmp_path):
    from peft import LoraConfig

    model = refiner(folder)
    model.transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["attn1.to_q"], init_lora_weights=False))
    x, t, cond = inputs(3)
    with torch.no_grad():
        expected, _ = model(x, t, cond)
        model.transformer.save_lora_adapter(tmp_path / "lora")
        loaded = refiner(folder)
        loaded.load_lora(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
        torch.testing.assert_close(loaded(x, t, cond)[0], expected)


def test_lora_that_does_not_fit_is_listed_and_changes_nothing(folder, tmp_path):
    name, file = "transformer_blocks.0.attn1.to_", tmp_path / "bad.safetensors"
    bad = {
        f"{name}q.lora_A.weight": torch.ones(2, 7), f"{name}q.lora_B.weight": torch.ones(24, 2),
        f"{name}k.lora_A.weight": torch.ones(2, 24), f"{name}z.lora_A.weight": torch.ones(2, 24),
        f"{name}v.lora_A.weight": torch.ones(2, 24), f"{name}v.lora_B.weight": torch.ones(24, 3),
        f"{name}q.alpha": torch.ones(()),
    }  # fmt: skip
    save_file(bad, file)
    model = refiner(folder)
    keys = [*model.state_dict()]
    with pytest.raises(ValueError) as error:
        model.load_lora(file)
    for part in (
        "q.lora_A.weight (2, 7)", "k.lora_B.weight is missing", "z.lora_A.weight belongs to no linear layer",
        "v.lora_A.weight (2, 24) beside (24, 3)", "q.alpha belongs to no linear layer",
    ):  # fmt: skip
        assert part in str(error.value)
    assert [*model.state_dict()] == keys
    save_file({"transformer_blocks.0.audio_attn1.to_q.lora_A.weight": torch.ones(3, 16)}, file)
    with pytest.raises(ValueError, match="no tensors for the video transformer"):
        model.load_lora(file)
    with pytest.raises(ValueError, match="no .safetensors file"):
        model.load_lora(tmp_path)


def _text_parts(folder):
    """connectors/ as diffusers writes it, and random hidden states of two layers and the embedding."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    torch.manual_seed(3)
    connectors = LTX2TextConnectors(
        caption_channels=10, text_proj_in_factor=3, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=5, video_connector_num_layers=1, video_connector_num_learnable_registers=4,
        audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=5, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=4,
    )  # fmt: skip
    connectors.save_pretrained(folder / "connectors")
    states = torch.randn(2, 8, 10, 3)
    mask = torch.tensor([[0] * 3 + [1] * 5, [0] * 6 + [1] * 2])
    return connectors, states, mask


def test_text_is_stacked_states_through_the_connectors(folder, tmp_path):
    connectors, states, mask = _text_parts(tmp_path)
    asked = []
    text = LTX2Text(tmp_path, dtype="float32", prompt_states=lambda p: (asked.append(p), (states, mask))[1])
    told = text(((" a road ",), ("rain",)))
    assert asked == [["a road", "rain"]] and text.width == 10 and not text.state_dict() and not [*text.parameters()]
    with torch.no_grad():
        expected, _, kept = connectors(states, mask)
    assert torch.equal(told.states, expected[:, None]) and torch.equal(told.mask, kept[:, None].bool())
    with torch.no_grad():  # what stands under the padding is not read
        unread = lambda p: (states + 9.0 * (1 - mask)[:, :, None, None], mask)  # noqa: E731
        told_again = LTX2Text(tmp_path, 10, dtype="float32", prompt_states=unread)(((" a",), ("b",)))
    torch.testing.assert_close(told_again.states, told.states)
    x, t, cond = inputs(3)
    v, _ = refiner(folder)(x, t, dataclasses.replace(cond, text=told))
    assert v.isfinite().all()
    with pytest.raises(ValueError, match="one prompt a video, got 2 shots"):
        text((("a", "b"), ("c",)))
    text = LTX2Text(tmp_path, prompt_states=lambda p: (states[..., :2], mask))
    with pytest.raises(ValueError, match="text.width=9, but the connectors .* are 10 wide"):
        LTX2Text(tmp_path, 9, prompt_states=unread)
    with pytest.raises(ValueError, match=r"hidden states \(N,J,10,3\).*got \(2, 8, 10, 2\)"):
        text((("a",), ("b",)))


def save_gemma3(folder):
    """text_encoder/ of a tiny Gemma 3, its tokenizer of letters too."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    GemmaTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], add_bos_token=True).save_pretrained(folder)
    torch.manual_seed(0)
    language = Gemma3TextConfig(
        vocab_size=64, hidden_size=10, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=6, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28)
    config = Gemma3Config(text_config=language, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    return model


def test_gemma3_gives_every_layer_padded_on_the_left(tmp_path):
    pytest.importorskip("transformers")
    model = save_gemma3(tmp_path)
    states, mask = Gemma3(tmp_path, length=8, dtype=torch.float32).eval()(["abc", "abcdefghijk"])
    assert states.shape == (2, 8, 10, 3) and mask.tolist() == [[0] * 4 + [1] * 4, [1] * 8]
    alone = {"input_ids": torch.tensor([[2, 6, 7, 8]]), "position_ids": torch.arange(4, 8)[None]}
    with torch.no_grad():
        out = model.model.language_model(**alone, output_hidden_states=True)
    torch.testing.assert_close(states[0, 4:], torch.stack(out.hidden_states, -1)[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="no local folder"):
        Gemma3(tmp_path / "elsewhere")


def test_shards_are_read_where_the_releases_keep_them(folder, tmp_path):
    place = tmp_path / "refiner" / "transformer"
    original = LTX2VideoTransformer3DModel.from_pretrained(folder / "transformer")
    original.save_pretrained(place, max_shard_size="30KB")
    assert len(list(place.glob("*.safetensors"))) > 1
    expected = refiner(folder).state_dict()
    for source in (tmp_path, tmp_path / "refiner", place):
        loaded = refiner(source).state_dict()
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[k], v) for k, v in expected.items())


def test_missing_parts_and_other_models_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no connectors/.*refiner_diffusers/"):
        LTX2Text(folder)
    with pytest.raises(FileNotFoundError, match="needs revision"):
        Refiner.from_pretrained("Efficient-Large-Model/SANA-WM_bidirectional")
    with pytest.raises(ValueError, match="cross_attn_mod=True, as later"):
        Refiner(**SIZES, options={"cross_attn_mod": True})
    LTX2VideoTransformer3DModel(**TINY | {"num_layers": 1}).save_pretrained(tmp_path / "transformer")
    (tmp_path / "transformer" / "config.json").write_text((folder / "transformer" / "config.json").read_text())
    with pytest.raises(ValueError, match="tensors missing .*transformer_blocks.1"):
        Refiner.from_pretrained(tmp_path)

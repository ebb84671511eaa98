"""The UMT5 text encoder on a tiny random model and tokenizer in the real file format, against diffusers' pipeline."""

import copy
import json
import shutil
import sys
import types

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import UMT5Config, UMT5EncoderModel

from vgr.models.umt5 import NEGATIVE_PROMPT, UMT5Text, clean
from vgr.nn.frozen import from_arrays, to_arrays

LENGTH = 12
PROMPT, LONG = "a red box", "one two three four five six seven eight nine ten"
MESSY = "  a &amp;amp;\n\tred &lt;box&gt; "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the release ships: tokenizer/ and text_encoder/, its one embedding stored once and not said to be tied."""
    folder = tmp_path_factory.mktemp("umt5")
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*(f"<0x{i:02X}>" for i in range(256)), *letters, *"▁&<>，", "▁a", "▁red", "ed", "one", "▁t"]
    vocabulary = [*((s, 0.0) for s in special), *((p, -2.0 - i / 64) for i, p in enumerate(pieces))]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=3, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    settings = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=304, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
    )  # fmt: skip
    network = UMT5EncoderModel(config)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.3)
    network.save_pretrained(folder / "text_encoder")
    assert "encoder.embed_tokens.weight" not in load_file(folder / "text_encoder" / "model.safetensors")
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    return folder


def _text(folder, **options):
    return UMT5Text(folder, **({"width": 16, "length": LENGTH, "dtype": "float32"} | options))


def _network(folder):
    return UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval()


@pytest.mark.parametrize("prompt", [PROMPT, LONG, MESSY, ""])
def test_states_equal_diffusers_pipeline(folder, prompt):
    pytest.importorskip("diffusers")
    from diffusers import WanPipeline

    text = _text(folder)
    pipe = types.SimpleNamespace(tokenizer=text.tokenizer, text_encoder=_network(folder), _execution_device="cpu")
    with torch.no_grad():
        expected = WanPipeline._get_t5_prompt_embeds(pipe, prompt, max_sequence_length=LENGTH)
    got = text(((prompt,),))
    used = got.mask.shape[-1]
    assert got.mask.all() and got.states.shape == (1, 1, used, 16) and used == {LONG: LENGTH, "": 1}.get(prompt, used)
    torch.testing.assert_close(got.states[0], expected[:, :used], atol=1e-5, rtol=1e-5)
    assert not expected[:, used:].any() and (expected[:, :used].abs().amax(-1) > 0.1).all()


def test_the_null_prompt_is_the_end_token_and_the_negative_prompt_is_text(folder):
    text = _text(folder)
    with torch.no_grad():
        end = _network(folder)(torch.tensor([[1]])).last_hidden_state
    batch = text((("", LONG),))
    torch.testing.assert_close(batch.states[:, 0, :1], end, atol=1e-5, rtol=1e-5)
    assert batch.mask[0, 0].tolist() == [True] + [False] * (LENGTH - 1)
    assert text.tokenizer.encode(LONG, max_length=LENGTH, truncation=True)[-1] == 1  # a cut text keeps its end
    assert text(((NEGATIVE_PROMPT,),)).mask.shape[-1] > 1 and len(NEGATIVE_PROMPT.split("，")) == 28


def test_tokens_are_those_of_the_tokenizers_file(folder):
    tokens = _text(folder).tokenizer.encode("a 漢é")
    assert tokens == Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")).encode("a 漢é").ids
    assert [t - 4 for t in tokens[-6:-1]] == list("漢é".encode()) and tokens[-1] == 1


def test_batches_of_ragged_shots_equal_single_texts_with_zeros_behind(folder):
    text = _text(folder)
    batch = text(((PROMPT, "", LONG), (LONG,), (PROMPT, PROMPT)))
    assert batch.states.shape == (3, 3, LENGTH, 16) and batch.states.dtype == torch.float32
    for b, s, caption in ((0, 0, PROMPT), (0, 1, ""), (0, 2, LONG), (1, 0, LONG), (2, 1, PROMPT)):
        alone = text(((caption,),))
        used = alone.mask.shape[-1]
        assert batch.mask[b, s].tolist() == [True] * used + [False] * (LENGTH - used)
        torch.testing.assert_close(batch.states[b, s, :used], alone.states[0, 0], atol=1e-5, rtol=1e-5)
    assert not batch.mask[1, 1:].any() and not batch.mask[2, 2].any()
    assert torch.equal(batch.states, batch.states * batch.mask.unsqueeze(-1))


def test_each_text_is_encoded_once(folder):
    text, sizes = _text(folder), []
    text._networks[0].register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    text(((PROMPT, ""), (PROMPT,), (PROMPT, PROMPT)))
    assert len(sizes) == 1 and sizes[0][0] == 2 and sizes[0][1] < LENGTH


def test_prompts_are_cleaned_as_wan_does(monkeypatch):
    pytest.importorskip("diffusers")
    from diffusers.pipelines.wan import pipeline_wan

    for prompt in (PROMPT, MESSY, "", "\u3000a\u00a0b\x85\u2028c", NEGATIVE_PROMPT):
        assert clean(prompt) == pipeline_wan.prompt_clean(prompt)
    assert clean(MESSY) == "a & red <box>"
    monkeypatch.setitem(sys.modules, "ftfy", types.SimpleNamespace(fix_text=lambda text: text.replace("，", ",")))
    assert clean(" a，&amp;gt; ") == "a,>"


def test_the_network_is_frozen_and_no_part_of_checkpoints(folder):
    text = _text(folder)
    states = text(((PROMPT,),)).states
    assert not list(text.parameters()) and not text.state_dict() and not states.requires_grad
    assert not text.train()._networks[0].training
    torch.testing.assert_close(copy.deepcopy(text)(((PROMPT,),)).states, states)
    again = UMT5Text(**text.config)
    torch.testing.assert_close(again(((PROMPT,),)).states, states)
    assert all(p.is_meta and not p.requires_grad for p in again.to("meta")._networks[0].parameters())
    half = _text(folder, dtype="bfloat16")
    assert half._networks[0].dtype == torch.bfloat16
    got = half(((PROMPT,),)).states
    assert got.dtype == torch.float32 and 0 < (got - states).abs().max() < 0.2
    with torch.device("meta"):
        assert UMT5Text("nowhere").width == 4096  # reads nothing


def test_cached_embeddings_come_back(folder):
    whole = _text(folder)(((PROMPT, LONG), (PROMPT,), ("", PROMPT)))
    arrays = to_arrays(whole)
    assert [a.shape[0] for a, _ in arrays] == [2, 1, 2] and all(a.dtype == "float16" for a, _ in arrays)
    back = from_arrays(arrays)
    assert back.mask.equal(whole.mask)
    torch.testing.assert_close(back.states, whole.states, atol=1e-6, rtol=1e-3)


def test_refuses_what_does_not_fit(folder, tmp_path):
    cases = [
        (lambda: _text(folder, width=4096), "text.width=4096, but .* is 16 wide"),
        (lambda: _text(folder, dtype="int8"), "choose float32 or bfloat16"),
        (lambda: UMT5Text("Some/Repository"), "needs text.revision.*text_encoder/"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    network = _network(folder)
    state = {k: v for k, v in network.state_dict().items() if k != "encoder.final_layer_norm.weight"}
    network.save_pretrained(tmp_path / "text_encoder", state_dict=state)
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="lacks 1 weights of a UMT5EncoderModel"):
        _text(tmp_path)
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    with pytest.raises(ValueError, match="does not end texts with <eos>"):
        _text(tmp_path)

"""The Gemma 2 text encoder on a tiny random model and tokenizer in the real file format, against direct calls."""

import copy
import types

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, GemmaTokenizer

from vgr.models.gemma import Gemma2Text, read_instruction
from vgr.nn.frozen import from_arrays, to_arrays

LINES = ["Describe the scene.", "User Prompt: "]
LENGTH = 12
PROMPT, LONG = "a red box", "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the release ships: tokenizer, Gemma2ForCausalLM in safetensors, and a config.yaml."""
    folder = tmp_path_factory.mktemp("gemma")
    letters = "▁.:" + "".join(map(chr, [*range(ord("a"), ord("z") + 1), ord("D"), ord("U"), ord("P"), 10]))
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, "▁a", "re", "red", "▁red", "one", "▁t", "▁th"]
    merges = [("▁", "a"), ("r", "e"), ("re", "d"), ("▁", "red"), ("▁", "t"), ("▁t", "h")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True).save_pretrained(folder)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder)
    lines = "".join(f"    - '{line}'\n" for line in LINES)
    (folder / "config.yaml").write_text(f"text_encoder:\n  model_max_length: 300\n  chi_prompt:\n{lines}")
    return folder


def _text(folder, **options):
    options = {"width": 16, "length": LENGTH, "dtype": "float32"} | options
    return Gemma2Text(folder, folder / "config.yaml", **options)


def test_prompts_are_sliced_as_the_release_slices_them(folder):
    text = _text(folder)
    network = Gemma2ForCausalLM.from_pretrained(folder, attn_implementation="eager").model.eval()
    before = text.tokenizer.encode("\n".join(LINES))
    assert before[0] == text.tokenizer.bos_token_id
    for prompt in (PROMPT, LONG):
        ids = text.tokenizer.encode("\n".join(LINES) + prompt)[: len(before) + LENGTH - 2]
        with torch.no_grad():
            states = network(torch.tensor([ids])).last_hidden_state[0]
        expected = torch.cat([states[:1], states[len(before) - 1 :]])  # <bos> and the prompt
        got = text(((prompt,),))
        assert got.mask.all() and got.states.shape == (1, 1, len(expected), 16)
        torch.testing.assert_close(got.states[0, 0], expected, atol=1e-5, rtol=1e-5)
    assert len(expected) == LENGTH


def test_prompts_and_null_equal_diffusers_pipeline(folder):
    pytest.importorskip("diffusers")
    from diffusers.pipelines.sana_wm.pipeline_sana_wm import SanaWMPipeline

    text = _text(folder)
    network = Gemma2ForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    pipe = types.SimpleNamespace(tokenizer=text.tokenizer, text_encoder=network, _execution_device="cpu")
    with torch.no_grad():
        states, mask, null, null_mask = SanaWMPipeline.encode_prompt(
            pipe, PROMPT, "", max_sequence_length=LENGTH, chi_prompt=LINES
        )
    got, unconditional = text(((PROMPT,),)), text((("",),))
    for ours, theirs, their_mask in ((got, states, mask), (unconditional, null, null_mask)):
        used = int(their_mask.sum())
        assert ours.mask.shape == (1, 1, used) and their_mask[0, :used].all()
        torch.testing.assert_close(ours.states[0], theirs[0, :, :used], atol=1e-5, rtol=1e-5)
    assert unconditional.mask.shape[-1] == 1  # <bos> alone


def test_batches_of_ragged_shots_equal_single_texts(folder):
    text = _text(folder)
    batch = text(((PROMPT, "", LONG), (LONG,), (PROMPT, PROMPT)))
    assert batch.states.shape == (3, 3, LENGTH, 16) and batch.states.dtype == torch.float32
    for b, s, caption in ((0, 0, PROMPT), (0, 1, ""), (0, 2, LONG), (1, 0, LONG), (2, 1, PROMPT)):
        alone = text(((caption,),))
        used = alone.mask.shape[-1]
        assert batch.mask[b, s].tolist() == [True] * used + [False] * (LENGTH - used)
        torch.testing.assert_close(batch.states[b, s, :used], alone.states[0, 0], atol=1e-5, rtol=1e-5)
    assert not batch.mask[1, 1:].any() and not batch.mask[2, 2].any()


def test_the_network_is_frozen_and_no_part_of_checkpoints(folder):
    text = _text(folder)
    states = text(((PROMPT,),)).states
    assert not list(text.parameters()) and not text.state_dict() and not states.requires_grad
    average = copy.deepcopy(text)
    torch.testing.assert_close(average(((PROMPT,),)).states, states)
    again = Gemma2Text(**text.config)
    torch.testing.assert_close(again(((PROMPT,),)).states, states)
    moved = again.to("meta")._networks[0]
    assert all(p.is_meta and not p.requires_grad for p in moved.parameters())
    half = _text(folder, dtype="bfloat16")
    assert half._networks[0].dtype == torch.bfloat16
    assert (half(((PROMPT,),)).states - states).abs().max() < 0.2
    with torch.device("meta"):
        assert Gemma2Text("nowhere", "nothing").width == 2304  # reads nothing


def test_cached_embeddings_come_back(folder, tmp_path):
    text = _text(folder)
    whole = text(((PROMPT, LONG), (PROMPT,), ("", PROMPT)))
    arrays = to_arrays(whole)
    assert [a.shape[:2] for a, _ in arrays] == [(2, LENGTH), (1, 7), (2, 7)]
    stored = []
    for i, (states, lengths) in enumerate(arrays):
        np.save(tmp_path / f"{i}.text.npy", states, allow_pickle=False)
        stored.append((np.load(tmp_path / f"{i}.text.npy", allow_pickle=False), lengths))
    back = from_arrays(stored)
    assert back.mask.equal(whole.mask) and back.states.dtype == torch.float32
    expected = whole.states * whole.mask.unsqueeze(-1)
    torch.testing.assert_close(back.states, expected, atol=1e-6, rtol=1e-3)
    with pytest.raises(ValueError, match="does not fit its lengths"):
        from_arrays([(arrays[0][0][:1], arrays[0][1])])


def test_refuses_what_does_not_fit(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.yaml beside the released weights"):
        Gemma2Text(folder, tmp_path / "config.yaml")
    for content in ("", "text_encoder: {}", "text_encoder:\n  chi_prompt: once"):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(ValueError, match="no text_encoder.chi_prompt"):
            read_instruction(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="text.width=2304, but .* is 16 wide"):
        _text(folder, width=2304)
    with pytest.raises(ValueError, match="choose float32 or bfloat16"):
        _text(folder, dtype="int8")
    with pytest.raises(ValueError, match="needs text.revision"):
        Gemma2Text("Some/Repository", folder / "config.yaml")
    for file in folder.glob("*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    AutoTokenizer.from_pretrained(folder, add_bos_token=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not begin texts with <bos>"):
        _text(tmp_path)
    with pytest.raises(ValueError, match="lacks 1 weights of a Gemma2Model"):
        network = Gemma2ForCausalLM.from_pretrained(folder)
        state = {k: v for k, v in network.state_dict().items() if k != "model.norm.weight"}
        network.save_pretrained(tmp_path, state_dict=state)
        for file in folder.glob("tokenizer*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        Gemma2Text(tmp_path, folder / "config.yaml", width=16)

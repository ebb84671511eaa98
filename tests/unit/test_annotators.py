"""Captions and metres by tiny random networks in the real file formats, against the networks called directly."""

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DPTImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vgr.data import annotators
from vgr.data.annotators import PROMPT, Captioner, DepthModel

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]


def tokenizer():
    """Of bytes, which every text can be told in."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *letters])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def language(words):
    return dict(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.4,
    )  # fmt: skip


def sight(side):
    return dict(
        image_size=side, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.4,
    )  # fmt: skip


def idefics3():
    """The format of SmolVLM."""
    words, side = tokenizer(), {"longest_edge": 32}
    looks = Idefics3ImageProcessor(size=side, max_image_size=side, do_image_splitting=False)
    processor = Idefics3Processor(looks, words, image_seq_len=4, chat_template=TEMPLATE)
    config = Idefics3Config(vision_config=sight(32), text_config={"model_type": "llama", **language(words)},
                            scale_factor=2, image_token_id=3, pad_token_id=0)  # fmt: skip
    return processor, Idefics3ForConditionalGeneration(config)


def llava():
    words = tokenizer()
    looks = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(looks, words, patch_size=8, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=TEMPLATE)  # fmt: skip
    config = LlavaConfig(vision_config={"model_type": "clip_vision_model", **sight(32)},
                         text_config={"model_type": "llama", **language(words)}, image_token_index=3)  # fmt: skip
    return processor, LlavaForConditionalGeneration(config)


def chat_model(folder, family):
    torch.manual_seed(0)
    for made in family():
        made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[idefics3, llava], ids=lambda f: f.__name__)
def chat(request, tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp(f"tiny-{request.param.__name__}"), request.param)


def shots():
    return list(np.random.default_rng(0).integers(0, 256, (2, 3, 30, 40, 3), dtype=np.uint8))


def test_a_caption_is_what_the_model_generates_for_the_frames_and_the_prompt(chat, monkeypatch):
    monkeypatch.setattr(annotators, "MAX_TOKENS", 12)
    told = Captioner(chat)(shots())
    processor = transformers.AutoProcessor.from_pretrained(chat)
    model = transformers.AutoModelForImageTextToText.from_pretrained(chat).eval()
    for frames, caption in zip(shots(), told, strict=True):
        text = f"<s>user: {'<image>' * 3}{PROMPT}</s>assistant:"
        given = processor(text=text, images=[[Image.fromarray(f) for f in frames]], return_tensors="pt",
                          add_special_tokens=False)  # fmt: skip
        with torch.no_grad():
            tokens = model.generate(**given, do_sample=False, max_new_tokens=12)[0, given["input_ids"].shape[1] :]
        assert caption == " ".join(processor.tokenizer.decode(tokens, skip_special_tokens=True).split())
    assert told[0] and told[0] != told[1]  # it looks


def test_what_a_folder_lacks_is_told_with_where_to_get_it(chat, tmp_path):
    with pytest.raises(ValueError, match=r"source.captioner=nowhere: no local folder.*GB, Apache-2.0"):
        Captioner("nowhere")
    copy = tmp_path / "model"
    shutil.copytree(chat, copy)
    whole = Captioner(copy)
    (copy / "tokenizer.json").unlink()
    assert Captioner(copy).fingerprint != whole.fingerprint
    with pytest.raises(ValueError, match=r"(?s)source.captioner=.*model: .*; get for example .*GB, Apache-2.0"):
        whole(shots())
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no local folder with config.json and \*.safetensors"):
        Captioner(copy)


@pytest.fixture(scope="module")
def depth(tmp_path_factory):
    """Depth Anything's format, trained for metres."""
    folder = tmp_path_factory.mktemp("tiny-depth")
    torch.manual_seed(0)
    backbone = dict(model_type="dinov2", out_indices=[1, 2], reshape_hidden_states=False,
                    **{**sight(56), "patch_size": 14})  # fmt: skip
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=16, reassemble_factors=[2, 1],
                                 neck_hidden_sizes=[8, 8], fusion_hidden_size=8, head_hidden_size=4, max_depth=80,
                                 depth_estimation_type="metric")  # fmt: skip
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(folder)
    return folder


def test_depth_in_metres_is_the_models(depth):
    frames = shots()[0]
    found = DepthModel(depth)(frames)
    assert found.shape == (3, 30, 40) and found.dtype == np.float32 and (found > 0).all() and (found < 80).all()
    processor = transformers.AutoImageProcessor.from_pretrained(depth)
    model = transformers.AutoModelForDepthEstimation.from_pretrained(depth).eval()
    with torch.no_grad():
        raw = model(**processor(images=list(frames), return_tensors="pt")).predicted_depth
    wanted = torch.nn.functional.interpolate(raw[:, None], (30, 40), mode="bicubic")[:, 0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_relative_depth_is_refused(depth, tmp_path):
    shutil.copytree(depth, tmp_path / "relative")
    told = json.loads((depth / "config.json").read_text())
    (tmp_path / "relative/config.json").write_text(json.dumps({**told, "depth_estimation_type": "relative"}))
    with pytest.raises(ValueError, match="relative depth, not metres.*Metric-Outdoor-Small-hf.*MB, Apache-2.0"):
        DepthModel(tmp_path / "relative")

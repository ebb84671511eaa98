"""UMT5 as the causal video model's text encoder: transformers' encoder by composition, frozen (causal spec 2.2, 2.4).

A text is cleaned as Wan does it, and ends with </s>; behind it stand zero vectors, which the model attends. The null
prompt is the encoded empty string, its </s>; a negative prompt is something else, encoded text.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgr.nn import frozen

_RELEASE = (
    "text_encoder/ (11 GB in bfloat16) and tokenizer/ of Wan-AI/Wan2.1-T2V-1.3B-Diffusers (Apache 2.0) are the released"
)
# Wan's own negative prompt, that of its samplers (causal spec 6.1).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


class UMT5Text(frozen.FrozenText):
    """Captions to UMT5's last hidden states (B,S,J,width) fp32, exactly zero where the mask is false.

    folder: text_encoder/ and tokenizer/ inside, a local folder or a hub id, which needs a revision; width: checked
    against the weights; length: most tokens of a text, </s> among them; J is that of the longest text, the model adds
    the pads. dtype: of weights and activations; device: where they go first.

    On the meta device nothing is read. Raises ValueError or OSError for files that do not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        revision: str | None = None,
        width: int = 4096,
        length: int = 512,
        dtype: str = "bfloat16",
        device: str = "cpu",
    ) -> None:
        super().__init__(width, length)
        kind = frozen.dtype_of("text", dtype)
        self.config: dict[str, Any] = {
            "folder": str(folder), "revision": revision, "width": width, "length": length, "dtype": dtype,
        }  # fmt: skip
        if torch.get_default_device().type == "meta":
            return
        frozen.require_source("text", folder, revision, _RELEASE)
        # AutoTokenizer takes T5's class, which builds T5's own rules over UMT5's vocabulary: no bytes, <unk> at 2.
        self._load(
            "UMT5EncoderModel", folder, revision, kind, device, begins=False, tokenizer="PreTrainedTokenizerFast",
            inside=("tokenizer", "text_encoder"),
        )  # fmt: skip

    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        states, mask = self._states([clean(text) for text in texts], self.length)
        return states.masked_fill(~mask.unsqueeze(-1), 0.0), mask


def clean(text: str) -> str:
    """As Wan and diffusers clean prompts: HTML entities resolved twice, white space collapsed.

    Where ftfy is installed it goes first, as in Wan's own code: it mends broken encodings and, of good text, makes
    full-width punctuation and curly quotes plain.
    """
    try:
        import ftfy
    except ImportError:
        pass
    else:
        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())

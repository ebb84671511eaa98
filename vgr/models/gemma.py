"""Gemma 2 as the world model's text encoder: transformers' decoder by composition, frozen (spec 1.3).

A prompt follows the release's instruction, which is read from its config.yaml. Of instruction and prompt, tokenised
to n + length - 2 places (n the instruction's tokens, <bos> among them), position 0 and the last length - 1 stay: <bos>
and the prompt, whose first token has taken in the instruction's closing space. The empty string, the null prompt, is
encoded by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgr.nn import frozen

_RELEASE = "The release uses gemma-2-2b-it (5 GB, Gemma licence), for example Efficient-Large-Model/gemma-2-2b-it"


class Gemma2Text(frozen.FrozenText):
    """Captions to Gemma's last hidden states (B,S,J,width) fp32, without gradient.

    folder: weights and tokenizer, a local folder or a hub id, which needs a revision; prompt_config: the released
    config.yaml with text_encoder.chi_prompt; width: checked against the weights; length: most tokens of a prompt;
    dtype: of weights and activations; device: where they go first.

    On the meta device nothing is read. Raises ValueError or OSError for files that do not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        prompt_config: str | Path,
        revision: str | None = None,
        width: int = 2304,
        length: int = 300,
        dtype: str = "bfloat16",
        device: str = "cpu",
    ) -> None:
        super().__init__(width, length)
        kind = frozen.dtype_of("text", dtype)
        self.config: dict[str, Any] = {
            "folder": str(folder), "prompt_config": str(prompt_config), "revision": revision, "width": width,
            "length": length, "dtype": dtype,
        }  # fmt: skip
        if torch.get_default_device().type == "meta":
            return
        self.instruction = read_instruction(prompt_config)
        frozen.require_source("text", folder, revision, _RELEASE)
        # Eager attention is the one that caps logits everywhere.
        self._load("Gemma2Model", folder, revision, kind, device, begins=True, attn_implementation="eager")
        self.instruction_tokens = len(self.tokenizer.encode(self.instruction))

    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded: dict[str, tuple[Tensor, Tensor]] = {}
        for group, instructed in (([t for t in texts if t], True), ([t for t in texts if not t], False)):
            if group:
                encoded.update(zip(group, zip(*self._encode_group(group, instructed))))
        states, mask = (torch.stack(x) for x in zip(*(encoded[text] for text in texts)))
        return states, mask

    def _encode_group(self, texts: Sequence[str], instructed: bool) -> tuple[Tensor, Tensor]:
        """States (N,length,width) and mask (N,length) of texts after the instruction, or of texts alone."""
        before = self.instruction if instructed else ""
        extra = self.instruction_tokens - 2 if instructed else 0
        states, mask = self._states([before + text for text in texts], self.length + extra, "max_length")
        keep = [0, *range(1 + extra, self.length + extra)]
        return states[:, keep], mask[:, keep]


def read_instruction(path: str | Path) -> str:
    """text_encoder.chi_prompt of a released config.yaml, its lines joined. Raises ValueError or FileNotFoundError."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"text.prompt_config={path} does not exist; it is the config.yaml beside the released weights, for "
            "example of Efficient-Large-Model/SANA-WM_bidirectional"
        )
    section = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("text_encoder") or {}
    lines = section.get("chi_prompt")
    if not lines or not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"text.prompt_config={path} holds no text_encoder.chi_prompt (a list of lines), got {lines!r}")
    return "\n".join(lines)

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

import numpy as np
import torch
from torch import Tensor, nn

from vgr.types import TextStates

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Gemma2Text(nn.Module):
    """Captions to Gemma's last hidden states (B,S,J,width) fp32, without gradient.

    folder: weights and tokenizer, a local folder or a hub id, which needs a revision; prompt_config: the released
    config.yaml with text_encoder.chi_prompt; width: checked against the weights; length: most tokens of a prompt;
    dtype: of weights and activations; device: where they go first.

    The network is not among the module's parameters: optimizers, averages, checkpoints and copies leave it alone,
    `to` moves it. On the meta device nothing is read. Raises ValueError or OSError for files that do not fit.
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
        super().__init__()
        if dtype not in _DTYPES:
            raise ValueError(f"text.dtype={dtype}: choose {' or '.join(_DTYPES)}")
        self.config: dict[str, Any] = {
            "folder": str(folder), "prompt_config": str(prompt_config), "revision": revision, "width": width,
            "length": length, "dtype": dtype,
        }  # fmt: skip
        self.width, self.length = width, length
        self._networks: tuple[nn.Module, ...] = ()
        if torch.get_default_device().type == "meta":
            return
        self.instruction = read_instruction(prompt_config)
        self.tokenizer, network = _load(folder, revision, _DTYPES[dtype])
        if network.config.hidden_size != width:
            raise ValueError(f"text.width={width}, but {folder} is {network.config.hidden_size} wide: set it so")
        self.instruction_tokens = len(self.tokenizer.encode(self.instruction))
        self._networks = (network.to(device).requires_grad_(False).eval(),)

    def _apply(self, fn: Any, recurse: bool = True) -> Gemma2Text:
        for network in self._networks:
            network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gemma2Text:
        return self  # frozen: a running average of it is itself

    @torch.no_grad()
    def forward(self, captions: tuple[tuple[str, ...], ...]) -> TextStates:
        """B tuples of S captions to states on the network's device; fewer than S shots are padded with masked rows."""
        texts = dict.fromkeys(caption for row in captions for caption in row)  # each text is encoded once
        encoded: dict[str, tuple[Tensor, Tensor]] = {}
        for group, instructed in (([t for t in texts if t], True), ([t for t in texts if not t], False)):
            if group:
                encoded.update(zip(group, zip(*self._encode(group, instructed))))
        states, mask = next(iter(encoded.values()))
        blank = (torch.zeros_like(states), torch.zeros_like(mask))
        shots = max(len(row) for row in captions)
        cells = [encoded[row[s]] if s < len(row) else blank for row in captions for s in range(shots)]
        states, mask = (torch.stack(x).unflatten(0, (len(captions), shots)) for x in zip(*cells))
        used = int(mask.sum(-1).max())
        return TextStates(states[..., :used, :], mask[..., :used])

    def _encode(self, texts: Sequence[str], instructed: bool) -> tuple[Tensor, Tensor]:
        """States (N,length,width) and mask (N,length) of texts after the instruction, or of texts alone."""
        (network,) = self._networks
        before = self.instruction if instructed else ""
        extra = self.instruction_tokens - 2 if instructed else 0
        tokens = self.tokenizer(
            [before + text for text in texts],
            padding="max_length",
            max_length=self.length + extra,
            truncation=True,
            return_tensors="pt",
        ).to(network.device)
        keep = [0, *range(1 + extra, self.length + extra)]
        with torch.autocast(network.device.type, enabled=False):
            states = network(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False).last_hidden_state
        return states[:, keep].float(), tokens.attention_mask[:, keep].bool()


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


def _load(folder: str | Path, revision: str | None, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """Tokenizer, padding on the right, and decoder; every weight must be found."""
    if not Path(folder).is_dir() and revision is None:
        raise ValueError(
            f"text.folder={folder} is no local folder, and a hub id needs text.revision (a commit). The release uses "
            "gemma-2-2b-it (5 GB, Gemma licence), for example Efficient-Large-Model/gemma-2-2b-it"
        )
    from transformers import AutoTokenizer, Gemma2Model

    tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
    tokenizer.padding_side = "right"
    if tokenizer.bos_token_id is None or tokenizer.encode("") != [tokenizer.bos_token_id]:
        raise ValueError(f"{folder}: its tokenizer does not begin texts with <bos>, as Gemma's does; copy it again")
    network, found = Gemma2Model.from_pretrained(
        folder, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True,
        attn_implementation="eager",  # the one that caps logits everywhere
    )  # fmt: skip
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights of a Gemma 2 decoder, {missing[:3]}; copy it again")
    return tokenizer, network


def to_arrays(text: TextStates) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each sample the states (S,J,D) float16, what `<key>.text.npy` holds, and the lengths (S,) of its shots.

    J is the sample's longest shot; rows that pad a ragged batch are left out. Gemma's last norm bounds its states
    far below float16's limit.
    """
    arrays = []
    for states, mask in zip(text.states, text.mask):
        lengths = mask.sum(-1).cpu()
        shots = int((lengths > 0).sum())
        kept = states[:shots, : int(lengths.max())].half().cpu().numpy()
        arrays.append((kept, lengths[:shots].numpy()))
    return arrays


def from_arrays(arrays: Sequence[tuple[np.ndarray, np.ndarray]]) -> TextStates:
    """The inverse: a batch of cached embeddings, padded and fp32, on the CPU. ValueError where lengths do not fit."""
    for states, lengths in arrays:
        if states.ndim != 3 or lengths.shape != states.shape[:1] or lengths.max(initial=0) > states.shape[1]:
            raise ValueError(f"cached text of shape {states.shape} does not fit its lengths {lengths.tolist()}")
    shots, tokens = (max(states.shape[i] for states, _ in arrays) for i in (0, 1))
    out = torch.zeros(len(arrays), shots, tokens, arrays[0][0].shape[2])
    mask = torch.zeros(len(arrays), shots, tokens, dtype=torch.bool)
    for b, (states, lengths) in enumerate(arrays):
        s, j, _ = states.shape
        own = torch.arange(j) < torch.from_numpy(lengths).unsqueeze(-1)
        mask[b, :s, :j] = own
        out[b, :s, :j] = torch.from_numpy(states).float() * own.unsqueeze(-1)
    return TextStates(out, mask)

"""The refiner's text: Gemma 3's hidden states of all layers through LTX-2's connectors, frozen (spec 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vgr.models import ltx2_weights, weights
from vgr.types import TextStates

# Prompts to a language model's stacked hidden states (N,J,D,layers + 1), padded on the left, and their mask (N,J).
PromptStates = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


class LTX2Text(nn.Module):
    """Captions to what the refiner reads: Gemma 3's hidden states of all layers through LTX-2's connectors (spec 7).

    connectors: diffusers' `LTX2TextConnectors`, frozen; prompt_states: `gemma3(...)`, or a look-up of cached states.
    """

    def __init__(self, connectors: nn.Module, prompt_states: PromptStates) -> None:
        super().__init__()
        self.connectors = connectors.requires_grad_(False).eval()
        self.prompt_states = prompt_states
        self.width: int = connectors.video_connector.inner_dim

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        prompt_states: PromptStates,
        revision: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> LTX2Text:
        """The connectors of a local folder (connectors/ inside, or itself one) or a hub id, which needs a revision."""
        from diffusers.pipelines.ltx2 import LTX2TextConnectors

        config, tensors = ltx2_weights.read(source, revision, "connectors", "LTX2TextConnectors")
        text = cls(weights.build(LTX2TextConnectors, config), prompt_states)
        weights.assign(text.connectors, tensors, source, dtype=dtype)
        return text.requires_grad_(False)

    @torch.no_grad()
    def forward(self, captions: tuple[tuple[str, ...], ...]) -> TextStates:
        """B tuples of one caption each to states (B,1,J,width); ValueError for more shots or states that do not fit."""
        if any(len(row) != 1 for row in captions):
            raise ValueError(f"the refiner reads one prompt a video, got {max(map(len, captions))} shots in one")
        config, weight = self.connectors.config, next(self.connectors.parameters())
        states, mask = self.prompt_states([row[0].strip() for row in captions])
        if states.ndim != 4 or states.shape[2:] != (config.caption_channels, config.text_proj_in_factor):
            raise ValueError(
                f"the connectors take hidden states (N,J,{config.caption_channels},{config.text_proj_in_factor}), "
                f"those of every layer of Gemma 3 and of its embedding, got {tuple(states.shape)}"
            )
        video, _, mask = self.connectors(states.to(weight), mask.to(weight.device), padding_side="left")
        return TextStates(video.unsqueeze(1), mask.bool().unsqueeze(1))


def gemma3(
    folder: str | Path, length: int = 1024, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> PromptStates:
    """Gemma 3 (the release's 12B-it, 46 GB, Gemma licence) of a local folder, with its tokenizer.

    No instruction; prompts are cut or, on the left, padded to `length`. Raises ValueError or OSError.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"gemma3: {folder} is no local folder; the releases hold it as refiner/text_encoder/ "
            "(SANA-WM_bidirectional) and gemma3_12b/ (SANA-WM_streaming)"
        )
    from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    network, found = Gemma3ForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights of a Gemma 3, {missing[:3]}; copy it again")
    model = network.model.to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def prompt_states(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(device)
        out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True)
        return torch.stack(out.hidden_states, dim=-1), tokens.attention_mask

    return prompt_states

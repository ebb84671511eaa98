"""The refiner's text: Gemma 3's hidden states of all layers through LTX-2's connectors, frozen (spec 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgr.models import ltx2_weights, weights
from vgr.nn import frozen
from vgr.types import TextStates

# Prompts to a language model's stacked hidden states (N,J,D,layers + 1), padded on the left, and their mask (N,J).
PromptStates = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


class LTX2Text(frozen.FrozenText):
    """Captions to what the refiner reads: Gemma 3's hidden states of all layers through LTX-2's connectors (spec 7).

    folder: connectors/ and text_encoder/ inside; width: checked against the connectors' if given; length: tokens of a
    prompt; dtype: of weights and activations; device: where they go first; prompt_states: instead of Gemma 3.

    On the meta device nothing is read. Raises ValueError or OSError for files that do not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        width: int | None = None,
        length: int = 1024,
        dtype: str = "bfloat16",
        device: str = "cpu",
        prompt_states: PromptStates | None = None,
    ) -> None:
        super().__init__(width or 0, length)
        kind = frozen.dtype_of("text", dtype)
        self.config: dict[str, Any] = {"folder": str(folder), "width": width, "length": length, "dtype": dtype}
        if torch.get_default_device().type == "meta":
            return
        from diffusers.pipelines.ltx2 import LTX2TextConnectors

        path = ltx2_weights.find(folder, None, "connectors")
        config, tensors = weights.load_folder(path, {"LTX2TextConnectors": lambda config, tensors: (config, tensors)})
        connectors = weights.build(LTX2TextConnectors, config)
        weights.assign(connectors, tensors, folder, dtype=kind)
        self.width = connectors.video_connector.inner_dim
        if width not in (None, self.width):
            raise ValueError(f"text.width={width}, but the connectors of {folder} are {self.width} wide: set it so")
        networks = [connectors]
        if prompt_states is None:
            networks.append(Gemma3(Path(folder, "text_encoder"), length, kind))
        self._networks = tuple(x.to(device).requires_grad_(False).eval() for x in networks)
        self._prompt_states = (prompt_states or networks[-1],)  # in a tuple, as the networks: not among the parameters

    @torch.no_grad()
    def forward(self, captions: tuple[tuple[str, ...], ...]) -> TextStates:
        """B tuples of one caption each to states (B,1,J,width); ValueError for more shots or states that do not fit."""
        if any(len(row) != 1 for row in captions):
            raise ValueError(f"the refiner reads one prompt a video, got {max(map(len, captions))} shots in one")
        connectors = self._networks[0]
        config, weight = connectors.config, next(connectors.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            states, mask = self._prompt_states[0]([row[0].strip() for row in captions])
            if states.ndim != 4 or states.shape[2:] != (config.caption_channels, config.text_proj_in_factor):
                raise ValueError(
                    f"the connectors take hidden states (N,J,{config.caption_channels},{config.text_proj_in_factor}), "
                    f"those of every layer of Gemma 3 and of its embedding, got {tuple(states.shape)}"
                )
            video, _, mask = connectors(states.to(weight), mask.to(weight.device), padding_side="left")
        return TextStates(video.unsqueeze(1), mask.bool().unsqueeze(1))


class Gemma3(nn.Module):
    """Gemma 3 (the release's 12B-it, 46 GB, Gemma licence) of a local folder, with its tokenizer, as `PromptStates`.

    No instruction; prompts are cut or, on the left, padded to `length`. Raises ValueError or OSError.
    """

    def __init__(self, folder: str | Path, length: int = 1024, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        if not Path(folder).is_dir():
            raise ValueError(
                f"Gemma 3: {folder} is no local folder; the releases hold it as refiner/text_encoder/ "
                f"(SANA-WM_bidirectional) and gemma3_12b/ (SANA-WM_streaming). {ltx2_weights.HOW_TO_GET}"
            )
        from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

        self.tokenizer, self.length = AutoTokenizer.from_pretrained(folder), length
        self.tokenizer.padding_side = "left"
        network, found = Gemma3ForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        missing = sorted(found["missing_keys"])
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} weights of a Gemma 3, {missing[:3]}; copy it again")
        self.model = network.model

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        out = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True)
        return torch.stack(out.hidden_states, dim=-1), tokens.attention_mask

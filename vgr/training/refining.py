"""The refiner behind a generator: a sample's latents in, refined ones out (spec 7), for `vgr-sample refiner=...`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from vgr.diffusion import refine
from vgr.models.ltx2_text import LTX2Text, gemma3
from vgr.models.refiner import Refiner
from vgr.types import Codec


class Refinement:
    """Refiner and text of a folder with transformer/, connectors/ and text_encoder/ (Gemma 3 with its tokenizer).

    fps: raw frames a second; streams: latents come chunk by chunk, and refined frames read the last ten only.
    Raises ValueError or OSError for what does not fit, latents of another codec than the refiner's among it.
    """

    def __init__(self, folder: str | Path, codec: Codec, fps: float, streams: bool, device: str) -> None:
        window = {} if streams else {"window": None}
        refiner = Refiner.from_pretrained(folder, fps=fps, **window)
        if codec.channels != refiner.in_channels:
            raise ValueError(
                f"refiner={folder} takes latents of {refiner.in_channels} channels, as LTX-2 has them; this "
                f"checkpoint's {type(codec).__name__} has {codec.channels}"
            )
        self.refiner, self.streams = refiner.to(device).eval(), streams
        prompts = gemma3(Path(folder, "text_encoder"), device=device)
        self.text = LTX2Text.from_pretrained(folder, prompts).to(device)

    def __call__(self, pieces: Iterable[Tensor], captions: tuple[tuple[str, ...], ...]) -> Iterator[Tensor]:
        """Of each piece of latents (B,C,T,H,W), the whole video or its successive chunks, the refined ones."""
        text = self.text(captions)
        if self.streams:
            return refine.refine_stream(self.refiner, pieces, text)
        return (refine.refine(self.refiner, latents, text) for latents in pieces)

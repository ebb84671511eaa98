"""The refiner behind a generator: a sample's latents in, refined ones out (spec 7), for `vgr-sample refiner=...`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor, nn

from vgr.diffusion import refine
from vgr.models.ltx2_text import LTX2Text
from vgr.models.refiner import Refiner
from vgr.training import checkpoints
from vgr.training.rebuild import rebuild
from vgr.types import Codec


class Refinement:
    """Refiner and text of a run, of a folder (transformer/, connectors/, text_encoder/), or of adapters on either.

    fps: raw frames a second; streams: latents come chunk by chunk, and refined frames read the last ten only.
    Raises ValueError or OSError for what does not fit, latents of another codec than the refiner's among it.
    """

    def __init__(self, source: str | Path, codec: Codec, fps: float, streams: bool, device: str) -> None:
        refiner, text = _parts(Path(source))
        if codec.channels != refiner.in_channels:
            raise ValueError(
                f"refiner={source} takes latents of {refiner.in_channels} channels, as LTX-2 has them; this "
                f"checkpoint's {type(codec).__name__} has {codec.channels}"
            )
        refiner.fps, refiner.window = fps, refiner.window if streams else None
        self.refiner, self.text, self.streams = refiner.to(device).eval(), text.to(device).eval(), streams

    def __call__(self, pieces: Iterable[Tensor], captions: tuple[tuple[str, ...], ...]) -> Iterator[Tensor]:
        """Of each piece of latents (B,C,T,H,W), the whole video or its successive chunks, the refined ones."""
        text = self.text(captions)
        if self.streams:
            return refine.refine_stream(self.refiner, pieces, text)
        return (refine.refine(self.refiner, latents, text) for latents in pieces)


def _parts(source: Path) -> tuple[Refiner, nn.Module]:
    """Adapters are as `vgr-export format=lora` writes them; their configuration names what they are merged into."""
    adapters = source / "adapter_config.json"
    if any((source / name).exists() for name in ("checkpoints", "latest", "manifest.json")):
        parts = rebuild(checkpoints.resolve(source), refiner=True)
        return parts["model"], parts["text"]
    if not adapters.is_file():
        return Refiner.from_pretrained(source), LTX2Text(source)
    refiner, text = _parts(Path(json.loads(adapters.read_text())["base_model_name_or_path"]))
    refiner.load_lora(source / "adapter_model.safetensors")
    refiner.merge_lora()
    return refiner, text

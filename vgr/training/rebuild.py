"""Model, text encoder and codec of a checkpoint, built again from its generator.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vgr.models.codec import CosineCodec
from vgr.models.gemma import Gemma2Text
from vgr.models.ltx2_vae import LTX2Codec
from vgr.models.text import ByteTextEncoder
from vgr.models.world_model import WorldModel
from vgr.training import checkpoints

KNOWN = {c.__name__: c for c in (WorldModel, ByteTextEncoder, Gemma2Text, CosineCodec, LTX2Codec)}


def rebuild(checkpoint: Path) -> dict[str, Any]:
    """{"model", "text", "codec"} with averaged weights; classes are chosen by name from KNOWN, never imported.

    FileNotFoundError or ValueError name what is missing, damaged or does not fit.
    """
    tensors = checkpoints.read_weights(checkpoint, "ema")
    record = checkpoints.read_generator(checkpoint)
    parts: dict[str, Any] = {}
    for part in ("model", "text", "codec"):
        if record[part]["class"] not in KNOWN:
            raise ValueError(f"{checkpoint} needs a {record[part]['class']}; this version has {', '.join(KNOWN)}")
        parts[part] = KNOWN[record[part]["class"]](**record[part]["config"])
    for part in ("model", "text"):
        own = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
        checkpoints.match(own, {k: v.shape for k, v in parts[part].state_dict().items()}, checkpoint)
        parts[part].load_state_dict(own)
    return parts

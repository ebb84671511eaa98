"""Networks of transformers that tell of frames what nobody wrote down: captions and metres (specs/world-model 8).

Local folders of safetensors, loaded at the first call: in bf16 on a GPU where there is one, else in fp32 on the CPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROMPT = (  # as the published captions: the scene, by who stands in it, without verbs of the camera
    "These pictures show one place, one moment after another. Describe the place in two or three sentences as somebody "
    "standing in it sees it: what is where, materials, light, weather and style. Do not mention pictures, a video, a "
    "camera or any movement of the viewer."
)
MAX_TOKENS = 160
# Setting, classes of transformers, and what to get.
_CAPTIONER = ("source.captioner", "AutoProcessor", "AutoModelForImageTextToText", "HuggingFaceTB/SmolVLM-Instruct (4.5 "
              "GB, Apache-2.0) or Qwen/Qwen2-VL-7B-Instruct (16.6 GB, Apache-2.0)")  # fmt: skip
_DEPTH = ("source.depth", "AutoImageProcessor", "AutoModelForDepthEstimation", "depth-anything/Depth-Anything-V2-Metric"
          "-Outdoor-Small-hf or -Indoor-Small-hf (99 MB, Apache-2.0)")  # fmt: skip


class Captioner:
    """Several frames (N,H,W,3) uint8 of each of some shots to a caption of each: PROMPT's answer, decoded greedily.

    folder: any chat model that takes pictures, with its processor, or ValueError; fingerprint: of its files and PROMPT.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = _checked(folder, *_CAPTIONER)
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(self.folder.iterdir())]
        self.fingerprint = hashlib.sha256(json.dumps([stats, PROMPT, MAX_TOKENS]).encode()).hexdigest()[:16]

    def __call__(self, shots: Sequence[NDArray[np.uint8]]) -> list[str]:
        from PIL import Image

        processor, model = _loaded(self.folder, *_CAPTIONER)
        images = [[Image.fromarray(frame) for frame in frames] for frames in shots]
        asked = [[*({"type": "image"} for _ in own), {"type": "text", "text": PROMPT}] for own in images]
        chats = [[{"role": "user", "content": content}] for content in asked]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        begun = texts[0].startswith(processor.tokenizer.bos_token or "\0")
        processor.tokenizer.padding_side = "left"  # answers begin where the prompts end
        given = processor(text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=not begun)
        told = model.generate(**given.to(model.device, dtype=model.dtype), do_sample=False, max_new_tokens=MAX_TOKENS)
        answers = processor.batch_decode(told[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        return [" ".join(answer.split()) for answer in answers]


class DepthModel:
    """Frames (F,H,W,3) uint8 to planar depth (F,H,W) float32 in metres; ValueError where not trained for metres."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = _checked(folder, *_DEPTH)
        told = json.loads((self.folder / "config.json").read_text())
        if told.get("depth_estimation_type") != "metric" and told["model_type"] not in ("zoedepth", "depth_pro"):
            raise ValueError(f"source.depth={folder}: relative depth, not metres; get for example {_DEPTH[-1]}")

    def __call__(self, frames_FHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        (processor, model), maps = _loaded(self.folder, *_DEPTH), []
        for frame in frames_FHW3:
            with torch.no_grad():
                found = model(**processor(images=frame, return_tensors="pt").to(model.device, dtype=model.dtype))
            (depth,) = processor.post_process_depth_estimation(found, [frame.shape[:2]])
            maps.append(depth["predicted_depth"].float().cpu().numpy())
        return np.stack(maps)


def _checked(folder: str | Path, key: str, processor: str, network: str, releases: str) -> Path:
    path = Path(folder).resolve()
    if find_spec("transformers") is None:
        raise ValueError(f"{key} wants transformers: pip install 'vgr[hub]'")
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise ValueError(f"{key}={folder}: no local folder with config.json and *.safetensors; get for example "
                         f"{releases}: hf download <name> --local-dir <folder>")
    return path


@lru_cache(2)
def _loaded(folder: Path, key: str, processor: str, network: str, releases: str) -> tuple[Any, Any]:
    """Processor and network, once a process."""
    import torch
    import transformers

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        made = getattr(transformers, processor).from_pretrained(folder, local_files_only=True)
        model, found = getattr(transformers, network).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{key}={folder}: {error}; get for example {releases}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{key}={folder} lacks {len(missing)} weights, {missing[:3]}; copy it again")
    return made, model.to(device).eval()

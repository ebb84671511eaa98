"""Model, text encoder and codec of a checkpoint, built again from its generator.json, with adapters merged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vgr.models import causal_video_weights, helios, ltx2_weights, weights, world_model_weights
from vgr.models import surgery as surgery_
from vgr.models.causal_video import CausalVideo
from vgr.models.codec import CosineCodec
from vgr.models.gemma import Gemma2Text
from vgr.models.helios import Helios
from vgr.models.ltx2_text import LTX2Text
from vgr.models.ltx2_vae import LTX2Codec
from vgr.models.refiner import Refiner
from vgr.models.text import ByteTextEncoder
from vgr.models.umt5 import UMT5Text
from vgr.models.wan_vae import WanCodec
from vgr.models.world_model import WorldModel
from vgr.nn import lora
from vgr.training import budget, checkpoints
from vgr.types import Codec

TEXTS, CODECS = (ByteTextEncoder, Gemma2Text, UMT5Text, LTX2Text), (CosineCodec, LTX2Codec, WanCodec)
PARTS = (WorldModel, CausalVideo, Helios, Refiner, *TEXTS, *CODECS)
KNOWN = {part.__name__: part for part in PARTS}
# Translations of weights by the model they are of.
WEIGHTS = {
    "WorldModel": world_model_weights, "CausalVideo": causal_video_weights, "Helios": helios, "Refiner": ltx2_weights,
}  # fmt: skip


def rebuild(
    checkpoint: Path,
    memory: Mapping[str, Any] | None = None,
    refiner: bool = False,
    merged: bool = True,
    filled: bool = True,
) -> dict[str, Any]:
    """{"model", "text", "codec"} with averaged weights; classes are chosen by name from KNOWN, never imported.

    memory: settings of a causal video model's memory, instead of its own. Of a refiner's run if `refiner`, else of one
    that generates. merged False: adapters stay apart, to be switched off (`nn.lora.without`). filled False: the model
    stays on the meta device, and {"initial"} is what it is to be filled with. FileNotFoundError or ValueError name what
    is missing, damaged or does not fit.
    """
    record, tensors = read(checkpoint, merged=merged, whole=filled)
    if (record["model"]["class"] == "Refiner") != refiner:
        told = "makes no refinement" if refiner else "refines what another run made: vgr-sample refiner=<it>"
        raise ValueError(f"{checkpoint} holds a {record['model']['class']}, which {told}")
    record = budget.with_memory(record, memory)
    parts: dict[str, Any] = {}
    for part in ("model", "text", "codec"):
        if record[part]["class"] not in KNOWN:
            raise ValueError(f"{checkpoint} needs a {record[part]['class']}; this version has {', '.join(KNOWN)}")
        kind, config = KNOWN[record[part]["class"]], record[part]["config"]
        parts[part] = weights.build(kind, config) if part == "model" else kind(**config)
    if "lora" in record and not merged:
        lora.add(parts["model"], *(record["lora"][k] for k in ("rank", "alpha", "targets")))
    for part in ("model", "text"):
        own, there = part_of(tensors, part), parts[part].state_dict()
        checkpoints.match(shapes(own), {k: v.shape for k, v in there.items()}, checkpoint)
        if part == "model" and not filled:
            parts["initial"] = own
            continue
        parts[part].load_state_dict({k: v.to(there[k].dtype) for k, v in own.items()}, assign=part == "model")
    return parts


def rebuild_teacher(
    run: str | Path,
    codec: Codec | None = None,
    chunk: int | None = None,
    cut_prefix: str | None = None,
    filled: bool = True,
) -> dict[str, Any]:
    """`rebuild` of a run that is asked for whole clips, or for chunks of `chunk` latent frames under their past.

    In latents of `codec` if given, and then with cuts marked by `cut_prefix`; filled: see there. ValueError if it
    cannot be.
    """
    checkpoint = checkpoints.resolve(Path(run))
    record = checkpoints.read_generator(checkpoint)
    own, marked = record.get("chunk"), record["sampling"].get("cut_prefix") or ""
    if own is not None and chunk is None:
        raise ValueError(
            f"teacher={run} is chunk-causal (its training.chunk={own}); a teacher sees whole clips: give a "
            "bidirectional run, training.chunk=null"
        )
    if own != chunk:
        raise ValueError(f"teacher={run} has training.chunk={own}, but is asked in chunks of {chunk}: give one of such")
    if codec is not None and chunk is not None and marked != (cut_prefix or ""):
        raise ValueError(f"teacher={run} has sampling.cut_prefix={marked!r}, this run {cut_prefix!r}: set it so")
    if codec is not None:
        refuse_other_codec("teacher", run, codec)
    return rebuild(checkpoint, filled=filled)


def refuse_other_codec(key: str, run: str | Path, codec: Codec) -> None:
    """ValueError if `run`, given as `key`, was trained on another codec's latents; weights alone do not say."""
    try:
        record = checkpoints.read_generator(checkpoints.resolve(Path(run)))
    except FileNotFoundError:
        return
    if record["codec_fingerprint"] != codec.fingerprint:
        raise ValueError(
            f"{key}={run} was trained on latents of {record['codec']['class']} {record['codec_fingerprint']}, this "
            f"run's codec is {type(codec).__name__} {codec.fingerprint}: give a run of this codec, or take that one's"
        )


def refuse_other_refiner(source: str | Path, config: dict[str, Any], model: Mapping[str, Any]) -> None:
    """ValueError if the refiner of `source`, of this configuration, is another than `model`: shapes do not tell all."""
    differ = [
        f"model.{k}={model.get(k)} (there: {config[k]})"
        for k in ("in_channels", "text_width", "heads", "head_dim", "layers", "options")
        if (model.get(k) or {}) != (config[k] or {})
    ]
    if differ:
        raise ValueError(f"init_from={source} is a refiner of other settings, {', '.join(differ)}: take those")


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, or what tells their shapes without reading them."""
    return tensors.shapes() if isinstance(tensors, checkpoints.Stored) else dict(tensors)


def part_of(tensors: Mapping[str, Tensor], part: str) -> Mapping[str, Tensor]:
    """Tensors of `model` or `text` without that prefix, and without those of a release that no output depends on."""
    if isinstance(tensors, checkpoints.Stored):
        return tensors.under(f"{part}.")
    unused = f"{part}.{weights.UNUSED}"
    return {
        k.removeprefix(f"{part}."): v
        for k, v in tensors.items()
        if k.startswith(f"{part}.") and not k.startswith(unused)
    }


def load_initial(parts: Mapping[str, nn.Module], initial: Mapping[str, Tensor], surgery: Sequence[str]) -> None:
    """Copy the parts that `initial` holds, the model converted by `surgery`. ValueError where they do not fit."""
    for part, module in parts.items():
        stored, fresh = dict(part_of(initial, part)), module.state_dict()
        if stored:
            module.load_state_dict(surgery_.convert(stored, fresh, surgery if part == "model" else ()))


def fill_later(
    module: Any, initial: Mapping[str, Tensor] | None, teacher: Mapping[str, Tensor] | None, going_on: bool
) -> None:
    """Tell a training module what those of its networks that are on the meta device are filled with, by their names.

    initial: of init_from, for the model and its average; teacher: the teacher's, with which a critic starts unless a
    checkpoint fills it. ValueError where weights do not fit.
    """
    if initial is not None:
        own = part_of(initial, "model")
        waiting = {name: x for name, x in module.model.state_dict().items() if x.is_meta}  # adapters are made already
        surgery_.convert(shapes(own), waiting, ())
        module.initial |= {"model": own, "ema.model": own}
    if teacher is not None:
        module.initial["teacher.model"] = teacher
        if hasattr(module, "critic") and not going_on:
            module.initial["critic"] = teacher


def load_critic(module: Any, run: Path) -> None:
    """Critic and judge of a run of self-forcing, as trained; a critic on the meta device later. ValueError if unfit."""
    stored = checkpoints.Stored(checkpoints.resolve(run), "weights")
    parts = {name: part for name in ("critic", "judge") if (part := getattr(module, name)) is not None}
    if "critic" in module.initial:
        own = part_of(stored, "critic")
        surgery_.convert(shapes(own), parts.pop("critic").state_dict(), ())
        module.initial["critic"] = own
    load_initial(parts, stored, ())


def read(
    source: str | Path, part: str = "ema", revision: str | None = None, merged: bool = True, whole: bool = True
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """generator.json and tensors (`model.*`, `text.*`) of a run (`part`: ema or weights), or weights in any form.

    Adapters, a run's or a folder of PEFT's, come merged into their base, a run's beside it if not `merged`. Of weights
    there is no text, and the record has the model only. whole False: of a run without adapters each tensor is read when
    it is asked for; weights in other forms are mapped from their files in any case.
    FileNotFoundError or ValueError say what is missing, damaged, not a world model, or a base that has changed.
    """
    try:
        folder = checkpoints.resolve(Path(source))
    except FileNotFoundError:
        if Path(source, "adapter_config.json").is_file():
            return _with_adapters(Path(source))
        name, config, tensors = _weights(source, revision)
        return {"model": {"class": name, "config": config}}, {f"model.{k}": v for k, v in tensors.items()}
    record = checkpoints.read_generator(folder)
    if not whole and "lora" not in record:
        return record, checkpoints.Stored(folder, part)
    tensors = checkpoints.read_weights(folder, part)
    if "lora" in record:
        told = record["lora"]
        base = _base(told, folder)
        tensors = lora.merge(base, tensors, told["alpha"] / told["rank"]) if merged else base | tensors
    return record, tensors


def _weights(source: str | Path, revision: str | None) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Class name, constructor arguments and tensors of weights in any model's forms."""
    known = WEIGHTS.values()
    patterns = sorted({pattern for names in known for pattern in names.PATTERNS})
    path = weights.fetch(source, revision, patterns, " ".join(names.HOW_TO_GET for names in known))
    adapters = {form: translate for names in known for form, translate in names.ADAPTERS.items()}
    config, tensors = weights.load_folder(path, {**adapters, None: _from_original}, world_model_weights.INSIDE)
    if "transformer.patch_short.weight" in tensors:
        return "Helios", config, tensors
    if any(name.startswith("transformer.") for name in tensors):
        return "Refiner", config, tensors
    return "CausalVideo" if "patch_embed.weight" in tensors else "WorldModel", config, tensors


def _from_original(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of a file without a configuration: the two releases' patch layers have different names."""
    names = causal_video_weights if any("patch_embedding." in name for name in tensors) else world_model_weights
    return names.ADAPTERS[None](config, tensors)


def _with_adapters(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder as `vgr-export format=lora` writes it, merged into the base that its configuration names."""
    config = json.loads((folder / "adapter_config.json").read_text())
    base = config.get("base_model_name_or_path")
    if base is None or not Path(base).exists():
        raise FileNotFoundError(f"{folder} holds adapters of {base}, which is not here: name it in adapter_config.json")
    record, tensors = read(base)
    try:
        adapters, scale = lora.from_peft(config, weights.read_tensors(folder / "adapter_model.safetensors"))
        return record, lora.merge(tensors, {f"model.{k}": v for k, v in adapters.items()}, scale)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _base(told: dict[str, Any], checkpoint: Path) -> dict[str, Tensor]:
    """The frozen weights under a checkpoint's adapters, where it says or from where its training ran."""
    paths = (Path(told["base"]), Path(told["folder"], told["base"]))
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        raise FileNotFoundError(f"{checkpoint} holds adapters of {paths[0]}, which is not here, nor is {paths[1]}")
    _, tensors = read(path)
    if checkpoints.tensors_hash(tensors) != told["sha256"]:
        raise ValueError(f"{checkpoint} holds adapters of {path}, whose weights are not those it was trained on")
    return tensors

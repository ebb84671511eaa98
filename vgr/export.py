"""vgr-export: a run's model, or anyone's weights of one, in our form, diffusers' or the original release's.

vgr-export checkpoint=runs/world_model/tiny/seed1 out=my_model
vgr-export checkpoint=sana_wm_1600m_720p.safetensors format=diffusers out=sana_wm_diffusers
vgr-export checkpoint=runs/world_model/lora/seed1 format=lora out=my_adapters
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgr import command

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor


def main() -> None:
    """Entry point of `vgr-export` and `python -m vgr.export`."""
    command.run("export", body)


def body(cfg: DictConfig) -> None:
    """conf/export.yaml -> a folder with model.safetensors, or diffusers' or PEFT's names, that appears whole or not.

    Tensors keep their bits and their precision; those that no output depends on travel along (spec 10.2).
    """
    from vgr.models import weights, world_model_weights
    from vgr.training import rebuild

    for key, accepted in (("format", (*world_model_weights.EXPORTS, "lora")), ("weights", ("ema", "weights"))):
        if cfg[key] not in accepted:
            raise ValueError(f"{key}={cfg[key]} is unknown; accepted: {', '.join(accepted)}")
    for key in ("checkpoint", "out"):
        if cfg[key] is None:
            raise ValueError(f"{key} is not given: checkpoint=<run folder or weights> out=<new folder>")
    out = Path(cfg.out)
    weights.require_new(out)
    if cfg.format == "lora":
        write_adapters(str(cfg.checkpoint), cfg.weights, out)
        return
    kind, config, tensors = read(str(cfg.checkpoint), cfg.weights, cfg.revision)
    names = rebuild.WEIGHTS[kind]
    if cfg.format not in names.EXPORTS:
        raise ValueError(f"format={cfg.format}: a {kind} is written as {', '.join(names.EXPORTS)} or lora")
    model = weights.build(rebuild.KNOWN[kind], config)
    weights.check(model, tensors, cfg.checkpoint)
    class_name, stem, translate = names.EXPORTS[cfg.format]
    described, tensors = translate(model.config, tensors)
    weights.save_folder(out, class_name, described, tensors, stem)
    numbers, size = sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    print(f"{out}: {len(tensors)} tensors, {numbers / 1e6:.1f} M numbers, {size / 1e9:.2f} GB")
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    again = weights.build(rebuild.KNOWN[kind], names.ADAPTERS[class_name](described, meta)[0]).config
    lost = [f"{k}={v}" for k, v in model.config.items() if again[k] != v]
    if lost:
        print(f"this format has no place for {', '.join(lost)}: give them to from_pretrained")


def read(
    checkpoint: str, part: str = "ema", revision: str | None = None
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Class, constructor arguments and tensors of a run's model (`part`: ema or weights) or of weights in any form.

    FileNotFoundError or ValueError say what is missing, damaged or of no model of ours.
    """
    from vgr.training import rebuild

    record, tensors = rebuild.read(checkpoint, part, revision)
    kind = record["model"]["class"]
    if kind not in rebuild.WEIGHTS:
        raise ValueError(f"{checkpoint} holds a {kind}; vgr-export writes {', '.join(rebuild.WEIGHTS)}")
    own = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    return kind, record["model"]["config"], own


def write_adapters(checkpoint: str, part: str, out: Path) -> None:
    """The adapters of a run, unmerged, as a folder that PEFT loads onto our model of the base."""
    import json

    from safetensors.torch import save_file

    from vgr.models import weights
    from vgr.nn import lora
    from vgr.training import checkpoints

    folder = checkpoints.resolve(Path(checkpoint))
    told = checkpoints.read_generator(folder).get("lora")
    if told is None:
        raise ValueError(f"format=lora: {folder} is no run with lora=...; choose another format for whole weights")
    adapters = {k.removeprefix("model."): v for k, v in checkpoints.read_weights(folder, part).items()}
    config, tensors = lora.to_peft(adapters, told["base"], told["rank"], told["alpha"], told["targets"])
    with weights.new_folder(out) as new:
        # diffusers reads the scale from here, PEFT from the other file.
        written = {"r": config["r"], "lora_alpha": config["lora_alpha"], "target_modules": config["target_modules"]}
        about = {"format": "pt", "lora_adapter_metadata": json.dumps(written)}
        save_file(tensors, new / "adapter_model.safetensors", metadata=about)
        (new / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    numbers = sum(t.numel() for t in tensors.values())
    print(f"{out}: {len(tensors)} tensors, {numbers / 1e6:.1f} M numbers; the base is {told['base']}")


if __name__ == "__main__":
    main()

"""Every preset composes, builds without memory, fits its codec and has the parameters its table declares."""

import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from vgr import command, studies

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MODEL = ("mixer", "sink", "window", "routed")
SMALL = ("world_model/tiny", "world_model/doom_small", "warp_adapter/base_tiny", "warp_adapter/tiny")
APART = (*SMALL, "warp_adapter/one_video", *studies.presets())  # arms of studies have twins of their own
STAGES = [name for name in command.presets() if name not in APART]
SAME = ("training._target_", "training.chunk", "surgery", "sampling.method", *map("model.{}".format, MODEL))


@pytest.mark.parametrize("name", command.presets())
def test_preset_builds_with_its_declared_size(name):
    cfg = command.compose("train", [f"experiments={name}"])
    if cfg.codec._target_.endswith("CosineCodec"):  # others are read from weights that are not here
        codec = instantiate(cfg.codec)
        assert codec.channels == cfg.model.in_channels
        # Without measured deviations the brightness channel drowns all others, and the camera with them.
        assert len(set(codec.config["latents_std"])) > 1
        assert codec.stride[0] == cfg.model.get("raw_frames", codec.stride[0])
    assert cfg.text.width == cfg.model.text_width
    assert cfg.training.global_batch % cfg.data.micro_batch == 0
    with torch.device("meta"):
        parts = [instantiate(cfg.model), instantiate(cfg.text)]
    count = sum(p.numel() for part in parts for p in part.parameters()) / 1e6
    arm = studies.find(name)
    page = (arm[0].folder / "README.md").read_text() if arm else README
    row = re.search(rf"^\| `{name}` \|.*?\| ([\d.]+) M \|", page, re.MULTILINE)
    assert row, f"{name} has no row in the table of presets, of README or of its study's README"
    assert f"{count:.1f}" == row.group(1)


@pytest.mark.parametrize("name", STAGES)
def test_preset_has_a_tiny_twin_of_the_same_stage(name):
    """Its tiny size changes sizes, data and counts, and nothing of what the stage is."""
    sizes = {"world_model": "tiny", "causal_video": "story_tiny", "world_model/refiner": "refiner_tiny"}
    size = sizes.get(name, sizes[name.split("/")[0]])
    cfg, tiny = (command.compose("train", [f"experiments={name}", *more]) for more in ([], [f"size={size}"]))
    command.check_targets(cfg)
    command.check_targets(tiny)
    for key in SAME:
        values = [OmegaConf.select(c, key) for c in (cfg, tiny)]
        assert values[0] == values[1], key
    codec = instantiate(tiny.codec)
    assert codec.channels == tiny.model.in_channels
    assert codec.stride[0] == tiny.model.get("raw_frames", codec.stride[0])
    assert sum(p.numel() for p in instantiate(tiny.model).parameters()) < 10e6


def test_the_published_adapter_and_its_tiny_twin_are_one_recipe():
    """Sizes, stages and what the released Helios was trained on apart, the two are trained alike (spec 3.2)."""
    cfg, tiny = (command.compose("train", [f"experiments=warp_adapter/{name}"]) for name in ("one_video", "tiny"))
    command.check_targets(cfg)
    flat = [command.flat(OmegaConf.to_container(c, resolve=True)) for c in (cfg, tiny)]
    trained = ("training.", "lora.", "data.windows")
    differ = {k for k in flat[0].keys() | flat[1].keys() if flat[0].get(k) != flat[1].get(k) and k.startswith(trained)}
    assert differ == {
        "training.chunk", "training.objective", "training.objective.ratio", "training.objective.image_noise",
    }  # fmt: skip
    assert cfg.codec.clip == cfg.training.chunk and cfg.data.source.frames % (1 + 8 * 4) == 0
    assert (cfg.lora.rank, cfg.training.max_samples, cfg.training.lr) == (32, 1000, 1e-4)
    with torch.device("meta"):
        targets = [n for n, _ in instantiate(cfg.model).named_modules() if n.endswith(tuple(cfg.lora.targets))]
    assert len(targets) == 160


def test_a_size_changes_more_for_one_kind_of_training_and_yields_to_the_command_line():
    def rate(stage, *more):
        return command.compose("train", [f"experiments=world_model/{stage}", *more]).training.lr

    assert rate("self_forcing", "size=tiny") not in (rate("self_forcing"), rate("ode", "size=tiny"))
    assert rate("self_forcing", "size=tiny", "training.lr=0.5") == 0.5


@pytest.mark.parametrize("name", command.presets())
def test_preset_says_what_it_asks(name):
    header = command.preset_header(name)
    assert header.keys() >= {"Question", "Paper", "Hardware", "Hours", "Needs"} and all(header.values())

"""Every preset composes, builds without memory, fits its codec and has the parameters its table declares."""

import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from vgr import command

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", command.presets())
def test_preset_builds_with_its_declared_size(name):
    cfg = command.compose("train", [f"experiments={name}"])
    codec = instantiate(cfg.codec)
    assert codec.channels == cfg.model.in_channels
    # Without measured deviations the brightness channel drowns all others, and the camera with them.
    assert len(set(codec.config["latents_std"])) > 1
    assert codec.stride[0] == cfg.model.raw_frames
    assert cfg.text.width == cfg.model.text_width
    assert cfg.training.global_batch % cfg.data.micro_batch == 0
    with torch.device("meta"):
        parts = [instantiate(cfg.model), instantiate(cfg.text)]
    count = sum(p.numel() for part in parts for p in part.parameters()) / 1e6
    row = re.search(rf"^\| `{name}` \|.*?\| ([\d.]+) M \|", README, re.MULTILINE)
    assert row, f"{name} has no row in README's table of presets"
    assert f"{count:.1f}" == row.group(1)


@pytest.mark.parametrize("name", command.presets())
def test_preset_says_what_it_asks(name):
    header = dict(re.findall(r"^# (\w+): *(.+)$", command.preset_file(name).read_text(), re.MULTILINE))
    assert header.keys() >= {"Question", "Paper", "Hardware", "Hours", "Needs"}

"""Every shipped study: its arms differ in nothing but what it asks, measure themselves, and stand in its README."""

import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vgr import bench, command, studies
from vgr.report import readme
from vgr.report.table import METRICS

ROOT = Path(__file__).resolve().parents[2]


def resolved(preset, *more):
    cfg = command.compose("train", [f"experiments={preset}", *more])
    command.check_targets(cfg)
    return command.flat(OmegaConf.to_container(cfg, resolve=True))


@pytest.fixture(params=studies.names())
def study(request):
    return studies.read(request.param)


@pytest.mark.parametrize("tiny", [False, True])
def test_arms_differ_in_their_own_settings_alone(study, tiny):
    """A setting of an arm counts, and what no arm sets is the same in all."""
    found = [resolved(preset) for preset in study.presets(tiny)]
    own = [{s.partition("=")[0]: s.partition("=")[2] for s in arm.settings} for arm in study.arms]
    for config, settings in zip(found, own):
        assert {k: str(config[k]) for k in settings} == settings
        differ = {k for k in found[0].keys() | config.keys() if found[0].get(k) != config.get(k)}
        assert {k for k in differ if not isinstance(config.get(k), dict)} <= {*settings, *own[0]}
    changed = [json.dumps({k: v for k, v in c.items() if command.changes_results(k)}, sort_keys=True) for c in found]
    assert len(set(changed)) == len(changed), "two arms are one and the same"


def test_the_last_step_of_an_arm_measures_what_the_study_shows(study):
    if study.protocol is not None:
        bench.load_protocol(study.protocol)
    for preset in study.presets(True):
        config, last = resolved(preset), {"val/": "every.validate"}
        if study.protocol is not None:
            assert config["bench"] == study.protocol
            last["bench/"] = "every.bench"
        assert all(config["training.max_samples"] % config[every] == 0 for every in last.values())
    for metric in study.metrics:
        place, _, name = metric.partition("/")
        assert place == "val" or (place == "bench" and study.protocol and name in METRICS), metric


def test_readme_has_the_question_the_command_and_the_table_its_results_give(study):
    text = (study.folder / "README.md").read_text()
    assert study.question in " ".join(text.split()) and f"vgr-compare study={study.name}" in text
    assert study.sweep_command() in re.sub(r"\\\n *", "", text)
    stale = f"run vgr-compare study={study.name}"
    assert readme.between(text) == readme.table(study, readme.read(study)), stale


def test_a_misspelt_arm_and_a_misspelt_study_are_told(study):
    with pytest.raises(Exception) as caught:
        command.compose("train", [f"experiments={study.name}/{study.arms[0].name}_tny"])
    told = command.explain(caught.value, "train")
    assert f"did you mean experiments={study.name}/{study.arms[0].name}_tiny?" in told
    with pytest.raises(FileNotFoundError, match=f"did you mean {study.name}?"):
        studies.read(study.name + "s")

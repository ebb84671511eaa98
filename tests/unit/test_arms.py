"""Studies: what is wrong in a study.json is named, arms are presets, and what the studies' arms switch does so."""

import dataclasses
import json

import pytest
import torch
import yaml
from hydra.utils import instantiate

from benchmarks.speed import length
from tests.unit.test_world_model import CONFIG, _inputs, _model
from vgr import command, studies
from vgr.models import surgery, world_model_weights
from vgr.models.world_model import WorldModel

TOLD = {
    "question": "Which?", "paper": "none", "seeds": [3, 5], "protocol": "smoke", "metrics": ["val/loss"],
    "reference": None,
    "full": {"parent": "big", "settings": ["model.width=64"], "hardware": "h", "hours": "1", "needs": "n"},
    "tiny": {"parent": "small", "settings": ["lr=1e-3"], "hardware": "h", "hours": "1", "needs": "n"},
    "arms": {
        "one": {"label": "the one", "settings": [], "published": None},
        "two": {"label": "the other", "settings": ["model.kind=odd", "steps=[1, 2]"], "published": None},
    },
}  # fmt: skip


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A root with one study over two presets; writes what it is called with in its study.json."""
    monkeypatch.setattr(studies, "root", lambda: tmp_path)
    folder = tmp_path / "experiments" / "which"
    folder.mkdir(parents=True)
    for name, width in (("big", 32), ("small", 8)):
        text = f"# @package _global_\nmodel: {{width: {width}, kind: even}}\nlr: 1\nsteps: [0]\n"
        (tmp_path / "experiments" / f"{name}.yaml").write_text(text)

    def write(**changes):
        (folder / "study.json").write_text(json.dumps({**TOLD, **changes}))

    write()
    return write


def test_arms_are_their_parents_with_settings_of_size_and_arm(shipped):
    study = studies.read("which")
    assert studies.names() == ["which"] and study.seeds == (3, 5)
    assert studies.presets() == ["which/one", "which/two", "which/one_tiny", "which/two_tiny"]
    assert studies.config("which/one") == {"model": {"width": 64, "kind": "even"}, "lr": 1, "steps": [0]}
    assert studies.config("which/two_tiny") == {"model": {"width": 8, "kind": "odd"}, "lr": 1e-3, "steps": [1, 2]}
    assert studies.header("which/two_tiny")["Question"] == "Which? Here: the other."
    assert studies.find("which/three") is None and studies.find("big") is None
    assert study.sweep_command() == "vgr-train -m experiments=which/one_tiny,which/two_tiny seed=3,5"


def test_a_sweep_of_wandb_is_the_same_grid(shipped):
    told = yaml.safe_load(studies.sweep(studies.read("which")))
    grid = {key: values["values"] for key, values in told["parameters"].items()}
    assert told["method"] == "grid" and grid == {"experiments": ["which/one_tiny", "which/two_tiny"], "seed": [3, 5]}
    assert told["command"] == ["${program}", "logger=wandb", "${args_no_hyphens}"] and told["program"] == "vgr-train"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"question": None, "sedes": 1}, "unknown: sedes"),
        ({"tiny": {"parent": "small"}}, "tiny: keys missing or unknown: hardware, hours, needs, settings"),
        ({"seeds": []}, r"seeds.*got seeds=\[\]"),
        ({"seeds": ["1"]}, "whole numbers"),
        ({"arms": {}}, "arms and seeds"),
        ({"arms": {"a b": TOLD["arms"]["one"]}}, "arms.a b must be letters"),
        ({"arms": {"a_tiny": TOLD["arms"]["one"]}}, "not end in _tiny"),
        ({"arms": {"a": {**TOLD["arms"]["one"], "settings": ["lr"]}}}, "arms.a.settings: 'lr' is no key=value"),
        ({"reference": {"name": "attention", "table": "none"}}, "there is no .*attention.json"),
    ],
)
def test_what_is_wrong_is_named(shipped, changes, message):
    shipped(**changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        studies.read("which")


def test_published_values_are_those_of_the_table_named(shipped, tmp_path):
    folder = tmp_path / "benchmarks" / "references"
    folder.mkdir(parents=True)
    rows = [{"table": table, "system": name, "values": {"fvd": 3.0}} for table, name in ("tA", "uB")]
    (folder / "told.json").write_text(json.dumps({"rows": rows}))
    arms = {"one": {**TOLD["arms"]["one"], "published": "A"}, "two": TOLD["arms"]["two"]}
    shipped(arms=arms, reference={"name": "told", "table": "t"})
    assert [arm.published for arm in studies.read("which").arms] == [{"fvd": 3.0}, None]
    shipped(arms={"one": {**TOLD["arms"]["one"], "published": "B"}}, reference={"name": "told", "table": "t"})
    with pytest.raises(ValueError, match="published=B; the reference has A"):
        studies.read("which")
    shipped(reference={"name": "told", "table": "v"})
    with pytest.raises(ValueError, match="reference.table=v"):
        studies.read("which")


CAMERAS = ("none", "pluecker_input", "pluecker", "ucpe", "both")


@pytest.mark.parametrize("cameras", CAMERAS)
def test_an_encoding_hears_of_cameras_by_its_own_layers_alone(cameras):
    x, t, cond = _inputs("orbit")
    still = dataclasses.replace(cond, cameras=_inputs("static")[2].cameras)
    whole, part = _model(), _model(cameras=cameras)
    names = part.state_dict().keys()
    assert names <= whole.state_dict().keys()
    assert ("plucker_embedder.weight" in names) == (cameras not in ("none", "ucpe"))
    assert ("blocks.0.plucker_proj.weight" in names) == (cameras in ("pluecker", "both"))
    assert ("blocks.0.attn.conv_k_cam" in names) == (cameras in ("ucpe", "both")) == part.takes_rays
    with torch.no_grad():
        moved, stood, blind = (part(x, t, c)[0] for c in (cond, still, dataclasses.replace(cond, cameras=None)))
    assert torch.equal(moved, stood) == (cameras == "none") == torch.equal(moved, blind)


def test_arms_of_one_seed_start_from_the_same_numbers():
    models = []
    for arm in CAMERAS:
        torch.manual_seed(7)
        model = command.compose("train", [f"experiments=camera_encoding/{arm}_tiny"]).model
        models.append(instantiate(model).state_dict())
    for state in models:
        assert all(torch.equal(tensor, models[-1][name]) for name, tensor in state.items())


@pytest.mark.parametrize("cameras", CAMERAS)
def test_a_camera_stage_starts_any_encoding_from_a_whole_model(cameras):
    stored, own = _model().state_dict(), WorldModel(**CONFIG, cameras=cameras).state_dict()
    made = surgery.convert(stored, own, ["camera"])
    assert made.keys() == own.keys()
    assert torch.equal(made["blocks.0.attn.qkv.weight"], stored["blocks.0.attn.qkv.weight"])


def test_only_keys_scaled_by_a_frames_tokens_keep_a_long_clip_finite():
    """Section 3.2: an update of S unscaled keys is no contraction, and frames multiply it."""
    x, t, cond = _inputs("orbit", 60)
    sizes = {}
    with torch.no_grad():
        for scale in ("frame", "head", "none"):
            torch.manual_seed(0)
            model = WorldModel(**{**CONFIG, "softmax_every": 0, "key_scale": scale})
            torch.nn.init.normal_(model.final_linear.weight)
            sizes[scale] = float(model(x, t, cond)[0].abs().max())
    assert sizes["frame"] < 1e2
    assert not sizes["none"] < 1e6, sizes
    with pytest.raises(ValueError, match="key_scale=tokens: choose frame or head or none"):
        _model(key_scale="tokens")


def test_what_the_released_form_has_no_place_for_is_not_exported():
    for changes in ({"cameras": "ucpe"}, {"key_scale": "head"}):
        model = _model(**changes)
        with pytest.raises(ValueError, match="knows no .*=.*: export it in our own form"):
            world_model_weights.to_original(model.config, model.state_dict())


def test_cost_over_length_is_told_of_the_studys_mixers():
    rows = length.measure("tiny", [3, 9], 1, "cpu")
    mixers = ["gdn", "hybrid_4", "hybrid_2", "softmax"]  # the scale of keys costs nothing
    assert [(row["latent_frames"], row["mixer"]) for row in rows] == [(n, m) for n in (3, 9) for m in mixers]
    for short, long in zip(rows, rows[4:]):
        assert 0 < short["mib"] < long["mib"] and long["ms_min"] <= long["ms"] <= long["ms_max"]

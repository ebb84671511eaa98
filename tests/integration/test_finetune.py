"""Fine-tuning what somebody trained: all weights from any form of them, or adapters on a frozen base."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from small_training import PRESET, make_project, metrics, train  # noqa: E402
from test_export import run as export  # noqa: E402
from test_gemma import folder as gemma  # noqa: E402, F401
from test_world_model import _inputs  # noqa: E402

from vgr.generator import Generator
from vgr.models.world_model import WorldModel
from vgr.nn import lora
from vgr.training import checkpoints
from vgr.training.rebuild import read, rebuild

BASE, RUN = "runs/mini/seed1", "runs/lora/seed1"
PARTS = ("weights", "ema", "optimizer")
# No step changes a weight, so that the checkpoint holds what the run began with.
STILL = ("training.lr=0", "training.max_samples=8", "training.warmup_samples=0")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A run, its weights in every form, and a run of adapters on it."""
    folder = make_project(tmp_path_factory.mktemp("finetune"))
    text = PRESET + f"init_from: {BASE}\nlora: {{rank: 4, alpha: 8}}\n"
    (folder / "own/experiments/lora.yaml").write_text(text)
    assert train(folder).returncode == 0
    for form in ("vgr", "diffusers", "original"):
        assert export(folder, f"checkpoint={BASE}", f"format={form}", f"out=forms/{form}")[0] == 0
    tensors = load_file(folder / "forms/original/model.safetensors")
    torch.save({"generator": {f"model.{k}": v for k, v in tensors.items()}}, folder / "forms/streaming.pt")
    before = _files(folder / BASE)
    done = train(folder, "experiments=lora")
    assert done.returncode == 0, done.stderr[-2000:]
    assert _files(folder / BASE) == before
    return folder


def _files(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _latest(run):
    return checkpoints.latest(run / "checkpoints")


def _model(tensors):
    return {k: v for k, v in tensors.items() if k.startswith("model.")}


@pytest.mark.parametrize("form", ["vgr", "diffusers", "original", "original/model.safetensors", "streaming.pt"])
def test_a_run_begins_with_weights_in_any_form(project, form):
    """Their model bit for bit; no text encoder, so that one starts anew."""
    done = train(project, f"init_from=forms/{form}", *STILL)
    assert done.returncode == 0, done.stderr[-2000:]
    begun = checkpoints.read_weights(_latest(Path(project / done.stdout.split("run folder ")[1].split(",")[0])))
    base = checkpoints.read_weights(_latest(project / BASE))
    assert begun.keys() == base.keys()
    assert all(torch.equal(begun[k], v) for k, v in _model(base).items())
    assert not torch.equal(begun["text.embed.weight"], base["text.embed.weight"])


def test_surgery_takes_weights_too(project):
    """Softmax blocks in place of gated ones: the release's gates of the softmax block are not in the way."""
    done = train(project, "init_from=forms/original", "surgery=[softmax]", "model.softmax_every=1", *STILL)
    assert done.returncode == 0, done.stderr[-2000:]
    done = train(project, "init_from=forms/original", "model.softmax_every=1", *STILL)
    assert done.returncode == 2 and "surgery=[] does not account" in done.stderr


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["init_from=forms/nothing"], "init_from=forms/nothing does not exist"),
        (["init_from=own"], "own holds no weights"),
        (["init_from=own/experiments/mini.yaml"], "mini.yaml"),
        (["init_from=forms/vgr", "model.width=16"], "do not fit the model"),
        (["lora.rank=4"], "give init_from="),
        ([f"init_from={BASE}", "lora.rank=4", "surgery=[gdn]"], "takes no surgery"),
        ([f"init_from={BASE}", "lora.rank=4", f"teacher={BASE}"], "no teacher"),
        ([f"init_from={BASE}", "lora.rank=4", "lora.targets=[to_q]"], "choose from beta_proj, expand"),
        ([f"init_from={BASE}", "lora.rank=-1"], "lora.rank=-1"),
        ([f"init_from={BASE}", "lora.rnak=4"], "did you mean `lora.rank`"),
        (["init_from=forms/vgr", "lora.rank=4"], "holds no text encoder"),
    ],
)
def test_mistakes_are_one_line_and_make_nothing(project, arguments, told):
    before = sorted(project.glob("runs/*"))
    done = train(project, *arguments)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert sorted(project.glob("runs/*")) == before


def test_adapters_learn_and_alone_are_saved(project):
    now, base = (json.loads((project / run / "validation.json").read_text())["summary"] for run in (RUN, BASE))
    key = "val/loss"
    assert now[key] < base[key]
    last = _latest(project / RUN)
    names = {k for k in WorldModel(**read(last)[0]["model"]["config"]).state_dict() if k.endswith("weight")}
    for part in PARTS:
        stored = {k.split(":")[0] for k in checkpoints.read_weights(last, part)}
        assert stored and all(k.endswith(("lora_A.weight", "lora_B.weight")) for k in stored)
        assert {k.removeprefix("model.").replace("lora_A.", "") for k in stored if "lora_A" in k} <= names
    state = checkpoints.read_state(last)["config"]
    assert state["init_from"] == BASE and len(state["init_from_sha256"]) == 64
    sizes = [sum(len(b) for b in _files(_latest(project / run) / "weights").values()) for run in (RUN, BASE)]
    assert sizes[0] < 0.4 * sizes[1]  # rank 4 of width 32


def test_a_run_of_adapters_resumes_to_the_same_bits(project):
    run = project / RUN
    last = _latest(run)
    before, told = {p: checkpoints.weights_hash(last, p) for p in PARTS}, metrics(run)
    (run / "checkpoints/latest").write_text(sorted(p.name for p in (run / "checkpoints").glob("step_*"))[0])
    done = train(project, "experiments=lora")
    assert done.returncode == 0, done.stderr[-2000:]
    assert _latest(run) == last and metrics(run) == told
    assert {p: checkpoints.weights_hash(last, p) for p in PARTS} == before


def test_sampling_merges_adapters_into_their_base(project, monkeypatch, tmp_path):
    """Whatever folder it is called from, and equal to the model with its adapters beside the weights."""
    monkeypatch.chdir(tmp_path)
    merged = Generator.load(project / RUN, "cpu").model
    beside = rebuild(_latest(project / BASE))["model"].eval()
    lora.add(beside, 4, 8, ["qkv", "qkv_cam", "proj", "q_linear", "kv_linear", "expand", "project"])
    adapters = {k.removeprefix("model."): v for k, v in checkpoints.read_weights(_latest(project / RUN)).items()}
    assert not beside.load_state_dict(adapters, strict=False).unexpected_keys
    x, t, cond = _inputs()
    x = x.repeat(1, 4, 1, 1, 1)
    with torch.no_grad():
        out, expected = merged(x, t, cond)[0], beside(x, t, cond)[0]
        base = rebuild(_latest(project / BASE))["model"].eval()(x, t, cond)[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert (out - base).abs().max() > 1e-2


def test_adapters_are_exported_merged_and_to_peft(project):
    merged = Generator.load(project / RUN, "cpu").model
    for form in ("vgr", "diffusers", "original"):
        code, _, err = export(project, f"checkpoint={RUN}", f"format={form}", f"out=merged/{form}")
        assert code == 0, err
        again = WorldModel.from_pretrained(project / "merged" / form).state_dict()
        assert all(torch.equal(again[k], v) for k, v in merged.state_dict().items())
    code, told, err = export(project, f"checkpoint={RUN}", "format=lora", "out=merged/lora")
    assert (code, err) == (0, "") and BASE in told
    assert export(project, "checkpoint=merged/lora", "out=merged/again")[0] == 0
    again = load_file(project / "merged/again/model.safetensors")
    assert all(torch.equal(again[k], v) for k, v in merged.state_dict().items())
    code, _, err = export(project, f"checkpoint={BASE}", "format=lora", "out=merged/none")
    assert code == 2 and "no run with lora" in err and not (project / "merged/none").exists()
    peft = pytest.importorskip("peft")
    base = WorldModel.from_pretrained(project / "forms/vgr")
    theirs = peft.PeftModel.from_pretrained(base, str(project / "merged/lora")).merge_and_unload()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_adapters_on_a_release_with_its_own_text_encoder(project, gemma):  # noqa: F811
    """The released case whole: a foreign file, frozen Gemma; then another file in its place is refused everywhere."""
    release = project / "forms/release.safetensors"
    shutil.copy(project / "forms/original/model.safetensors", release)
    text = f"{{folder: {gemma}, prompt_config: {gemma}/config.yaml, width: 16, length: 12, dtype: float32}}"
    preset = PRESET.replace("text: {width: 16, length: 16, heads: 2}", f"text: {text}")
    preset = preset.replace("defaults:\n", "defaults:\n  - override /text: gemma2\n")
    own = "init_from: forms/release.safetensors\nlora: {rank: 4}\n"
    (project / "own/experiments/release.yaml").write_text(preset + own)
    words = ["experiments=release", "training.max_samples=16"]
    done = train(project, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    run = project / done.stdout.split("run folder ")[1].split(",")[0]
    name = str(run.relative_to(project))
    assert export(project, f"checkpoint={name}", "format=original", "out=merged/release")[0] == 0
    assert load_file(project / "merged/release/model.safetensors").keys() == load_file(release).keys()
    assert Generator.load(run, "cpu").text.width == 16
    # adapters on adapters: the first ones are part of the second's base
    done = train(project, *words, f"init_from={name}")
    assert done.returncode == 0, done.stderr[-2000:]
    tensors = load_file(release)
    tensors["x_embedder.proj.bias"] += 1e-3
    os.remove(release)
    save_file(tensors, release)
    done = train(project, *words)
    assert done.returncode == 2 and "init_from_sha256 (was " in done.stderr and done.stderr.count("\n") == 1
    with pytest.raises(ValueError, match=r"release.safetensors, whose weights are not those"):
        Generator.load(run, "cpu")
    os.remove(release)
    code, _, err = export(project, f"checkpoint={name}", "out=merged/gone")
    assert code == 2 and "release.safetensors, which is not here" in err

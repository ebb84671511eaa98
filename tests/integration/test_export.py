"""vgr-export: a run and anyone's weights in each form, bit for bit there and back; mistakes end in one line, code 2."""

import contextlib
import io
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "numerics"))
sys.path.insert(0, str(Path(__file__).parent))
from small_training import make_project, train  # noqa: E402
from test_original_weights import random_release  # noqa: E402

from vgr import export
from vgr.generator import Generator
from vgr.models.world_model import WorldModel
from vgr.training import checkpoints

RUN = "runs/mini/seed1"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("export"))
    assert train(folder).returncode == 0
    return folder


def run(folder, *words):
    """vgr-export in this process: exit code, stdout and stderr."""
    out, err, code, here = io.StringIO(), io.StringIO(), 0, os.getcwd()
    os.chdir(folder)
    try:
        argv = mock.patch.object(sys, "argv", ["vgr-export", *words])
        with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            export.main()
    except SystemExit as exit_:
        code = exit_.code
    finally:
        os.chdir(here)
    return code, out.getvalue(), err.getvalue()


def _same_bits(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape and torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("part", ["ema", "weights"])
def test_a_run_becomes_a_folder_that_loads(project, tmp_path, part):
    code, told, err = run(project, f"checkpoint={RUN}", f"weights={part}", f"out={tmp_path / 'ours'}")
    assert (code, err) == (0, "") and "tensors" in told
    model = WorldModel.from_pretrained(tmp_path / "ours")
    stored = checkpoints.read_weights(checkpoints.resolve(project / RUN), part)
    _same_bits(model.state_dict(), {k.removeprefix("model."): v for k, v in stored.items() if k.startswith("model.")})
    assert model.config == Generator.load(project / RUN, "cpu").model.config


def test_a_run_takes_every_form_and_comes_back(project, tmp_path):
    expected = Generator.load(project / RUN, "cpu").model
    for name in ("diffusers", "original"):
        code, told, _ = run(project, f"checkpoint={RUN}", f"format={name}", f"out={tmp_path / name}")
        assert code == 0 and "softmax_bf16=False" in told.splitlines()[-1] and "camera_start=rays" in told
        # What the format has no place for is told, and given back by hand.
        lost = ("cam_renorm_gdn", "cam_renorm_softmax", "cam_softmax_scale", "camera_start", "softmax_bf16")
        given = {key: expected.config[key] for key in lost}
        again = WorldModel.from_pretrained(tmp_path / name, **given)
        _same_bits(again.state_dict(), expected.state_dict())
        assert again.config == expected.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_original_to_ours_to_original_keeps_every_bit(tmp_path, dtype):
    tensors = {k: v.to(dtype) for k, v in random_release(7).items()}
    save_file(tensors, tmp_path / "released.safetensors")
    assert run(tmp_path, "checkpoint=released.safetensors", "out=ours")[0] == 0
    assert run(tmp_path, "checkpoint=ours", "format=original", "out=again")[0] == 0
    _same_bits(load_file(tmp_path / "again" / "model.safetensors"), tensors)


def test_diffusers_to_ours_to_diffusers_keeps_every_bit(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from benchmarks.speed.sana_port import fp32_softmax, make_inputs, make_port

    port = make_port(48, 2, 4, 2, 4, 24, 8, seed=5)
    port.save_pretrained(tmp_path / "port", max_shard_size="300KB")
    assert len(list((tmp_path / "port").glob("*.safetensors"))) > 1
    assert run(tmp_path, "checkpoint=port", "out=ours")[0] == 0
    assert run(tmp_path, "checkpoint=ours", "format=diffusers", "out=again")[0] == 0
    again = diffusers.SanaWMTransformer3DModel.from_pretrained(tmp_path / "again").eval()
    _same_bits(again.state_dict(), port.state_dict())
    configs = [{k: v for k, v in model.config.items() if not k.startswith("_")} for model in (again, port)]
    assert configs[0] == configs[1]
    inputs = make_inputs(1, 4, 3, (2, 3), 24, 8, 1)
    ours = WorldModel.from_pretrained(tmp_path / "ours", softmax_bf16=False).eval()
    with torch.no_grad(), fp32_softmax():
        expected, actual = (m(**inputs.port_arguments(), return_dict=False)[0] for m in (port, again))
        own, _ = ours(inputs.x, inputs.t, inputs.cond)
    assert torch.equal(actual, expected)
    assert (own - expected).abs().max() < 1e-5 * (expected.max() - expected.min())


def test_what_was_never_read_is_written_with_its_start(project, tmp_path):
    assert run(project, f"checkpoint={RUN}", "format=original", f"out={tmp_path / 'x'}")[0] == 0
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    assert tensors.keys() == random_release(layers=2).keys()
    assert not any(tensors[k].any() for k in ("pos_embed", "y_embedder.y_embedding", "blocks.1.attn.recall_gate"))
    assert (tensors["blocks.1.attn.beta_proj.bias"] == 5).all() and (tensors["blocks.1.attn.dt_bias"] == -5).all()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "checkpoint is not given"),
        ((f"checkpoint={RUN}",), "out=<new folder>"),
        (("checkpoint=nothing", "out=new"), "nothing is no file or folder here"),
        (("checkpoint=an/id", "revision=main", "out=new"), "could not be fetched"),
        ((f"checkpoint={RUN}", "out=own"), "own exists and is not empty"),
        ((f"checkpoint={RUN}", "out=new", "format=gguf"), "vgr, diffusers, original"),
        ((f"checkpoint={RUN}", "out=new", "weights=raw"), "ema, weights"),
        ((f"checkpoint={RUN}", "out=new", "fromat=vgr"), "did you mean `format`"),
        (("checkpoint=shards", "out=new"), "holds no weights"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(project, monkeypatch, words, told):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    before = sorted(project.iterdir())
    code, _, err = run(project, *words)
    assert code == 2 and told in err and err.count("\n") == 1 and err.startswith("vgr-export: error:")
    assert sorted(project.iterdir()) == before


def test_damaged_runs_and_full_disks_leave_nothing(project, tmp_path, monkeypatch):
    shutil.copytree(project / RUN, tmp_path / "run")
    victim = next((tmp_path / "run/checkpoints").glob("step_*/ema/*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:1000])
    code, _, err = run(tmp_path, "checkpoint=run", "out=new")
    assert code == 2 and victim.name in err and err.count("\n") == 1

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device", "new")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    code, _, err = run(tmp_path, f"checkpoint={project / RUN}", "out=new")
    assert code == 2 and "No space left" in err and [p.name for p in tmp_path.iterdir()] == ["run"]

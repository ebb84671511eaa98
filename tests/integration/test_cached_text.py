"""A frozen encoder's states beside the latents: kept by vgr-prepare, read by vgr-train, which then needs no encoder."""

import dataclasses
import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")
from small_training import PRESET, train
from test_prepare import command

from tests.unit.test_gemma import folder as gemma  # noqa: F401
from vgr.data.modules import ShardData
from vgr.models.gemma import Gemma2Text
from vgr.training import checkpoints
from vgr.training.conditioning import cached_text, dropped

WORDS = (
    "data=worlds_tiny", "out=shards", "train_clips=6", "val_clips=2", "source.frames=17", "source.size_hw=[32,32]",
    "source.cut_share=1.0", "codec.stride=[4,8,8]", "codec.luma=[4]", "codec.chroma=[0]", "codec.latents_mean=null",
    "codec.latents_std=null", "workers=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory, gemma):  # noqa: F811
    folder = tmp_path_factory.mktemp("cached")
    shutil.copytree(gemma, folder / "gemma")
    text = "{folder: gemma, prompt_config: gemma/config.yaml, width: 16, length: 12, dtype: float32}"
    preset = PRESET.replace("text: {width: 16, length: 16, heads: 2}", f"text: {text}")
    preset = preset.replace("defaults:\n", "defaults:\n  - override /text: gemma2\n")
    (folder / "own/experiments").mkdir(parents=True)
    (folder / "own/experiments/cached.yaml").write_text(preset.replace("val_clips: 8", "val_clips: 2"))
    given = [f"text.{k}={v}" for k, v in _text(folder).items() if k != "_target_"]
    code, told = command(folder, *WORDS, "text=gemma2", *given)
    assert code == 0, told
    return folder


def _text(folder, **changes):
    return {
        "_target_": "vgr.models.gemma.Gemma2Text", "folder": "gemma", "prompt_config": "gemma/config.yaml", "width": 16,
        "length": 12, "dtype": "float32", **changes,
    }  # fmt: skip


def _data(folder):
    return ShardData(f"{folder}/shards/train", f"{folder}/shards/val", None, 1, 4, 4)


def test_cached_states_are_the_encoders(project, monkeypatch):
    monkeypatch.chdir(project)
    data = _data(project)
    (batch,) = data.val_batches(2)
    assert max(len(row) for row in batch.captions) > 1  # several shots
    kept, encoder = cached_text(data, _text(project)), Gemma2Text(**{k: v for k, v in _text(0).items() if k[0] != "_"})
    for share in (0.0, 1.0):  # 1: every caption dropped
        captions, _ = dropped(dataclasses.replace(batch, position=torch.arange(2)), 1, share, 0.0)
        own, expected = kept(captions), encoder(captions)
        assert own.mask.equal(expected.mask)
        exact = expected.states * expected.mask.unsqueeze(-1)
        torch.testing.assert_close(own.states, exact, atol=1e-5, rtol=1e-3)
    with pytest.raises(ValueError, match="not of 'blurry'"):
        kept((("blurry",),))


def test_another_encoder_is_refused_and_a_trained_one_runs_itself(project):
    with pytest.raises(ValueError, match=r"text.length=10 \(they: 12\)"):
        cached_text(_data(project), _text(project, length=10))
    assert cached_text(_data(project), {"_target_": "vgr.models.text.ByteTextEncoder", "width": 16}) is None
    code, told = command(project, *WORDS, "out=other", "text=bytes")
    assert code == 2 and "ByteTextEncoder is trained with the model" in told and not (project / "other").exists()


def test_training_needs_no_encoder_and_its_run_names_it(project):
    (project / "gemma").rename(project / "away")
    done = train(project, "experiments=cached", "training.max_samples=16")
    assert done.returncode == 0, done.stderr[-2000:]
    (project / "away").rename(project / "gemma")
    run = project / done.stdout.split("run folder ")[1].split(",")[0]
    record = json.loads((checkpoints.resolve(run) / "generator.json").read_text())
    assert record["text"]["class"] == "Gemma2Text" and record["text"]["config"]["folder"] == "gemma"

"""From a folder of mp4 files to a trained model in two commands, and a page that shows the data."""

import io
import json
import os
import shutil
import sys
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from small_training import PRESET, metrics, train  # noqa: E402
from test_annotators import chat_model, llava  # noqa: E402
from test_folder import FPS, K, walk  # noqa: E402
from test_gemma import folder as gemma  # noqa: E402, F401

from vgr import prepare  # noqa: E402
from vgr.data import annotators  # noqa: E402
from vgr.data.shards import Shards  # noqa: E402
from vgr.data.video import write_video  # noqa: E402
from vgr.geometry.formats import write_cameras  # noqa: E402
from vgr.models import world_model_weights  # noqa: E402
from vgr.models.world_model import WorldModel  # noqa: E402
from vgr.training import checkpoints  # noqa: E402
from vgr.types import Cameras  # noqa: E402

SETTINGS = (
    "data=folder", "source.folder=videos", "out=shards", "source.frames=17", "source.size_hw=[32,32]", "source.fps=8",
    "source.cameras=files", "source.scale=1", "source.val_share=0.2", "workers=1", "codec.stride=[4,8,8]",
    "codec.luma=[4]", "codec.chroma=[0]", "codec.latents_mean=null", "codec.latents_std=null",
    "source.limits={sharpness:null,saturation:null}",
)  # fmt: skip


def vgr_prepare(folder, *words):
    out, here = io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        with mock.patch.object(sys, "argv", ["vgr-prepare", *words]), redirect_stdout(out), redirect_stderr(out):
            prepare.main()
    except SystemExit as error:
        out.write(f"exit code {error.code}")
    finally:
        os.chdir(here)
    return out.getvalue()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    (folder / "videos").mkdir()
    for i, name in enumerate(("hall", "room <b>1</b>", "yard")):
        frames = 32 * 5
        video, c2w = walk(i, frames, size=(48, 64))
        if name == "yard":
            video[100:120] = 128
        write_video(folder / f"videos/{name}.mp4", video, FPS)
        cameras = Cameras(torch.from_numpy(c2w)[None], torch.from_numpy(np.tile(K, (frames, 1)))[None])
        if i:
            write_cameras(folder / f"videos/{name}.npz", cameras, FPS)
        else:  # the same, in another form, without intrinsics
            write_cameras(folder / f"videos/{name}.txt", cameras, FPS, "tum")
        (folder / f"videos/{name}.json").write_text(json.dumps({"caption": f"a {name} & <script>alert(1)</script>"}))
    text = vgr_prepare(folder, *SETTINGS, "source.hfov_deg=79.6")
    assert "exit code" not in text, text
    return folder, text


def test_a_folder_of_mp4_files_is_prepared_and_trained_on_in_two_commands(project):
    folder, text = project
    counts = {split: len(Shards(folder / "shards" / split)) for split in ("train", "val")}
    assert counts["train"] + counts["val"] == 4 + 4 + 3 and counts["val"] >= 3
    assert "codec" in text and " dB on " in text and "blank 1 s" in text
    dropped = [x for s in counts for x in json.loads((folder / f"shards/{s}/dropped.json").read_text())]
    assert {"file", "start_s", "end_s", "rule", "value", "limit"} == set(dropped[0])
    assert {x["rule"] for x in dropped} == {"blank", "short"}
    (folder / "own/experiments").mkdir(parents=True)
    (folder / "own/experiments/mini.yaml").write_text(PRESET.replace("small", "folder") + "lora: {rank: 0}\n")
    words = ("data.train=[{path: shards/train, weight: 2}, shards/val]", "data.val=shards/val", "data.workers=0",
             "training.max_samples=64", "data.val_clips=3")  # fmt: skip
    done = train(folder, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (folder / "runs").glob("mini*/seed1")
    losses = [x["train/loss"] for x in metrics(run) if "train/loss" in x]
    assert len(losses) == 8 and np.isfinite(losses).all()
    # Adapters on what came out, on the folder's clips alone: the same two commands, of the released model.
    done = train(folder, "data.train=shards/train", "data.val=shards/val", "data.workers=0", "data.val_clips=3",
                 "training.max_samples=16", "training.warmup_samples=0", f"init_from={run}", "lora.rank=4")
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_page_shows_the_data_and_escapes_what_captions_say(project):
    folder, _ = project
    assert "inspect.html" in vgr_prepare(folder, "inspect=shards")
    html = (folder / "shards/inspect.html").read_text()
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html and "<b>1</b>" not in html
    for told in ("blank", "short", "at most 0.5", "dB, at least", "Field of view", "not stated", "Motion"):
        assert told in html
    assert html.count('<svg viewBox="0 0 100 75"') == sum(len(Shards(folder / "shards" / s)) for s in ("train", "val"))
    assert "src=\"data:image/png" in html and "http" not in html.replace("http-equiv", "")
    assert "exit code 2" in vgr_prepare(folder, "inspect=videos")


def test_published_latents_become_the_shards_they_came_from(project):
    """The set's own latents, cameras and captions, packed as the world model's example set is."""
    folder, _ = project
    sets = [Shards(folder / "shards" / split) for split in ("train", "val")]
    samples = [s.read(i) for s in sets for i in range(len(s))]
    for name in ("raw", "latents"):
        (folder / f"zips/{name}").mkdir(parents=True)
    with zipfile.ZipFile(folder / "zips/raw/x.zip", "w") as raw, zipfile.ZipFile(folder / "zips/latents/x.zip",
                                                                                 "w") as latents:
        for x in samples:
            told = {"height": 32, "width": 32, "prompt": x.meta["shots"][0]["caption"]}
            raw.writestr(f"{x.key}.json", json.dumps(told))
            with latents.open(f"{x.key}.npz", "w") as file:
                np.savez(file, z=x.latents)
    np.savez(
        folder / "zips/raw/x_camera.npz", ids=np.array([x.key for x in samples]),
        ranges=np.array([[17 * i, 17] for i in range(len(samples))]), pose=np.concatenate([x.c2w for x in samples]),
        intrinsics=np.concatenate([x.intrinsics * 32 for x in samples]),
    )  # fmt: skip
    (folder / "zips/raw/x_metric_scale_stats.json").write_text(json.dumps({x.key: 1.0 for x in samples}))
    codec = [f"source.{x}" if x.startswith("codec.") else x for x in SETTINGS if x.startswith("codec.")]
    words = ("data=latent_zips", "codec@source.codec=cosine_small", "source.raw=zips/raw", "out=unpacked",
             "source.latents=zips/latents", "source.frames=17", "source.size_hw=[32,32]", "source.fps=8",
             "source.val_share=0.3", *codec)  # fmt: skip
    text = vgr_prepare(folder, *words)
    assert "exit code" not in text, text
    again = [Shards(folder / "unpacked" / split) for split in ("train", "val")]
    assert again[0].fingerprint == sets[0].fingerprint and sum(map(len, again)) == len(samples)
    found = {x.meta["source"]["key"]: x for s in again for x in (s.read(i) for i in range(len(s)))}
    for x in samples:
        np.testing.assert_array_equal(found[x.key].latents, x.latents)
        np.testing.assert_allclose(found[x.key].c2w, x.c2w, atol=1e-12)
        assert found[x.key].meta["shots"] == x.meta["shots"]
    assert vgr_prepare(folder, *words).count("nothing to do") == 2
    done = train(folder, "data.train=unpacked/train", "data.val=unpacked/val", "data.workers=0", "data.val_clips=2",
                 "training.max_samples=16", "experiments=mini", "seed=2")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_jobs_of_an_array_make_the_set_that_one_command_makes(project):
    folder, _ = project
    words = [x for x in SETTINGS if not x.startswith("out=")] + ["source.hfov_deg=79.6", "out=arrayed"]
    assert "other parts have yet to scan" in vgr_prepare(folder, *words, "source.part=0/2")
    for i in (1, 0):
        assert "the same without source.part" in vgr_prepare(folder, *words, f"source.part={i}/2")
    assert not list(folder.glob("arrayed/*/manifest.json"))
    assert "nothing to do" in vgr_prepare(folder, *words)
    for split in ("train", "val"):
        one, many = ({p.name: p.read_bytes() for p in (folder / x / split).iterdir()} for x in ("shards", "arrayed"))
        assert one == many


def test_a_model_captions_videos_without_captions(project, monkeypatch):
    folder, _ = project
    chat_model(folder / "tiny-llava", llava)
    monkeypatch.setattr(annotators, "MAX_TOKENS", 4)
    (folder / "mute").mkdir()
    for name in ("hall", "yard"):
        (folder / f"mute/{name}.mp4").symlink_to(folder / f"videos/{name}.mp4")
    (folder / "mute/yard.txt").write_text("a yard")
    words = [x for x in SETTINGS if not x.startswith(("source.folder", "source.cameras", "source.scale", "out"))]
    words += ["source.folder=mute", "out=told", "source.captioner=tiny-llava"]
    assert "exit code" not in (text := vgr_prepare(folder, *words)), text
    for split in ("train", "val"):
        shards = Shards(folder / "told" / split)
        for sample in (shards.read(i) for i in range(len(shards))):
            (shot,) = sample.meta["shots"]
            if sample.meta["source"]["file"] == "yard.mp4":
                assert shot["caption"] == "a yard" and "captioned_by" not in shot
            else:
                assert shot["caption"] and shot["captioned_by"] == "tiny-llava"
    assert "by tiny-llava where no file has one" in vgr_prepare(folder, "inspect=told") + (
        folder / "told/inspect.html").read_text()
    told = vgr_prepare(folder, *words[:-1], "source.captioner=nowhere")
    assert "source.captioner=nowhere: no local folder" in told and "exit code 2" in told


def test_weights_in_their_released_form_are_fine_tuned_on_the_folder(project, gemma):  # noqa: F811
    """The frozen text encoder's states with the latents, then adapters on an original file of random weights."""
    folder, _ = project
    shutil.copytree(gemma, folder / "gemma")
    sizes = {"in_channels": 16, "raw_frames": 4, "width": 32, "heads": 2, "layers": 2, "softmax_every": 2}
    torch.manual_seed(0)
    model = WorldModel(**sizes, mlp_ratio=2.0, text_width=16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    (folder / "released/dit").mkdir(parents=True)
    _, tensors = world_model_weights.to_original(model.config, model.state_dict())
    save_file(tensors, folder / "released/dit/sana.safetensors")
    text = {"folder": "gemma", "prompt_config": "gemma/config.yaml", "width": 16, "length": 12, "dtype": "float32"}
    told = vgr_prepare(folder, *[x for x in SETTINGS if not x.startswith("out=")], "source.hfov_deg=79.6", "out=cached",
                       "text=gemma2", *(f"text.{k}={v}" for k, v in text.items()))  # fmt: skip
    assert "exit code" not in told, told
    preset = PRESET.replace("defaults:\n", "defaults:\n  - override /text: gemma2\n").replace(
        "text: {width: 16, length: 16, heads: 2}", f"text: {json.dumps(text)}"
    )
    (folder / "own/experiments/released.yaml").write_text(preset)
    done = train(folder, "experiments=released", "shards=cached", "data.val_clips=3", "init_from=released",
                 "lora.rank=4", "training.max_samples=32", "training.warmup_samples=0", "every.save=32")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (folder / "runs").glob("released*/seed1")
    kept = checkpoints.read_weights(checkpoints.latest(run / "checkpoints"), "weights")
    assert kept and all(".lora_" in name for name in kept)  # what was released is not stored again
    assert any(bool(value.any()) for name, value in kept.items() if "lora_B" in name)

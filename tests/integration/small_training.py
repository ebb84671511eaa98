"""A training small enough for tests: 20 steps of a 40 k parameter model on clips whose motion follows the camera."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

CODEC = {"stride": [4, 8, 8], "luma": [4], "chroma": [0]}
FRAMES, CHANNELS, GRID = 17, 16, (4, 4)

PRESET = """# @package _global_
# Question: does it run?
defaults:
  - override /codec: cosine_tiny
shards: shards
data: {micro_batch: 4, workers: 0, val_clips: 8}
model: {in_channels: 16, raw_frames: 4, width: 32, heads: 2, layers: 2, softmax_every: 2, text_width: 16}
text: {width: 16, length: 16, heads: 2}
codec: {stride: [4, 8, 8], luma: [4], chroma: [0], latents_mean: null, latents_std: null}
training: {global_batch: 8, max_samples: 160, warmup_samples: 16, lr: 3.0e-3, ema_half_life: 40}
every: {log: 8, validate: 80, sample: 0, save: 24}
trainer: {accelerator: cpu}
sampling: {steps: 2, shift: 3.0, guidance: 1.5}
"""


def clip(i):
    """Latents that drift with the camera's speed along x, and that camera."""
    rng = np.random.default_rng(i)
    speed = rng.normal()
    c2w = np.tile(np.eye(4), (FRAMES, 1, 1))
    c2w[:, 0, 3] = np.arange(FRAMES) * speed * 0.3
    drift = speed * np.linspace(0, 1, 1 + (FRAMES - 1) // 4)[None, :, None, None]
    latents = np.broadcast_to(rng.normal(size=(1, 1, *GRID)) * 0.2 + drift, (CHANNELS, 5, *GRID))
    return latents, c2w


def write_shards(folder, split, clips, fingerprint, poison=(), video=None):
    """video: latents to an mp4's bytes that are kept beside them."""
    from vgr.data.shards import ShardWriter

    start = 0 if split == "train" else 10_000
    meta = {"shots": [{"start": 0, "end": FRAMES, "caption": "a room"}], "source": {}, "metric_scale": True}
    intrinsics = np.tile([0.5, 0.6, 0.5, 0.5], (FRAMES, 1))
    with ShardWriter(folder / split, "CosineCodec", fingerprint, (4, 8, 8), CHANNELS, (32, 32), 8.0, "CC0") as writer:
        for i in range(start, start + clips):
            latents, c2w = clip(i)
            if i in poison:
                latents = latents * np.nan
            kept = {} if video is None else {"video": video(latents.astype(np.float32))}
            writer.add(f"{split}{i}", latents.astype(np.float16), c2w, intrinsics, {**meta, "split": split}, **kept)


def make_project(folder: Path, poison=()) -> Path:
    """A folder with shards and an own preset `mini`, from which `train` can be called."""
    from vgr.models.codec import CosineCodec

    fingerprint = CosineCodec(**CODEC).fingerprint
    write_shards(folder / "shards", "train", 40, fingerprint, poison)
    write_shards(folder / "shards", "val", 8, fingerprint)
    preset = folder / "own" / "experiments" / "mini.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text(PRESET)
    return folder


def command(*arguments):
    return [sys.executable, "-m", "vgr.train", "--config-dir", "own", "experiments=mini", *arguments]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def train(folder, *arguments):
    """vgr-train in this process (a new one takes seconds to import torch): exit code, stdout and stderr."""
    import torch

    from vgr import train as command_module

    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, here, threads = sys.argv, os.getcwd(), torch.get_num_threads()
    chosen = [] if any(x.startswith("experiments=") for x in arguments) else ["experiments=mini"]
    sys.argv = ["vgr-train", "--config-dir", "own", *chosen, *arguments]
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        one_thread = mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"})
        with one_thread, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command_module.main()
    except SystemExit as exit_:
        code = exit_.code
    finally:
        sys.argv = argv
        os.chdir(here)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def metrics(run_dir):
    """The lines of metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "time_s" and not k.startswith("perf/")} for x in lines]

"""vgr-prepare: write the shards that vgr-train reads, e.g. `vgr-prepare data=doom`; run again it continues."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgr import command

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vgr.training.teacher_paths import TeacherPaths


def main() -> None:
    """Entry point of the console script."""
    command.run("prepare", body)


def body(cfg: DictConfig) -> None:
    """Prepare the train and val split that cfg describes, val first since it is the smaller."""
    from hydra.utils import instantiate

    from vgr.data.prepare import prepare_split

    command.check_targets(cfg.source, "source")
    source = instantiate(cfg.source)
    if cfg.codec is None:  # the source brings latents of its own, of training clips only
        write_paths(source, Path(cfg.out) / "train", cfg.train_clips, cfg.seed)
        return
    command.check_targets(cfg.codec, "codec")
    codec = instantiate(cfg.codec)
    told = read_text(cfg)
    workers = cfg.workers or len(os.sched_getaffinity(0))
    for split, clips in (("val", cfg.val_clips), ("train", cfg.train_clips)):
        folder = Path(cfg.out) / split
        with command.progress(clips, f"{split} clips") as done:
            new = prepare_split(source, codec, folder, split, clips, cfg.seed, workers=workers,
                                keep_video=cfg.keep_video, progress=done, **told)
        print(f"{folder}: {clips} clips" + (f", {new} new" if new else ", nothing to do"))


def read_text(cfg: DictConfig) -> dict[str, Any]:
    """What `prepare_split` takes of text=, nothing without it. Raises ValueError for an encoder that is trained."""
    if cfg.text is None:
        return {}
    from functools import lru_cache

    from hydra.utils import instantiate

    from vgr.nn.frozen import to_arrays

    command.check_targets(cfg.text, "text")
    encoder = instantiate(cfg.text)
    name = type(encoder).__name__
    if encoder.state_dict():
        raise ValueError(f"text: {name} is trained with the model, so its states cannot be kept; use text=gemma2")
    encode = lru_cache(1024)(lambda captions: to_arrays(encoder((captions,)))[0])
    return {"text": encode, "text_made_by": {"class": name, "config": encoder.config}}


def write_paths(source: TeacherPaths, folder: Path, clips: int, seed: int) -> None:
    """A teacher's trajectories, on a GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with command.progress(clips, "trajectories") as done:
        new = source.write(folder, clips, seed, done, device)
    print(f"{folder}: {clips} trajectories" + (f", {new} new" if new else ", nothing to do"))


if __name__ == "__main__":
    main()

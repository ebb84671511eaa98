"""vgr-prepare: write the shards that vgr-train reads, e.g. `vgr-prepare data=doom`; run again it continues."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

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
    workers = cfg.workers or len(os.sched_getaffinity(0))
    for split, clips in (("val", cfg.val_clips), ("train", cfg.train_clips)):
        folder = Path(cfg.out) / split
        with Progress(split, clips) as show:
            new = prepare_split(source, codec, folder, split, clips, cfg.seed, workers=workers,
                                keep_video=cfg.keep_video, progress=show)
        print(f"{folder}: {clips} clips" + (f", {new} new" if new else ", nothing to do"))


def write_paths(source: TeacherPaths, folder: Path, clips: int, seed: int) -> None:
    """A teacher's trajectories, on a GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with Progress("trajectories", clips) as show:
        new = source.write(folder, clips, seed, show, device)
    print(f"{folder}: {clips} trajectories" + (f", {new} new" if new else ", nothing to do"))


class Progress:
    """Clips a second and time left: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.bar, self.began, self.first, self.told = None, time.monotonic(), None, time.monotonic()

    def __enter__(self) -> Callable[[int], None]:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, desc=self.name, unit="clip", dynamic_ncols=True)
        return self.show

    def show(self, done: int) -> None:
        """Tells that `done` clips stand; the first call says how many stood before."""
        if self.first is None:
            self.first = done
        if self.bar is not None:
            if done == self.first:
                self.bar.initial = done
            self.bar.n = done
            self.bar.refresh()
            return
        now = time.monotonic()
        if now - self.told >= 10 and done > self.first:
            self.told, rate = now, (done - self.first) / (now - self.began)
            left = (self.total - done) / rate
            print(f"{self.name}: {done}/{self.total} clips, {rate:.1f} clips/s, {left:.0f} s left", file=sys.stderr,
                  flush=True)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


if __name__ == "__main__":
    main()

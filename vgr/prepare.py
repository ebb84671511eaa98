"""vgr-prepare: write the shards that vgr-train reads, e.g. `vgr-prepare data=doom`; run again it continues."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgr import command

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vgr.data.folder import FolderSource
    from vgr.data.latent_zips import LatentZips
    from vgr.training.pairs import Pairs
    from vgr.training.teacher_paths import TeacherPaths


def main() -> None:
    """Entry point of the console script."""
    command.run("prepare", body)


def body(cfg: DictConfig) -> None:
    """Prepare the train and val split that cfg describes, val first since it is the smaller."""
    from hydra.utils import instantiate

    from vgr.data.files import write_json
    from vgr.data.prepare import prepare_split

    if cfg.inspect is not None:
        from vgr.report import inspect

        print(f"{inspect.write(cfg.inspect)}: open it in a browser")
        return
    command.check_targets(cfg.source, "source")
    source = instantiate(cfg.source)
    if cfg.codec is None:  # the source brings latents of its own
        for split, clips in (("val", cfg.val_clips), ("train", cfg.train_clips)):
            if hasattr(source, "count"):
                clips = min(source.count(split), math.inf if clips is None else clips)
            if clips:
                write_made(source, Path(cfg.out) / split, clips, cfg)
        return
    command.check_targets(cfg.codec, "codec")
    codec = instantiate(cfg.codec)
    told = read_text(cfg)
    workers = cfg.workers or len(os.sched_getaffinity(0))
    part = None
    if scanned := hasattr(source, "scan"):
        scan(source, Path(cfg.out), workers)
        part = cfg.source.part and tuple(map(int, cfg.source.part.split("/")))
        if source.missing():
            print(f"{cfg.out}: other parts have yet to scan or caption; once all have, this again writes its shards")
            return
    for split, clips in (("val", cfg.val_clips), ("train", cfg.train_clips)):
        folder = Path(cfg.out) / split
        if scanned:
            clips = min(source.count(split), math.inf if clips is None else clips)
            left_out = source.left_out(split)
            if not clips:
                print(f"{folder}: no clips")
                continue
            told["about"] = {"left_out": {rule: len(entries) for rule, entries in left_out.items()}}
        elif clips is None:
            raise ValueError(f"{split}_clips=null: all there are, which only data=folder can tell; give a number")
        with command.progress(clips, f"{split} clips") as done:
            new = prepare_split(source, codec, folder, split, clips, cfg.seed, workers=workers,
                                keep_video=cfg.keep_video, part=part, progress=done, **told)
        if part:
            print(f"{folder}: {new} clips, new; once all parts have ended, the same without source.part joins them")
            continue
        if scanned:
            write_json(folder / "dropped.json", [x for entries in left_out.values() for x in entries])
        mean = json.loads((folder / "manifest.json").read_text()).get("round_trip")
        psnr = f", codec {mean['psnr_db']:.1f} dB on {mean['clips']} of them" if mean else ""
        print(f"{folder}: {clips} clips" + (f", {new} new" if new else ", nothing to do") + psnr)


def one_video(cfg: DictConfig, codec: Any) -> None:
    """The windows of data.video that a training learns from, where they are not there yet; errors as `OneVideo`'s."""
    from vgr.data.one_video import OneVideo, video_folder
    from vgr.data.prepare import prepare_split

    data = cfg.data
    source = OneVideo(data.video, chunk=cfg.training.chunk, stride=codec.stride[0], clip=codec.clip, **data.source)
    for split, clips in (("val", data.val_clips), ("train", data.windows)):
        with command.progress(clips, f"{split} windows") as done:
            prepare_split(source, codec, video_folder(data[split], data.video), split, clips, 1, progress=done)


def scan(source: FolderSource, out: Path, workers: int) -> None:
    """Finds the clips of a folder's videos, which may take as long as encoding them; says what was left out."""
    from vgr.data.annotators import Captioner

    captions_of = None if source.captioner is None else Captioner(source.captioner)
    with command.progress(len(source.files()), "scanned files") as done:
        source.scan(out / "scan", workers, done)
    if captions_of:
        with command.progress(sum(len(shots) for _, shots in source.uncaptioned()), "captioned shots") as done:
            source.describe(captions_of, captions_of.folder.name, captions_of.fingerprint, done)
    for split in ("val", "train"):
        parts = source.left_out(split).items()
        told = ", ".join(f"{rule} {sum(x['end_s'] - x['start_s'] for x in spans):.0f} s" for rule, spans in parts)
        print(f"{out / split}: {source.count(split)} clips of {source.splits[split][0]}; left out: {told or 'nothing'}")


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


def write_made(source: TeacherPaths | Pairs | LatentZips, folder: Path, clips: int, cfg: DictConfig) -> None:
    """A teacher's trajectories or pairs, on a GPU where there is one, or published latents."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with command.progress(clips, "clips") as done:
        new = source.write(folder, clips, cfg.seed, done, device, **read_text(cfg))
    print(f"{folder}: {clips} clips" + (f", {new} new" if new else ", nothing to do"))


if __name__ == "__main__":
    main()

"""Shards: WebDataset tar files of encoded clips with a manifest that finds, checks and describes every member.

A sample is <key>.latent.npy (C,T,H,W) float16, <key>.cameras.npz (c2w (F,4,4), intrinsics (F,4), fps),
<key>.json (shots, source, metric scale, split and, if there is one, `story`, a caption of the whole), and where
kept <key>.mp4, <key>.depth.npz and <key>.text.npy (S,J,D) float16, a frozen text encoder's states of each shot, whose
lengths stand in the json. The manifest is written last; a folder without one is unfinished and `ShardWriter` continues
it. Pickle is never read.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vgr.data.files import atomic, sync_folder, write_text
from vgr.geometry.camera_file import read_npy, unpacked
from vgr.types import latents_holding, raw_frames

SCHEMA = 1
_WARP = ("latents", "visible", "still")  # of `Sample.warp`
_AGAIN = "remove that folder and run vgr-prepare again"


class DamagedSample(ValueError):
    """One sample cannot be read; others may."""


@dataclass(frozen=True)
class Sample:
    """One clip: latents (C,T,H,W) float16, c2w (F,4,4) and intrinsics (F,4) float64, frames a second, meta, key.

    text: where kept, states (J,D) float16 of each shot's caption; warp: where kept, latents as the clip's and what is
    visible of them (F,H,W) bool, and where the codec has clips the first frame's standing still; clip: of the codec.
    """

    latents: np.ndarray
    c2w: np.ndarray
    intrinsics: np.ndarray
    fps: float
    meta: dict[str, Any]
    key: str
    text: list[np.ndarray] | None = None
    warp: tuple[np.ndarray, ...] | None = None
    clip: int | None = None


def latent_shots(starts: Sequence[int], frames: int, stride: int, clip: int | None = None) -> NDArray[np.int64]:
    """The shot (T,) of each latent frame, by the raw frame it ends with; starts: each shot's first raw frame."""
    last = [raw_frames(i + 1, stride, clip) - 1 for i in range(frames)]
    return np.searchsorted(starts, last, side="right") - 1


class ShardWriter:
    """Writes shards into a folder, continuing after the last whole one; a context manager.

    The manifest is written when the block ends well, but for one job of several (alone=False). `done` counts the
    samples that were there already: the caller goes on with that one, or says by `at` which shard is next. Raises
    ValueError where the folder holds other settings.
    """

    def __init__(self, folder: str | Path, codec_name: str, codec_fingerprint: str, stride: tuple[int, int, int],
                 channels: int, size_hw: tuple[int, int], fps: float, licence: str, samples_per_shard: int = 64,
                 extra: Mapping[str, Any] | None = None, alone: bool = True, clip: int | None = None) -> None:
        self.folder, self.samples_per_shard, self.alone = Path(folder), samples_per_shard, alone
        codec = {"name": codec_name, "fingerprint": codec_fingerprint, "stride": list(stride), "channels": channels}
        if clip is not None:
            codec["clip"] = clip
        self.head = {
            "schema": SCHEMA, "codec": codec, "size_hw": list(size_hw), "fps": fps, "licence": licence,
            "samples_per_shard": samples_per_shard, "extra": dict(extra or {}),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards: dict[int, dict[str, Any]] = {}
        while self.stands(len(self.shards)):
            pass
        for path in (*self.folder.glob(".*.part"), self.folder / "manifest.json") if alone else ():
            path.unlink(missing_ok=True)
        self.at, self.done = len(self.shards), len(self.shards) * samples_per_shard
        self._pending: list[tuple[str, dict[str, bytes]]] = []

    def stands(self, number: int, samples: int | None = None) -> bool:
        """Whether that shard is there, full or of so many samples; ValueError where its settings are others."""
        if not (index := self._path(number, "json")).is_file():
            return False
        known = json.loads(index.read_text())
        if known["head"] != self.head:
            changed = [k for k in self.head if known["head"].get(k) != self.head[k]]
            raise ValueError(f"{self.folder} holds shards with another {', '.join(changed)}; choose another `out`, "
                             "or remove that folder")
        whole = _size(self._path(number, "tar")) == known["bytes"]  # lost, or cut short by who copied it
        if whole := whole and len(known["samples"]) == (samples or self.samples_per_shard):
            self.shards[number] = {k: v for k, v in known.items() if k != "head"}
        return whole

    def _path(self, number: int, ending: str) -> Path:
        return self.folder / f"shard-{number:05d}.{ending}"

    def add(self, key: str, latents: np.ndarray, c2w: np.ndarray, intrinsics: np.ndarray, meta: Mapping[str, Any],
            video: bytes | None = None, depth: np.ndarray | None = None,
            text: tuple[np.ndarray, np.ndarray] | None = None,
            warp: tuple[np.ndarray, ...] | None = None) -> None:
        """Adds a sample; a full shard goes to disk.

        latents (C,T,h,w), c2w (F,4,4), depth (F,H,W) metres, text: states (S,J,D) and lengths (S,), warp: latents as
        the clip's, visible (F,H,W) bool and, of a codec with clips, a still frame's latent (C,1,h,w).
        """
        _check_shapes(self.head, latents.shape, c2w.shape, intrinsics.shape, key)
        cameras = dict(c2w=c2w.astype(np.float64), intrinsics=intrinsics.astype(np.float64))
        members = {
            "latent.npy": _npy(latents.astype(np.float16)),
            "cameras.npz": _npz(**cameras, fps=np.float64(self.head["fps"])),
            "json": json.dumps(meta if text is None else {**meta, "text_lengths": text[1].tolist()},
                               sort_keys=True).encode(),
            "mp4": video,
            "depth.npz": None if depth is None else _npz(depth=depth.astype(np.float16)),
            "text.npy": None if text is None else _npy(text[0].astype(np.float16)),
            "warp.npz": None if warp is None else _npz(**dict(zip(_WARP, warp))),
        }
        self._pending.append((key, {suffix: data for suffix, data in members.items() if data is not None}))
        if len(self._pending) == self.samples_per_shard:
            self._flush()

    def _flush(self) -> None:
        """Writes the pending samples as one shard, then its index: a shard counts once its index stands."""
        buffer, entries = io.BytesIO(), []
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members in self._pending:
                where = {}
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")  # no time and no owner: equal samples, equal files
                    info.size = len(data)
                    where[suffix] = [tar.offset + tarfile.BLOCKSIZE, len(data), zlib.crc32(data)]
                    tar.addfile(info, io.BytesIO(data))
                entries.append({"key": key, "members": where})
        path, data = self._path(self.at, "tar"), buffer.getbuffer()
        with atomic(path) as file:
            file.write(data)
        digest = hashlib.sha256(data).hexdigest()
        shard = {"file": path.name, "bytes": len(data), "sha256": digest, "samples": entries}
        write_text(self._path(self.at, "json"), json.dumps({"head": self.head, **shard}))
        self.shards[self.at], self.at, self._pending = shard, self.at + 1, []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        """Writes what is pending and the manifest, last; removes shards of an earlier, longer set."""
        if kind is not None:
            return
        if self._pending:
            self._flush()
        if not self.alone:
            return
        for path in self.folder.glob("shard-*"):
            if int(path.stem.split("-")[1]) not in self.shards:
                path.unlink()
        sync_folder(self.folder)
        shards = [self.shards[number] for number in sorted(self.shards)]
        told = {**self.head, "samples": sum(len(s["samples"]) for s in shards), "shards": shards}
        write_text(self.folder / "manifest.json", json.dumps(told))


class Shards:
    """Reads a folder of shards by sample index. Raises ValueError, saying what to do, where it is not whole.

    codec_fingerprint: refuses shards of any other codec. Attributes: manifest, fingerprint, keys, counts.
    """

    def __init__(self, folder: str | Path, codec_fingerprint: str | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise ValueError(f"{self.folder}: no manifest.json, so no finished data; run vgr-prepare (it continues)")
        try:
            self.manifest = json.loads(path.read_text())
            schema, self.fingerprint = self.manifest["schema"], self.manifest["codec"]["fingerprint"]
            self.counts = [len(s["samples"]) for s in self.manifest["shards"]]
            self._samples = [(s["file"], e["key"], e["members"]) for s in self.manifest["shards"] for e in s["samples"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: is no manifest of shards ({error!r}); {_AGAIN}") from error
        if schema != SCHEMA:
            raise ValueError(f"{path}: schema {schema}, but this version reads {SCHEMA}; {_AGAIN}")
        if codec_fingerprint is not None and codec_fingerprint != self.fingerprint:
            raise ValueError(
                f"{self.folder} was encoded with codec {self.manifest['codec']['name']} {self.fingerprint}, not "
                f"{codec_fingerprint}; choose the codec it was prepared with, or run vgr-prepare with codec=... out=..."
            )
        for shard in self.manifest["shards"]:
            file = self.folder / Path(shard["file"]).name
            if _size(file) != shard["bytes"]:
                raise ValueError(f"{file}: not the manifest's {shard['bytes']} bytes (truncated or missing); {_AGAIN}")

    @property
    def keys(self) -> list[str]:
        return [key for _, key, _ in self._samples]

    def __len__(self) -> int:
        return len(self._samples)

    def latent_bytes(self) -> int:
        """Size of all latents and text states on disk, to decide whether they fit into memory."""
        kept = ("latent.npy", "text.npy")
        return sum(members[name][1] for _, _, members in self._samples for name in kept if name in members)

    def latent_frames(self) -> list[int]:
        """T of each sample, by the bytes of its latents."""
        codec, (height, width) = self.manifest["codec"], self.manifest["size_hw"]
        _, h, w = codec["stride"]
        frame = 2 * codec["channels"] * (height // h) * (width // w)  # float16, after a header of 128 bytes
        return [(members["latent.npy"][1] - 128) // frame for _, _, members in self._samples]

    def null_text(self) -> np.ndarray:
        """States (J,D) of the empty caption, where the manifest names a file of them."""
        return read_npy((self.folder / Path(self.manifest["extra"]["text"]["null"]).name).read_bytes())

    def _members(self, index: int, *suffixes: str) -> list[memoryview]:
        """Members of a sample as they stand in its file, checked."""
        (file, key, members), found = self._samples[index], []
        with (self.folder / Path(file).name).open("rb") as stream:
            for suffix in suffixes:
                offset, size, crc = members[suffix]
                data = memoryview(np.empty(size, np.uint8))  # arrays lie in it, without a copy
                stream.seek(offset)
                if stream.readinto(data) != size or zlib.crc32(data) != crc:
                    raise DamagedSample(f"{self.folder / file}: {key}.{suffix} is damaged; {_AGAIN}")
                found.append(data)
        return found

    def read(self, index: int) -> Sample:
        """One sample. Raises DamagedSample (a ValueError) naming the file and member."""
        file, key, members = self._samples[index]
        try:
            names = ("latent.npy", "cameras.npz", "json", *(x for x in ("text.npy", "warp.npz") if x in members))
            data = dict(zip(names, self._members(index, *names)))
            latents, cameras = read_npy(data["latent.npy"]), _read_npz(data["cameras.npz"])
            meta = json.loads(bytes(data["json"]))
            _check_shapes(self.manifest, latents.shape, cameras["c2w"].shape, cameras["intrinsics"].shape, key)
            text = None
            if "text.npy" in data:
                states, lengths = read_npy(data["text.npy"]), meta["text_lengths"]
                if len(states) != len(meta["shots"]) or len(lengths) != len(states) or max(lengths) > states.shape[1]:
                    raise ValueError(f"text states {states.shape} do not fit {len(meta['shots'])} shots of {lengths}")
                text = [x[:n] for x, n in zip(states, lengths)]
            warp = None
            if "warp.npz" in data:
                found = _read_npz(data["warp.npz"])
                warp = tuple(found[name] for name in _WARP if name in found)
                if warp[0].shape != latents.shape or warp[1].shape != (len(cameras["c2w"]), *self.manifest["size_hw"]):
                    raise ValueError(f"warp {warp[0].shape}, {warp[1].shape} does not fit latents {latents.shape}")
            views = cameras["c2w"], cameras["intrinsics"], float(cameras["fps"])
            return Sample(latents, *views, meta, key, text, warp, self.manifest["codec"].get("clip"))
        except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            if isinstance(error, DamagedSample):
                raise
            raise DamagedSample(f"{self.folder / file}: {key} cannot be read ({error}); {_AGAIN}") from error

    def read_video_bytes(self, index: int) -> bytes | None:
        """The sample's mp4, or None where videos were not kept."""
        return bytes(*self._members(index, "mp4")) if "mp4" in self._samples[index][2] else None

    def read_depth(self, index: int) -> np.ndarray | None:
        """Planar depth (F,H,W) float16 in metres, or None where it was not kept."""
        if "depth.npz" not in self._samples[index][2]:
            return None
        return _read_npz(*self._members(index, "depth.npz"))["depth"]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _check_shapes(head: Mapping[str, Any], latents: tuple, c2w: tuple, intrinsics: tuple, key: str) -> None:
    codec, size = head["codec"], head["size_hw"]
    t, h, w = codec["stride"]
    frames = c2w[0] if c2w else 0
    count = latents_holding(frames, t, codec.get("clip"))
    wanted = (codec["channels"], count, size[0] // h, size[1] // w)
    whole = raw_frames(count, t, codec.get("clip")) == frames
    if latents != wanted or not whole or c2w[1:] != (4, 4) or intrinsics != (frames, 4):
        raise ValueError(f"{key}: latents {latents}, c2w {c2w} and intrinsics {intrinsics} do not fit a codec of "
                         f"{codec['channels']} channels and stride {codec['stride']} at {size[0]}x{size[1]}")


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _npz(**arrays: np.ndarray) -> bytes:
    """An npz without the clock that zip files otherwise carry."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), _npy(np.asarray(array)),
                             compress_type=zipfile.ZIP_DEFLATED, compresslevel=1)
    return out.getvalue()


def _read_npz(data: bytes | memoryview, limit: int = 1 << 30) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(info.file_size for info in archive.infolist()) > limit:
            raise ValueError(f"an archive of more than {limit} bytes")
        names = [info.filename for info in archive.infolist()]
        return {name.removesuffix(".npy"): read_npy(unpacked(archive, name)) for name in names}

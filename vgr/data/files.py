"""Files that are either whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes `path`'s name once the block ends well; else (full disk, error) nothing is left."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames and removals in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file so that a crash leaves either the old or the new content. Raises OSError."""
    with atomic(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON as `write_text` does. NaN is refused: JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False))


class Journal:
    """What was found, by id, in the jsonl files of a folder: all are read, each job of an array adds to its own."""

    def __init__(self, folder: Path, own: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lines = (line for path in sorted(folder.glob("*.jsonl")) for line in read_lines(path))
        self.known = {line["id"]: line for line in lines if "id" in line}
        self._out = (folder / own).open("a", encoding="utf-8")
        self._out.write("\n" if self._out.tell() else "")  # a kill may have cut the last line short

    def add(self, found: dict[str, Any]) -> None:
        """Keeps a finding, whose `id` names it."""
        self.known[found["id"]] = found
        self._out.write(json.dumps(found, allow_nan=False) + "\n")
        self._out.flush()


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file of one JSON object a line, without a line cut short by a kill; [] where there is none."""
    lines, path = [], Path(path)
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines

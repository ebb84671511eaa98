"""Says which rank hangs where: every rank tells what it is at, and one that is at it for too long shows its stack."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vgr.data.files import write_text


class Watchdog:
    """Knows what this rank is at, from `beat` to `beat`; all ranks beat alike, so one with fewer of them is behind.

    After limit_s seconds without a beat, and again after each further limit_s, the stacks of this rank's threads go to
    <folder>/rank00003.txt, by a thread of C that needs no interpreter lock. The first rank then says, with doubling
    pauses, which ranks are behind and on which host. It ends nothing: a long validation is told of and goes on, and a
    rank that waits for one that hangs is ended by the process group's own limit. limit_s 0 turns it off.
    """

    def __init__(self, folder: Path, limit_s: float, rank: int, ranks: int, say: Callable[[str], None]) -> None:
        self.folder, self.limit_s, self.rank, self.ranks, self.say = folder, limit_s, rank, ranks, say
        self._at: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "beats": 0}
        self._since = time.monotonic()
        self._stop = threading.Event()
        if limit_s > 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._stacks = (folder / f"rank{rank:05d}.txt").open("a")
            self.beat(0, "start")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """This rank begins `phase` of what comes after `step` optimizer steps."""
        if self.limit_s > 0:
            beats = self._at["beats"] + 1
            self._at = {**self._at, "beats": beats, "step": step, "phase": phase, "since": time.time()}
            self._since = time.monotonic()
            faulthandler.dump_traceback_later(self.limit_s, repeat=True, file=self._stacks)

    def close(self) -> None:
        """Watch no longer; leaves the stacks, if any were needed."""
        if self.limit_s > 0 and not self._stop.is_set():
            self._stop.set()
            self._thread.join(self.limit_s)
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            for path in self.folder.glob(f"rank{self.rank:05d}.*"):
                if path.suffix == ".json" or path.stat().st_size == 0:
                    path.unlink()
            with contextlib.suppress(OSError):  # other ranks are there yet, or have removed it
                self.folder.rmdir()

    def _watch(self) -> None:
        written, pause = 0, self.limit_s
        while not self._stop.wait(self.limit_s / 10):
            at, seconds = self._at, time.monotonic() - self._since
            try:
                if at["beats"] != written:
                    write_text(self.folder / f"rank{self.rank:05d}.json", json.dumps(at))
                    written, pause = at["beats"], self.limit_s
                if self.rank == 0 and seconds > pause:
                    pause *= 2
                    self.say(self.told())
            except OSError:  # a file system that hangs or is full: training itself will say so
                continue

    def told(self) -> str:
        """Who is behind and where, or where all are, by what every rank last wrote."""
        found: dict[int, dict[str, Any]] = {}
        for rank in range(self.ranks):
            try:
                found[rank] = json.loads((self.folder / f"rank{rank:05d}.json").read_text())
            except (OSError, ValueError):
                continue
        now = time.time()  # clocks of hosts differ by less than what is told
        furthest = max(at["beats"] for at in found.values())
        behind = {rank: at for rank, at in found.items() if at["beats"] < furthest}
        ahead = next(at for at in found.values() if at["beats"] == furthest)
        silent = [rank for rank in range(self.ranks) if rank not in found]
        lines = [
            f"rank {rank} on {at['host']} (process {at['pid']}) is behind: {at['phase']} after step {at['step']} "
            f"for {now - at['since']:.0f} s"
            for rank, at in list(behind.items())[:8]
        ]
        lines += [f"and {len(behind) - 8} more ranks"] if len(behind) > 8 else []
        lines += [f"ranks {silent} have said nothing"] if silent else []
        others = f"{len(found) - len(behind)} of {self.ranks} ranks are at: {ahead['phase']} after step {ahead['step']}"
        lines.append(f"{others} for {now - ahead['since']:.0f} s")
        return f"watchdog: {'; '.join(lines)}. Stacks: {self.folder}. Nothing was stopped"

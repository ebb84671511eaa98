"""What a number or a run was made with: commit, what the tree has beside it, versions, device, command line."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from vgr.data.files import atomic, write_json

ROOT = Path(__file__).resolve().parents[2]  # the checkout, or site-packages
PACKAGES = (
    "vgr", "torch", "numpy", "scipy", "opencv-python-headless", "av", "torchmetrics", "pytorch-lightning", "hydra-core",
    "wandb", "deepspeed", "diffusers", "transformers",
)  # fmt: skip
DIFF = ("diff", "--no-color", "--no-ext-diff", "--no-textconv", "--full-index")


def _git(*arguments: str) -> bytes | None:
    """What git says in the checkout of this package; None outside one, or where git cannot be asked."""
    if not (ROOT / ".git").exists():
        return None
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # another git may be at work in the same tree
    try:
        call = subprocess.run(["git", *arguments], cwd=ROOT, env=quiet, capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return call.stdout if call.returncode in (0, 1) else None  # 1: --no-index tells of a difference


def environment() -> dict[str, Any]:
    """Commit (None outside a checkout), device and versions: what a number was measured with."""
    import torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "commit": (_git("rev-parse", "HEAD") or b"").decode().strip() or None,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions,
    }


def difference() -> bytes:
    """A patch from the commit to the tree: what git tracks, and .py and .yaml it neither tracks nor ignores."""
    parts = [_git(*DIFF, "HEAD") or b""]
    new = (_git("ls-files", "-z", "--others", "--exclude-standard", "--", "*.py", "*.yaml") or b"").split(b"\0")
    parts += [_git(*DIFF, "--no-index", "--", os.devnull, os.fsdecode(name)) or b"" for name in new if name]
    return b"".join(parts)


def save(run_dir: Path, samples_seen: int) -> dict[str, Any]:
    """Add this start to run_dir/code.json, a list, and its patch, if there is one, as code-<sha256>.diff; gives it.

    Raises OSError.
    """
    found, patch = environment(), difference()
    digest = hashlib.sha256(patch).hexdigest() if patch else None
    told = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "samples_seen": samples_seen,
        "command": shlex.join(sys.argv),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "commit": found["commit"],
        "branch": (_git("rev-parse", "--abbrev-ref", "HEAD") or b"").decode().strip() or None,
        "dirty": None if found["commit"] is None else bool(patch),
        "diff_sha256": digest,
        "diff": digest and f"code-{digest[:8]}.diff",
        "device": found["device"],
        "versions": found["versions"],
    }
    if patch:
        with atomic(run_dir / told["diff"]) as file:
            file.write(patch)
    path = run_dir / "code.json"
    write_json(path, [*(json.loads(path.read_text()) if path.is_file() else []), told])
    return told

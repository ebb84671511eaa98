"""Our world model against diffusers' port: same weights, same inputs, alternating in one run.

    python -m benchmarks.speed.world_model                      # eager, three sizes and a length sweep
    python -m benchmarks.speed.world_model --compile --sizes demo

Streaming is compared, too: a denoising call of one chunk of three latent frames at the end of a history. Ours reads a
memory (every softmax block the first and the last chunk, spec 6.3), the port has none and computes the history again.

For each case both models run once to warm up, then in turn `--repeats` times; the ratio of a pair is port / ours, so
machine noise that lasts longer than a pair cancels. Writes JSON with device and versions to --out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.speed.sana_port import Inputs, fp32_softmax, from_port, make_inputs, make_port
from vgr.diffusion.samplers import chunk_bounds
from vgr.types import Layout

# name: width, heads, layers, latent channels, text width, raw frames, batch, latent frames, grid
SIZES: dict[str, tuple[int, int, int, int, int, int, int, int, tuple[int, int]]] = {
    "small": (64, 2, 4, 32, 64, 8, 4, 5, (6, 8)),
    "demo": (128, 4, 4, 82, 64, 8, 4, 15, (6, 8)),
    "large": (256, 8, 8, 46, 128, 8, 2, 13, (12, 16)),
}
LENGTHS = (5, 13, 25, 49, 97)
CHUNK, HISTORIES = 3, (13, 49, 97)  # latent frames


def to_device(inputs: Inputs, device: str) -> Inputs:
    return Inputs(inputs.x.to(device), inputs.t.to(device), inputs.cond.to(device))


def seconds(call: Callable[[], Tensor], backward: bool, device: str) -> float:
    start = time.perf_counter()
    out = call()
    if backward:
        out.square().mean().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, frames: int | None, args: argparse.Namespace) -> list[dict[str, object]]:
    """Forward and forward + backward of one case; ratios are of adjacent pairs."""
    width, heads, layers, channels, text, raw, batch, default, grid = SIZES[name]
    frames = frames or default
    port = make_port(width, heads, layers, 4, channels, text, raw, 0).to(args.device)
    ours = from_port(port).to(args.device)
    inputs = to_device(make_inputs(batch, channels, frames, grid, text, raw, 1), args.device)
    arguments = inputs.port_arguments()
    parameters = sum(p.numel() for p in ours.parameters())
    if args.compile:
        # The compiler does not see through the patch that keeps the port in fp32: both take its bf16 softmax.
        for block in ours.blocks:
            block.attn.softmax_bf16 = True
        port, ours = torch.compile(port), torch.compile(ours)

    def run_port() -> Tensor:
        return port(**arguments, return_dict=False)[0]

    def run_ours() -> Tensor:
        return ours(inputs.x, inputs.t, inputs.cond)[0]

    about = {"case": name, "batch": batch, "latent_frames": frames, "grid": grid, "parameters": parameters}
    return [
        timed(run_port, run_ours, about | {"what": "forward+backward" if backward else "forward"}, backward, args)
        for backward in (False, True)
    ]


def compare_chunk(frames: int, args: argparse.Namespace) -> dict[str, object]:
    """A denoising call of the chunk behind `frames` latent frames at size demo: ours from memory, the port whole."""
    width, heads, layers, channels, text, raw, batch, _, grid = SIZES["demo"]
    port = make_port(width, heads, layers, 4, channels, text, raw, 0).to(args.device)
    ours = from_port(port, sink=1, window=1).to(args.device)
    inputs = to_device(make_inputs(batch, channels, frames + CHUNK, grid, text, raw, 1), args.device)
    layout = Layout.chunked(batch, frames + CHUNK, CHUNK, args.device)
    cond, state = dataclasses.replace(inputs.cond, layout=layout), ours.new_state()
    with torch.no_grad():
        for a, b in chunk_bounds(layout)[:-1]:
            past = inputs.x[:, :, a:b], torch.zeros_like(inputs.t[:, a:b]), cond.frames(a, b)
            _, state = ours(*past, state, commit=True)
    x, t, part = inputs.x[:, :, frames:], inputs.t[:, frames:], cond.frames(frames, frames + CHUNK)
    about = {"case": "demo", "what": "chunk", "batch": batch, "latent_frames": frames, "grid": grid}
    whole = inputs.port_arguments()
    return timed(lambda: port(**whole, return_dict=False)[0], lambda: ours(x, t, part, state)[0], about, False, args)


def timed(
    run_port: Callable[[], Tensor], run_ours: Callable[[], Tensor], about: dict[str, object], backward: bool,
    args: argparse.Namespace,
) -> dict[str, object]:  # fmt: skip
    """The row of `about`, both in turn; ratios are of adjacent pairs."""
    pairs = []
    with torch.set_grad_enabled(backward), contextlib.nullcontext() if args.compile else fp32_softmax():
        for i in range(args.repeats + 1):
            pair = (seconds(run_port, backward, args.device), seconds(run_ours, backward, args.device))
            if i:
                pairs.append(pair)
    ratios = sorted(a / b for a, b in pairs)
    row = {
        **about, "compiled": args.compile,
        "port_s": statistics.median(a for a, _ in pairs), "ours_s": statistics.median(b for _, b in pairs),
        "ratio_median": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1], "pairs": len(pairs),
    }  # fmt: skip
    print(
        f"{row['case']:6s} T={row['latent_frames']:3d} {row['what']:16s} port {row['port_s']:.3f} s  "
        f"ours {row['ours_s']:.3f} s  ratio {row['ratio_median']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS), help="latent frames, at size small")
    parser.add_argument("--histories", nargs="*", type=int, default=list(HISTORIES), help="before a chunk")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [row for name in args.sizes for row in compare(name, None, args)]
    rows += [row for frames in args.lengths for row in compare("small", frames, args)]
    rows += [compare_chunk(frames, args) for frames in args.histories]
    found = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.processor() or 'CPU'}",
        "threads": torch.get_num_threads(),
        "versions": {p: metadata.version(p) for p in ("torch", "diffusers")} | {"python": platform.python_version()},
        "rows": rows,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

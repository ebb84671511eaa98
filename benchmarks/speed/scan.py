"""The gated delta scan in Triton against its torch form: frame summaries, bidirectional states and both together.

    python -m benchmarks.speed.scan --out benchmarks/results/speed_scan_h100.json    # one GPU, the released sizes
    python -m benchmarks.speed.scan --tiny                                           # CPU, in Triton's interpreter

For each case both forms run once to warm up, then in turn `--repeats` times; the ratio of a pair is torch / Triton, so
machine noise that lasts longer than a pair cancels. The largest difference of values and gradients, relative to the
largest value of the torch form, stands beside each time. Writes JSON with device and versions to --out.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from vgr.data.files import write_json

REAL, TINY = (20, 880, 112), (2, 20, 16)  # heads, tokens of a frame, head width
Form = Callable[[list[Tensor]], tuple[Tensor, ...]]


def make_inputs(frames: int, heads: int, tokens: int, width: int, device: str) -> list[Tensor]:
    """Keys, values, gates and decays as the world model has them: keys not negative, of norm near (2 S)^-0.5."""
    torch.manual_seed(0)
    k = torch.randn(frames, heads, tokens, width, device=device).relu() * (width * tokens) ** -0.5
    v = torch.randn(frames, heads, tokens, width, device=device)
    beta = torch.rand(frames, heads, tokens, device=device)
    return [x.requires_grad_() for x in (k, v, beta, 0.9 + 0.1 * torch.rand(frames, heads, device=device))]


def seconds(form: Form, inputs: list[Tensor], backward: bool) -> tuple[float, list[Tensor]]:
    """Time of one call, and what it gave: outputs, or gradients of their sum."""
    start = time.perf_counter()
    found = form(inputs)
    if backward:
        found = torch.autograd.grad(found, inputs, [torch.ones_like(x) for x in found])
    if found[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, list(found)


def compare(
    name: str, forms: tuple[Form, Form], inputs: list[Tensor], shape: dict[str, int], repeats: int
) -> list[dict]:
    """Forward and forward + backward of one case; ratios are of adjacent pairs."""
    rows = []
    for backward in (False, True):
        pairs = []
        with torch.set_grad_enabled(backward):
            for i in range(repeats + 1):
                (slow, want), (fast, got) = (seconds(form, inputs, backward) for form in forms)
                if i:
                    pairs.append((slow, fast))
                else:
                    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want))
                del want, got
        ratios = sorted(a / b for a, b in pairs)
        row = {
            "case": name, **shape, "what": "forward+backward" if backward else "forward", "relative_error": error,
            "torch_s": statistics.median(a for a, _ in pairs), "triton_s": statistics.median(b for _, b in pairs),
            "ratio_median": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1],
            "pairs": len(pairs),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:9s} T={shape['frames']:3d} {row['what']:16s} torch {1e3 * row['torch_s']:9.3f} ms  "
            f"triton {1e3 * row['triton_s']:9.3f} ms  ratio {row['ratio_median']:.2f} "
            f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f})  error {error:.1e}",
            flush=True,
        )
    return rows


def cases(frames: int, args: argparse.Namespace) -> list[dict]:
    """Summaries, states and both at one length."""
    from vgr.nn import gated_delta, gated_delta_triton  # after the choice of the interpreter

    heads, tokens, width = TINY if args.tiny else REAL
    inputs = make_inputs(frames, heads, tokens, width, args.device)
    shape = {"frames": frames, "heads": heads, "tokens": tokens, "width": width}
    with torch.no_grad():
        maps = [x.requires_grad_() for x in gated_delta.frame_summaries(*inputs)]

    def torch_states(x: list[Tensor]) -> tuple[Tensor, ...]:
        return (gated_delta.frame_states(*x)[0],)

    def triton_states(x: list[Tensor]) -> tuple[Tensor, ...]:
        return (gated_delta_triton.bidirectional_states(*x, precision=args.precision)[0],)

    def torch_maps(x: list[Tensor]) -> tuple[Tensor, ...]:
        return gated_delta.frame_summaries(*x)

    def triton_maps(x: list[Tensor]) -> tuple[Tensor, ...]:
        return gated_delta_triton.frame_summaries(*x, precision=args.precision)

    both = (lambda x: torch_states(list(torch_maps(x))), lambda x: triton_states(list(triton_maps(x))))
    return [
        *compare("summaries", (torch_maps, triton_maps), inputs, shape, args.repeats),
        *compare("states", (torch_states, triton_states), maps, shape, args.repeats),
        *compare("both", both, inputs, shape, args.repeats),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", nargs="*", type=int, help="latent frames; 3 21 121, with --tiny 2 3")
    parser.add_argument("--precision", default="ieee", choices=("ieee", "tf32x3", "tf32"), help="of the kernels' dots")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="small sizes, which the interpreter can do")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        if not args.tiny:
            parser.error("device=cpu runs in Triton's interpreter, which takes hours at real sizes: add --tiny")
        os.environ["TRITON_INTERPRET"] = "1"
    lengths = args.lengths or ((2, 3) if args.tiny else (3, 21, 121))
    rows = [row for frames in lengths for row in cases(frames, args)]
    found = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU, Triton's interpreter",
        "precision": args.precision, "torch_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {p: metadata.version(p) for p in ("torch", "triton")} | {"python": platform.python_version()},
        "rows": rows,
    }  # fmt: skip
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    main()

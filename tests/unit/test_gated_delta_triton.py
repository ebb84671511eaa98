"""The kernels equal the torch form in float64, forward and backward.

The comparisons are marked gpu and take real sizes there. Everywhere else one test runs them at small sizes in Triton's
interpreter, in a process of its own: the interpreter is chosen for a whole process, at the first import of triton. What
the interpreter cannot see, that the kernels compile for a GPU and fit its registers, another test checks without one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from vgr.nn import gated_delta, gated_delta_triton  # noqa: E402

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
LONG = (4, *[3] * 39)
on_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRET and not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# T, X, K, E, chunks, with an initial state
SCANS = [(1, 1, 16, 8, None, True), (5, 2, 8, 8, None, False), (10, 1, 16, 40, (4, 3, 3), True)]
SCANS += [(4, 2, 24, 1, (2, 1, 1), False), (3, 1, 112, 33, (1, 2), True)]
REAL_SCANS = [(3, 20, 112, 112, None, True), (121, 40, 112, 112, LONG, True), (121, 20, 112, 1, None, False)]
# T, X, S, K, E (None: the normaliser), dtype
SUMMARIES = [(2, 2, 70, 24, 48, "float32"), (2, 2, 33, 8, None, "float32"), (1, 2, 20, 16, 1, "float32")]
SUMMARIES += [(1, 1, 40, 112, 20, "float32"), (1, 2, 20, 16, 24, "bfloat16"), (1, 1, 9, 8, 8, "float16")]
REAL_SUMMARIES = [(3, 20, 880, 112, 112, "float32"), (3, 20, 880, 112, None, "float32")]
REAL_SUMMARIES += [(3, 20, 880, 112, 112, "bfloat16"), (21, 40, 880, 112, 112, "float32")]
PRECISIONS = ["ieee"] if INTERPRET else ["ieee", "tf32x3"]


def _draw(*shape, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g)).to(DEVICE)


def _gates(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _states_reference(g, a, chunks=None, initial=None):
    """The definition, frame by frame."""
    zero = torch.zeros_like(a[0])
    ahead, behind, ends = [], [zero] * len(a), set()
    for size in chunks or (len(a),):
        ends.add(max(ends, default=-1) + size)
    for t in range(len(a)):
        ahead.append(a[t] + g[t] @ (ahead[-1] if ahead else zero if initial is None else initial))
    for t in reversed(range(len(a) - 1)):
        behind[t] = zero if t in ends else g[t + 1] @ behind[t + 1] + a[t + 1]
    return torch.stack(ahead) + torch.stack(behind), ahead[-1]


def _compare(fast, slow, inputs, tolerance=1e-5, grad_tolerance=1e-5):
    """Values, then gradients under random weights on every output; errors are relative to the largest value."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    results = fast(*leaves), slow(*exact)
    for a, b in zip(*results):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * b.abs().max().item())
    weights = [_draw(*x.shape, seed=90 + i) for i, x in enumerate(results[0])]
    grads = [
        torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, out)), [x for x in given if x is not None])
        for out, given in zip(results, (leaves, exact))
    ]
    for a, b, given in zip(*grads, (x for x in leaves if x is not None)):
        assert a.dtype == given.dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=grad_tolerance * b.abs().max().item())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("frames, heads, width, target, chunks, start", SCANS if INTERPRET else SCANS + REAL_SCANS)
class TestScan:
    pytestmark = on_device

    def test_equals_the_definition(self, frames, heads, width, target, chunks, start, precision):
        g = _draw(frames, heads, width, width, seed=0, scale=0.45 * width**-0.5)  # of norm near 0.9
        a = _draw(frames, heads, width, target, seed=1)
        initial = _draw(heads, width, target, seed=2) if start else None
        _compare(
            lambda g, a, initial: gated_delta_triton.bidirectional_states(g, a, chunks, initial, precision=precision),
            lambda g, a, initial: _states_reference(g, a, chunks, initial),
            (g, a, initial),
        )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "frames, heads, tokens, width, target, dtype", SUMMARIES if INTERPRET else SUMMARIES + REAL_SUMMARIES
)
class TestSummaries:
    pytestmark = on_device

    def test_equal_the_torch_form(self, frames, heads, tokens, width, target, dtype, precision):
        per_head = lambda x: x.to(getattr(torch, dtype)).permute(1, 2, 0, 3)  # noqa: E731, strided as attention hands it over
        k = per_head(_draw(tokens, frames, heads, width, seed=0, scale=(width * tokens) ** -0.5))
        v = None if target is None else per_head(_draw(tokens, frames, heads, target, seed=1))
        assert not k.is_contiguous() or frames == heads == 1
        _compare(
            lambda *x: gated_delta_triton.frame_summaries(*x, precision=precision),
            gated_delta.frame_summaries,
            (k, v, _gates(frames, heads, tokens, seed=2), _gates(frames, heads, seed=3) + 0.01),
            grad_tolerance=1e-5 if dtype == "float32" else 1e-2,
        )


class TestTogether:
    pytestmark = on_device

    def test_equal_the_recurrence_as_written(self):
        frames, heads, tokens, width, target = (4, 2, 21, 16, 24) if INTERPRET else (13, 20, 880, 112, 112)
        q, k = (_draw(frames, heads, tokens, width, seed=i, scale=(width * tokens) ** -0.5) for i in (0, 1))
        v, beta = _draw(frames, heads, tokens, target, seed=2), _gates(frames, heads, tokens, seed=3)

        def kernels(q, *rest):
            return (q @ gated_delta_triton.bidirectional_states(*gated_delta_triton.frame_summaries(*rest))[0],)

        def recurrence(*x):
            return (gated_delta.delta_rule_reference(*x) + gated_delta.delta_rule_reference(*x, reverse=True),)

        _compare(kernels, recurrence, (q, k, v, beta, _gates(frames, heads, seed=4)))

    def test_inputs_and_saved_tensors_stay_as_they_are(self):
        g, a = _draw(3, 1, 16, 16, seed=0).requires_grad_(), _draw(3, 1, 16, 8, seed=1).requires_grad_()
        before = g.detach().clone(), a.detach().clone()
        read, last = gated_delta_triton.bidirectional_states(g, a)
        want = torch.autograd.grad(read.sum() + last.sum(), (g, a), retain_graph=True)
        read.detach().zero_(), last.detach().zero_()
        again = torch.autograd.grad(read, (g, a), torch.ones_like(read), retain_graph=True)
        assert torch.equal(g, before[0]) and torch.equal(a, before[1])
        both = torch.autograd.grad((read, last), (g, a), (torch.ones_like(read), torch.ones_like(last)))
        assert all(torch.equal(x, y) for x, y in zip(want, both))
        assert not torch.equal(want[0], again[0])  # the gradient of last counts


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9), reason="older interpreters break on NumPy 2.4"
)
def test_comparisons_pass_in_the_interpreter():
    root = Path(__file__).resolve().parents[2]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^{len(SCANS) + len(SUMMARIES) + 2} passed", done.stdout, re.M), done.stdout


BUILDS = [("_summarise", "_SUMMARY", {"HAS_V": x}) for x in (True, False)]
BUILDS += [("_summarise_grad", "_SUMMARY_GRAD", {"HAS_V": x}) for x in (True, False)]
BUILDS += [("_scan", "_SCAN", {"ADJOINT": x, "CHUNKED": x, "HAS_FIRST": True}) for x in (True, False)]


@pytest.mark.skipif(INTERPRET, reason="the interpreter has no compiler")
@pytest.mark.parametrize("name, launch, flags", BUILDS)
def test_kernels_compile_for_hopper_without_large_spills(name, launch, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, launch = getattr(gated_delta_triton, name), getattr(gated_delta_triton, launch)
    options = {k: v for k, v in launch.items() if k.startswith("num_")}
    constants = {"K": 112, "E": 112 if flags.get("HAS_V", True) else 1, "BK": 128, "PRECISION": "ieee", **flags}
    constants |= {k: v for k, v in launch.items() if k not in options}
    kinds = {p.name: p.annotation_type or "*fp32" for p in kernel.params} | {"keep": "*i32"}
    signature = {p: "constexpr" if p in constants else kinds[p] for p in kernel.arg_names}
    # Pointers and strides of real tensors are multiples of 16; the counts of frames and heads need not be.
    loose = ("frames", "heads", *constants)
    aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.arg_names) if p not in loose}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32), options=options)
    assert built.metadata.shared <= 64 * 1024
    (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", tmp_path / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True)
    # Where a product spills it takes kilobytes a thread.
    assert int(re.search(r"STACK:(\d+)", usage.stdout + usage.stderr)[1]) <= 128


@pytest.mark.skipif(INTERPRET, reason="the interpreter takes CPU tensors")
def test_wrong_calls_are_refused_by_name():
    g, a = torch.zeros(3, 1, 4, 4), torch.zeros(3, 1, 4, 2)
    with pytest.raises(ValueError, match="scan_backend=triton.*cpu.*scan_backend=torch"):
        gated_delta_triton.bidirectional_states(g, a)
    with pytest.raises(ValueError, match=r"chunks=\(2, 2\) add up to 4.*T=3"):
        gated_delta_triton.bidirectional_states(g.to("meta"), a.to("meta"), chunks=(2, 2))

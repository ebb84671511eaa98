"""What one micro-batch takes, FLOP and bytes, found by taking the step itself without numbers.

A copy of the training module gets tensors that have a shape, a type and a storage of no memory (`FakeTensorMode`);
layouts, seeds and times stay real, since what runs depends on them. Its own `training_step` and backward pass then run
through autograd, autocast and recomputation as they will, and every product is counted, every storage from when it is
made to when it is let go. Fused kernels stand as their plain form: the scan in torch, attention chunk by chunk.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vgr.nn.frozen import FrozenText
from vgr.nn.memory import MemoryPolicy
from vgr.types import TextStates, VideoBatch


@dataclass(frozen=True)
class StepCost:
    """Of one micro-batch, in FLOP and bytes; gradients of weights are not among the bytes, nor are weights.

    forward, backward: products, convolutions and attention, as the model has them; again: what recomputation adds, of
    checkpointed blocks and of the scores of fused attention. forward_peak: most bytes alive in the forward pass; saved:
    those that the backward pass waits for; backward_peak: most alive in it, those saved among them.
    """

    forward: float
    backward: float
    again: float
    forward_peak: float
    saved: float
    backward_peak: float

    def plus(self, other: StepCost, times: float = 1.0) -> StepCost:
        """Field by field, self + times * other."""
        return StepCost(*(getattr(self, f.name) + times * getattr(other, f.name) for f in fields(self)))


class _Tally(TorchDispatchMode):
    """FLOP and bytes alive of what runs under it, each by whether that is in a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.flop, self.peak = {False: 0.0, True: 0.0}, {False: 0.0, True: 0.0}
        self.alive = self.scores = 0.0
        self._known: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # a tensor is asked for its device
            return func(*args)
        if func is torch.ops.aten.index.Tensor:  # how much a mask selects is known here, as masks are real
            with unset_fake_temporarily():
                args = args[0], [y for x in args[1] for y in (x.nonzero(as_tuple=True) if _is_mask(x) else [x])]
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0  # which frame routing chooses: any costs the same
        real = not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        with unset_fake_temporarily() if real else nullcontext():
            out = func(*args, **(kwargs or {}))
        backward = torch._C._current_graph_task_id() != -1
        packet = func._overloadpacket
        if packet is torch.ops.aten.convolution_backward:  # the registry forgets that groups divide the work
            self.flop[backward] += sum(args[-1][:2]) * 2.0 * args[0].numel() * args[2][0].numel()
        elif packet in flop_registry:
            count = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            again = count / 5 if "attention_backward" in str(packet) or "cpu_backward" in str(packet) else 0.0
            self.scores += again  # fused attention makes its scores anew: one of its five products
            self.flop[backward] += count - again
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = size = storage.nbytes()
                self.alive += size
                finalize(storage, self._gone, size)
                self.peak[backward] = max(self.peak[backward], self.alive)
        return out

    def _gone(self, size: int) -> None:
        self.alive -= size


def _is_mask(x: Tensor | None) -> bool:
    return x is not None and x.dtype == torch.bool and not isinstance(x, FakeTensor)


class _Told(nn.Module):
    """Stands for a frozen text encoder, which runs before the step: texts of the greatest length."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.width, self.length = width, length

    def forward(self, captions: tuple[tuple[str, ...], ...]) -> TextStates:
        shape = len(captions), max(map(len, captions)), self.length
        return TextStates(torch.zeros(*shape, self.width), torch.ones(shape, dtype=torch.bool))


def _rows(module: nn.Module) -> list[nn.ModuleList]:
    """The blocks of each network."""
    found = (c for m in module.modules() for n, c in m.named_children() if n in ("blocks", "transformer_blocks"))
    return [row for row in found if isinstance(row, nn.ModuleList)]


def _kind(block: nn.Module) -> tuple[Any, ...]:
    return getattr(getattr(block, "attn", None), "kind", None), *(p.shape for p in block.parameters())


def _shadow(module: nn.Module, fake: FakeTensorMode, checkpointing: bool, keep: list[int] | None) -> Any:
    """A copy, of these blocks of each network, whose parameters hold no numbers and let gradients go where they end.

    Nor do buffers that are on the meta device.
    """
    memo: dict[int, Any] = {}
    rows = [] if keep is None else _rows(module)
    left_out = {id(t) for row in rows for i, b in enumerate(row) if i not in keep for t in b.parameters()}
    for tensor in [*module.parameters(), *(b for b in module.buffers() if b.is_meta)]:
        if id(tensor) not in left_out:
            with fake:
                like = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            memo[id(tensor)] = nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like
    memo |= {id(row): nn.ModuleList(copy.deepcopy(row[i], memo) for i in keep) for row in rows}
    made = copy.deepcopy(module, memo)
    plain = {"scan_backend": "torch", "attention_backend": "torch", "activation_checkpointing": checkpointing}
    for part in list(made.modules()):
        for name, child in part.named_children():
            if isinstance(child, FrozenText):
                part._modules[name] = _Told(child.width, child.length)
        for name, value in plain.items():
            if hasattr(part, name):
                setattr(part, name, value)
        if isinstance(getattr(part, "policy", None), MemoryPolicy):
            part.policy = replace(part.policy, place="device")
    if keep is not None and getattr(made, "judge", None) is not None:
        made.judge.layers = [0] * len(made.judge.layers)
    for parameter in filter(lambda p: p.requires_grad, made.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return made.train()


def _take(made: Any, batch: VideoBatch, bf16: bool, fake: FakeTensorMode) -> StepCost:
    """Of the one step of a shadow that `made.training_step` takes."""
    with torch.random.fork_rng(devices=[]), fake, _Tally() as tally:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = made.training_step(batch, 0)
        saved = tally.alive
        if loss is not None:
            loss.backward()
    peaks = tally.peak[False], saved, max(tally.peak[True], saved)
    return StepCost(tally.flop[False], tally.flop[True], tally.scores, *peaks)


def _mean(made: Any, batch: VideoBatch, bf16: bool, fake: FakeTensorMode) -> StepCost:
    """`_take`; self-forcing steps its networks itself, which here have nothing to be stepped."""
    if made.automatic_optimization:
        return _take(made, batch, bf16, fake)
    trainer = SimpleNamespace(world_size=1, strategy=None)  # the module holds it weakly
    made._trainer, made.global_batch = trainer, len(batch.keys)
    made.optimizers, made._update = lambda **_: [], lambda segment: None
    made._backward = lambda loss, sync: loss.backward()
    costs = []
    for turn in (False, True):
        made._students_turn = lambda segment, turn=turn: turn
        costs.append(_take(made, batch, bf16, fake))
    critic, both = costs
    share = 1 / made.critic_steps
    mean = critic.plus(both, share).plus(critic, -share)
    return replace(both, forward=mean.forward, backward=mean.backward, again=mean.again)


def _counted(module: Any, batch: VideoBatch, bf16: bool, checkpointing: bool) -> StepCost:
    """Of the whole module from runs with one and with two blocks of each kind, where that is less to run.

    What a block adds does not depend on how many there are: it is saved or made again like its neighbours.
    """

    def run(keep: list[int] | None) -> StepCost:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        return _mean(_shadow(module, fake, checkpointing, keep), batch, bf16, fake)

    rows = [[_kind(block) for block in row] for row in _rows(module)]
    if not rows or any(row != rows[0] for row in rows):
        return run(None)
    groups: dict[Any, list[int]] = {}
    for i, kind in enumerate(rows[0]):
        groups.setdefault(kind, []).append(i)
    firsts, several = [g[0] for g in groups.values()], [g for g in groups.values() if len(g) > 1]
    if len(firsts) + len(several) * (len(firsts) + 1) >= len(rows[0]):
        return run(None)
    total = base = run(firsts)
    for group in several:
        one = run(sorted([*firsts, group[1]])).plus(base, -1.0)
        total = total.plus(one)
        if module.automatic_optimization:  # peaks of few blocks may stand elsewhere, and grow by what a block saves
            one = replace(one, forward_peak=max(one.forward_peak, one.saved), backward_peak=one.saved)
        total = total.plus(one, len(group) - 2)
    return total


def step_costs(module: Any, batch: VideoBatch, *, bf16: bool) -> tuple[StepCost, StepCost]:
    """Of a micro-batch of a training module, with all kept for the backward pass and with blocks recomputed in it.

    module: on any device or on meta, before it is sharded, compiled or fitted; bf16: under autocast, as bf16-mixed
    trains. Of self-forcing it is the mean of its updates, of which one in `critic_steps` is a student's turn; bytes are
    those of such a turn, with all memory on the device.
    """
    plain, lean = (_counted(module, batch, bf16, checkpointing) for checkpointing in (False, True))
    return plain, replace(lean, backward=plain.backward, again=lean.again + lean.backward - plain.backward)


def step_flops(module: Any, batch: VideoBatch) -> float:
    """FLOP of forward and backward pass of a micro-batch, recomputation not counted: what MFU divides by seconds.

    See `step_costs`: products, convolutions and attention; a frozen text encoder is not counted.
    """
    cost = _counted(module, batch, False, False)
    return cost.forward + cost.backward

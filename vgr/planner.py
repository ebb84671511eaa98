"""What a run will take, before weights are read or a GPU is held: `vgr-train experiments=... plan=h200`.

Networks are built on the meta device, and their own training step is taken there (`vgr.training.step_cost`), so
activations and FLOP are counted, not guessed. What is held between steps is dealt to ranks by the layout.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from vgr import trainer
from vgr.data.modules import EncodedCaption, collate
from vgr.data.shards import Shards
from vgr.metrics import frame_rate
from vgr.nn import lora
from vgr.parallel.fsdp import blocks
from vgr.training import budget, checkpoints, rebuild, zero
from vgr.training.step_cost import StepCost, step_costs
from vgr.types import Cameras, VideoBatch, Warp, latents_holding, raw_frames

GB = 1e9
# Bytes that torch can have of a device, by part of its name; the first that fits counts.
MEMORY = {
    "B200": 191e9, "H200": 150e9, "H100": 85e9, "H800": 85e9, "A100-40": 42e9, "A100": 85e9, "A800": 85e9, "L40S": 47e9,
}  # fmt: skip
RESERVED = 2e9  # of CUDA, its libraries and NCCL, beside tensors
MFU = 0.35  # assumed: perf/mfu of a run tells its own
CODECS = {"LTX2Codec": (8, 32, 32), "WanCodec": (4, 8, 8)}  # strides of codecs that cannot be built without weights
TEXTS = {"Gemma2Text": 5.2e9, "UMT5Text": 11.4e9, "LTX2Text": 24.4e9}  # bytes in bfloat16, where they are not here


@dataclass(frozen=True)
class Layout:
    """How a run is dealt to its ranks.

    shards: ranks that split parameters and what is made of them, under "zero2" gradients and moments alone; context:
    ranks that share a clip; kind: "one", "ddp", "fsdp", "zero2" or "zero3"; accumulate: micro-batches of a step.
    """

    world: int = 1
    shards: int = 1
    context: int = 1
    kind: str = "one"
    accumulate: int = 1


def layout(settings: Mapping[str, Any]) -> Layout:
    """Of `trainer.settings`."""
    world, accumulate = settings["devices"] * settings["num_nodes"], settings["accumulate_grad_batches"]
    if settings["strategy"] == "fsdp":
        return Layout(world, world // settings["replicas"], settings["context"], "fsdp", accumulate)
    if settings["strategy"].startswith("zero"):
        return Layout(world, world, kind=settings["strategy"], accumulate=accumulate)
    return Layout(world, kind="ddp" if world > 1 else "one", accumulate=accumulate)


@dataclass(frozen=True)
class Plan:
    """Of one device, in bytes unless said otherwise.

    held: what stands through a step, by what it is of; plain, lean: a micro-batch's cost, with all kept for the
    backward pass and with blocks recomputed in it, `recomputes` which; peaks: most at once under either; trained,
    frozen: numbers in parameters; tokens: of a micro-batch; disk: of a checkpoint; caches: what self-forcing's rollouts
    hold in GB, `CausalVideo.memory_plan`'s.
    """

    layout: Layout
    held: dict[str, float]
    plain: StepCost
    lean: StepCost
    recomputes: bool
    peaks: tuple[float, float]
    trained: int
    frozen: int
    tokens: int
    disk: float
    caches: dict[str, float]

    @property
    def cost(self) -> StepCost:
        return self.lean if self.recomputes else self.plain

    @property
    def peak(self) -> float:
        return self.peaks[self.recomputes]


def size(tensors: Iterable[Tensor]) -> float:
    """Bytes of distinct tensors."""
    return float(sum({id(t): t.numel() * t.element_size() for t in tensors}.values()))


def module_of(cfg: DictConfig, device: str = "meta") -> Any:
    """The training module of a configuration with its networks new on a device; on meta nothing but configs is read.

    A teacher that is not there yet is taken to be as the model.
    """
    codec = SimpleNamespace(stride=_stride(cfg), clip=cfg.codec.get("clip"))
    needs = inspect.signature(get_class(cfg.training._target_)).parameters.get("teacher")
    with torch.device(device):
        model, text = instantiate(cfg.model), instantiate(cfg.text)
        if cfg.lora.rank:
            text.requires_grad_(False)
            lora.add(model, **cfg.lora)
        teacher = {}
        if needs is not None and (cfg.teacher is not None or needs.default is needs.empty):
            try:
                told = checkpoints.read_generator(checkpoints.resolve(Path(cfg.teacher or "")))
                own = {k: rebuild.KNOWN[told[k]["class"]](**told[k]["config"]) for k in ("model", "text")}
            except (FileNotFoundError, NotADirectoryError):
                own = {"model": instantiate(cfg.model), "text": instantiate(cfg.text)}
            teacher = {"teacher": own}
    return instantiate(cfg.training, model=model, text=text, codec=codec, seed=cfg.seed, **teacher)


def _stride(cfg: DictConfig) -> tuple[int, int, int]:
    return CODECS.get(cfg.codec._target_.rsplit(".", 1)[-1]) or instantiate(cfg.codec).stride


def batch_of(cfg: DictConfig, size_hw: tuple[int, int] | None) -> VideoBatch:
    """A micro-batch of the shards' sizes, or of size_hw pixels and data.frames where there are none yet.

    ValueError where neither is told.
    """
    micro = cfg.data.micro_batch
    if size_hw is None and Path(cfg.data.val, "manifest.json").is_file():
        return collate([Shards(cfg.data.val).read(0)] * micro, range(micro), cfg.data.frames)
    source = cfg.data.get("source") or {}
    frames, size_hw = cfg.data.frames or source.get("frames"), size_hw or source.get("size_hw")
    if frames is None or size_hw is None:
        raise ValueError(
            f"data.val={cfg.data.val} holds no shards to take sizes from; tell them: data.frames=81 and, in pixels, "
            'plan="h200 704x1280"'
        )
    (stride, *cells), clip = _stride(cfg), cfg.codec.get("clip")
    held, objective = latents_holding(frames, stride, clip), cfg.training.get("objective", {})
    frames, grid = raw_frames(held, stride, clip), [n // c for n, c in zip(size_hw, cells)]
    several = len(objective.get("times", [0])) + bool(objective.get("history", False))
    several = 2 if str(objective.get("_target_")).endswith(".refinement") else several
    warp = None
    if cfg.training._target_.endswith(".WarpAdapterTraining"):
        latents = torch.zeros(micro, cfg.model.in_channels, held, *grid)
        visible = torch.ones(micro, frames, *size_hw, dtype=torch.bool)
        warp = Warp(latents, visible, None if clip is None else latents[:, :, :1])
    return VideoBatch(
        torch.zeros(micro, several * cfg.model.in_channels, held, *grid),
        Cameras(torch.eye(4).repeat(micro, frames, 1, 1), torch.full((micro, frames, 4), 0.5)), torch.ones(micro),
        (("a",),) * micro, torch.zeros(micro, held, dtype=torch.int64), ("",) * micro, torch.arange(micro), warp,
    )  # fmt: skip


def held(module: Any, dealt: Layout) -> dict[str, float]:
    """Bytes of a device that stand through a step, by what they are of, but for the text encoder's."""
    own = [*module.model.parameters(), *module.text.parameters()]
    others = {"critic": getattr(module, "critic", None), "judge": getattr(module, "judge", None)}
    others |= {"teacher": getattr(module, "teacher", None)}
    seen = {id(p) for p in own}
    parts = {"weights": size(own)}
    for name, network in {"average": module.ema, **others}.items():
        fresh = {} if network is None else {id(p): p for p in network.parameters() if id(p) not in seen}
        seen |= fresh.keys()
        if fresh:
            parts[name] = size(fresh.values())
    trained = size(p for p in module.parameters() if p.requires_grad)
    parts |= {"gradients": trained, "moments": 2 * trained}
    split = parts if dealt.kind != "zero2" else ("gradients", "moments")
    parts = {name: value / (dealt.shards if name in split else 1) for name, value in parts.items()}
    if dealt.kind == "ddp":
        parts["reduction buckets"] = trained
    if dealt.kind.startswith("zero"):
        parts["stepped copy"] = trained / dealt.shards
        parts["buckets"] = 4.0 * zero.BUCKET * (2 if dealt.kind == "zero3" else 1)  # what is reduced, what is gathered
    if dealt.kind in ("fsdp", "zero3") and dealt.shards > 1:
        parts["gathered block"] = _gathered(module.model)
    return parts


def _gathered(model: nn.Module) -> float:
    """Bytes of whole parameters under FSDP: the largest block, the next one, a gradient, and what is in no block."""
    inside = [size(block.parameters()) for block in blocks(model)]
    return 3 * max(inside, default=0.0) + 2 * (size(model.parameters()) - sum(inside))


def _text(cfg: DictConfig, batch: VideoBatch) -> float:
    """Bytes of a frozen text encoder; none where the shards bring its states along."""
    name = cfg.text._target_.rsplit(".", 1)[-1]
    if name not in TEXTS or isinstance(batch.captions[0][0], EncodedCaption):
        return 0.0
    return TEXTS[name] * (2 if cfg.text.get("dtype") == "float32" else 1)


def peak(held: Mapping[str, float], cost: StepCost, dealt: Layout, at_once: bool) -> float:
    """Most bytes at once. at_once: whether gradients stand from before, else they arrive as what is saved is let go."""
    gradients, shared = held["gradients"], dealt.context
    standing, work = sum(held.values()) - gradients, (cost.backward_peak - cost.saved) / shared
    if at_once:
        return standing + gradients + max(cost.forward_peak, cost.backward_peak) / shared
    return standing + max(cost.forward_peak / shared, max(cost.saved / shared, gradients) + work)


def _caches(module: Any, batch: VideoBatch, bytes_per_number: int) -> tuple[dict[str, float], float]:
    """GB that self-forcing's rollouts of a causal video model hold; bytes that its place keeps off the device."""
    model = module.model
    if module.automatic_optimization or not hasattr(model, "memory_plan"):
        return {}, 0.0
    clips, _, frames, *cells = batch.latents.shape
    args = frames, tuple(n // model.patch for n in cells), module.chunk, bytes_per_number
    anywhere = copy.copy(model)
    anywhere.policy = replace(model.policy, place="device")
    found = [{k: v * clips for k, v in m.memory_plan(*args).items() if "again_" not in k} for m in (model, anywhere)]
    here, whole = (sum(p.values()) - 2 * p["host"] for p in found)
    return found[0], (whole - here) * GB


def make(cfg: DictConfig, settings: Mapping[str, Any], size_hw: tuple[int, int] | None = None) -> Plan:
    """The plan of a configuration under its trainer's settings. ValueError for sizes that are told nowhere."""
    module, batch, dealt = module_of(cfg), batch_of(cfg, size_hw), layout(settings)
    bf16 = settings["precision"] == "bf16-mixed"
    caches, away = _caches(module, batch, 2 if bf16 else 4)
    parts, costs = held(module, dealt), []
    for cost in step_costs(module, batch, bf16=bf16):
        peaks = {"forward_peak": cost.forward_peak - away, "backward_peak": cost.backward_peak - away}
        costs.append(replace(cost, **peaks))
    if text := _text(cfg, batch):
        parts["text encoder"] = text
    at_once = dealt.accumulate > 1 or not module.automatic_optimization or dealt.kind == "zero3"  # in a buffer
    parameters = {id(p): p for p in module.parameters()}.values()
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters) - trained
    clips, _, frames, height, width = batch.latents.shape
    patch = module.model.patch
    return Plan(
        dealt, parts, *costs, bool(cfg.model.get("activation_checkpointing")),
        tuple(peak(parts, cost, dealt, at_once) for cost in costs), trained, frozen,
        clips * frames * (height // patch) * (width // patch),
        size([*module.weights().values(), *module.ema_weights().values()]) + 8 * trained, caches,
    )  # fmt: skip


def tell(cfg: DictConfig, out: Callable[[str], None]) -> None:
    """Give `out` the plan that `cfg.plan` asks for; ValueError, naming parts and remedies, for what cannot fit."""
    name, size_hw = asked(str(cfg.plan))
    cfg = copy.deepcopy(cfg)
    if name != "cpu" and cfg.trainer.precision == "auto":
        cfg.trainer.precision = "bf16-mixed"
    cfg.trainer.accelerator = "auto"  # whatever is at hand
    settings = trainer.settings(cfg)
    there = MEMORY[name] if name in MEMORY else budget.available("cpu" if name == "cpu" else "cuda") * GB
    found = make(cfg, settings, size_hw)
    lines = [f"{name}, {there / GB:.4g} GB, {settings['precision']}; {_dealt(found.layout)}", *_memory(cfg, found)]
    lines += _work(cfg, found, frame_rate.known_peak(name))
    needed = found.peak + (0 if name == "cpu" else RESERVED)
    out("\n".join(lines))
    if needed > there:
        raise ValueError(_refusal(cfg, found, needed, there, name))


def asked(told: str) -> tuple[str, tuple[int, int] | None]:
    """Device and pixels of `plan`: "true" is the device at hand, "h200", "h200 704x1280". ValueError for others."""
    name, _, pixels = told.partition(" ")
    names = [*MEMORY, "cpu"]
    if name.lower() == "true":
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    else:
        found = next((n for n in names if n.lower() == name.lower()), None)
    size_hw = re.fullmatch(r"(\d+)x(\d+)", pixels)
    if found is None or (pixels and size_hw is None):
        raise ValueError(f'plan={told}: true, or {", ".join(names).lower()}, and pixels if wished: "h200 704x1280"')
    return found, size_hw and (int(size_hw[1]), int(size_hw[2]))


def _dealt(dealt: Layout) -> str:
    told = {"one": "one device", "ddp": f"{dealt.world} devices, each holding all"}.get(dealt.kind)
    split = "gradients and moments" if dealt.kind == "zero2" else "parameters"
    told = told or f"{dealt.world} devices, {dealt.kind}, {split} split in {dealt.shards}"
    return told + (f", clips shared by {dealt.context}" if dealt.context > 1 else "")


def _memory(cfg: DictConfig, found: Plan) -> list[str]:
    most = [max(c.forward_peak, c.backward_peak) / found.layout.context for c in (found.plain, found.lean)]
    of = [f"{a / GB:.3g} GB (peak {p / GB:.4g})" for a, p in zip(most, found.peaks)]
    lines = [f"parameters  {found.trained / 1e6:.1f} M trained, {found.frozen / 1e6:.1f} M frozen or averages"]
    lines += [f"{name:11} {value / GB:.3g} GB" for name, value in found.held.items()]
    chosen = "recomputed" if found.recomputes else "kept"
    lines.append(f"activations {of[0]} with all kept, {of[1]} with blocks recomputed")
    if found.caches:
        told = ", ".join(f"{k} {v:.3g}" for k, v in found.caches.items())
        lines.append(f"of rollouts {told} GB, among activations; model.place says where")
    lines.append(f"peak        {found.peak / GB:.4g} GB a device, blocks {chosen}")
    return [*lines, f"checkpoint  {found.disk / GB:.3g} GB on disk, of which {cfg.keep} and the best stay"]


def _work(cfg: DictConfig, found: Plan, speed: float | None) -> list[str]:
    """FLOP and tokens of a step on all devices; seconds where the device's peak is known."""
    cost, batch = found.cost, cfg.training.global_batch
    micro = batch / cfg.data.micro_batch
    model, again = (cost.forward + cost.backward) * micro, cost.again * micro
    steps = -(-cfg.training.max_samples // batch)
    line = f"a step      {found.tokens * micro:.4g} tokens of {batch} clips; {cost.forward * micro / 1e12:.4g} TFLOP "
    line += f"forward, {cost.backward * micro / 1e12:.4g} backward, which make MFU; {again / 1e12:.4g} made again"
    if speed is None:
        return [line]
    seconds = model / (speed * MFU * found.layout.world)
    told = f"expected    {seconds:.3g} s a step, {seconds * steps / 3600:.3g} hours for {steps} steps, "
    return [line, told + f"if MFU is {MFU:.0%} of {speed / 1e12:.0f} TFLOP/s (assumed; perf/mfu tells a run's own)"]


def _refusal(cfg: DictConfig, found: Plan, needed: float, there: float, name: str) -> str:
    parts = found.held | {"activations": max(found.cost.forward_peak, found.cost.backward_peak) / found.layout.context}
    biggest = ", ".join(f"{k} {parts[k] / GB:.3g} GB" for k in sorted(parts, key=parts.__getitem__, reverse=True)[:3])
    whole = found.layout.shards == 1 or found.layout.kind == "zero2"
    ways = ["trainer.strategy=fsdp"] if whole else ["more devices (trainer.num_nodes)"]
    if not found.recomputes and "activation_checkpointing" in cfg.model:
        ways.append(f"model.activation_checkpointing=true ({found.peaks[1] / GB:.3g} GB)")
    if cfg.data.micro_batch > 1:
        ways.append(f"data.micro_batch={cfg.data.micro_batch // 2}")
    ways += ["fewer data.frames", "fsdp.context=2"]
    return f"{needed / GB:.4g} GB asked of {name}, which has {there / GB:.4g}: {biggest}. Try {', '.join(ways)}"

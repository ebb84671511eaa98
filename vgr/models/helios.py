"""Helios: diffusers' `HeliosTransformer3DModel` by composition, with token dropping (warp adapter, spec 1.1, 1.2, 8.1).

A chunk is denoised beside clean frames of `cond.history` in tiers: the prefix (the video's first frame) and short ones
go through one patch embedding of (1,2,2) cells, mid through (2,4,4), long through (4,8,8). The model knows relative
positions only: the prefix has index 0, any other frame as many as it stands behind the target's first, plus 20 (one
prefix and 19 of history). Frames at the target's own positions, evidence of what it shows, need nothing else.

Tokens are dropped by hooks before the blocks: none of a dropped one's queries, keys or values exist in any layer.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgr.models import weights
from vgr.nn.frozen import dtype_of
from vgr.types import Conditioning, HistoryBlock

PATCHES = {"long": (4, 8, 8), "mid": (2, 4, 4), "short": (1, 2, 2)}  # in the order of the sequence
HISTORY = (16, 2, 1)  # frames of the tiers long, mid and short behind the prefix
STAGE_TIMES = (999.0, 743.256, 385.614, 0.999)  # global times between the released three stages (spec 1.4)
TOP = 0.999  # where local times begin
HOW_TO_GET = (
    "The released models (28 GB in bfloat16, Apache 2.0) are transformer/ of BestWishYsh/Helios-Base, Helios-Mid and "
    "Helios-Distilled"
)
INSIDE = ("transformer",)
PATTERNS = ("transformer/*",)
_CLASS = "HeliosTransformer3DModel"
_SIZES = {
    "in_channels": "in_channels", "text_width": "text_dim", "heads": "num_attention_heads",
    "head_dim": "attention_head_dim", "layers": "num_layers",
}  # fmt: skip
# Without these, evidence would be read at the target's noise level, or could not be read at all.
_NEEDED = {"zero_history_timestep": True, "has_multi_term_memory_patch": True, "patch_size": [1, 2, 2]}


class Helios(nn.Module):
    """Noisy chunk of a stage, its local time, text and history to velocity, by the house's calling contract.

    in_channels to layers: the transformer's sizes; options: what else of `HeliosTransformer3DModel` is not as released.
    text_length: places a text has, those beyond its tokens being zero vectors. stage_times: global times (of 1000) at
    the ends of the stages, falling; truncate_times: to whole numbers, as released weights are sampled. spread_stages:
    cells of small stages stand where they are on the full grid; released weights know them by a grid of their own, on
    which history is elsewhere (spec 1.2). activation_checkpointing: recompute blocks in the backward; dtype: of the
    weights (what `HeliosTransformer3DModel` keeps in float32 stays so). A new model's output starts at zero, and its
    tokens read what is near. ValueError for settings that evidence cannot live with.
    """

    takes_cameras, takes_history, patch = False, True, PATCHES["short"][2]

    def __init__(
        self,
        in_channels: int = 16,
        text_width: int = 4096,
        heads: int = 40,
        head_dim: int = 128,
        layers: int = 40,
        options: Mapping[str, Any] | None = None,
        text_length: int = 512,
        stage_times: Sequence[float] = STAGE_TIMES,
        truncate_times: bool = True,
        spread_stages: bool = False,
        activation_checkpointing: bool = False,
        dtype: str = "float32",
    ) -> None:
        from diffusers import HeliosTransformer3DModel

        super().__init__()
        if len(stage_times) < 2 or any(a <= b for a, b in zip(stage_times, stage_times[1:])):
            raise ValueError(f"model.stage_times={list(stage_times)}: give falling times, one more than stages")
        self.config: dict[str, Any] = {
            "in_channels": in_channels, "text_width": text_width, "heads": heads, "head_dim": head_dim,
            "layers": layers, "options": dict(options or {}), "text_length": text_length,
            "stage_times": list(stage_times), "truncate_times": truncate_times,
            "spread_stages": spread_stages, "activation_checkpointing": activation_checkpointing, "dtype": dtype,
        }  # fmt: skip
        settings = _settings(self.config)
        if wrong := [f"{k}={settings[k]}" for k, v in _NEEDED.items() if _listed(settings.get(k, v)) != v]:
            raise ValueError(f"model.options: {', '.join(wrong)}; history needs {_NEEDED}")
        plain = torch.get_default_dtype()
        try:  # 28 GB, not 57, at the released size
            torch.set_default_dtype(dtype_of("model", dtype))
            self.transformer = weights.build(HeliosTransformer3DModel, settings, meta=False)
        finally:
            torch.set_default_dtype(plain)
        with torch.device("cpu"):  # its tables are not of the weights, so a model built on meta would never get them
            rope = self.transformer.rope
            self.transformer.rope = type(rope)((rope.DT, rope.DY, rope.DX), rope.theta)
        self._grid = [0, 0]  # of the full size, of the call at hand
        if spread_stages:
            self.transformer.rope._get_spatial_meshgrid = partial(_spread, self._grid)
        self._initialise()
        for name, parameter in self.transformer.named_parameters():
            parameter.data = parameter.data.to(self._kind(name))
        self.in_channels, self.text_length, self.stages = in_channels, text_length, len(stage_times) - 1
        self.activation_checkpointing = activation_checkpointing

    def _initialise(self) -> None:
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)
        for block in self.transformer.blocks:  # what queries and keys have in common is turned by their distance alone
            for projection, norm in ((block.attn1.to_q, block.attn1.norm_q), (block.attn1.to_k, block.attn1.norm_k)):
                nn.init.ones_(projection.bias)
                nn.init.constant_(norm.weight, 1.5)

    def _kind(self, name: str) -> torch.dtype:
        exact = any(part in self.transformer._keep_in_fp32_modules for part in name.split("."))
        return torch.float32 if exact else dtype_of("model", self.config["dtype"])

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None, **settings: Any) -> Helios:
        """The model of a diffusers folder (transformer/ inside, or itself one) or a hub id, which needs a revision.

        settings: constructor arguments. ValueError or FileNotFoundError name what is missing or does not fit.
        """
        path = weights.fetch(source, revision, PATTERNS, HOW_TO_GET)
        config, tensors = weights.load_folder(path, ADAPTERS, INSIDE)
        model = weights.build(cls, {**config, **settings})
        weights.check(model, tensors, source)
        fit = {k: v.to(model._kind(k), copy=True) for k, v in tensors.items()}
        model.load_state_dict(fit, assign=True)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that diffusers' class reads too; it appears whole or not at all."""
        name, stem, translate = EXPORTS["diffusers"]
        weights.save_folder(folder, name, *translate(self.config, self.state_dict()), stem)

    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, state: None = None, *, commit: bool = False
    ) -> tuple[Tensor, None]:
        """Velocity of x (B,C,T,H,W), at the size of stage `cond.stage`, at local times t (B,T); x - t v ends the stage.

        All frames of a sample have one time, that of its first; its text is that of its first frame's shot. History
        blocks have the full size, whatever the stage; those of a tier stand one behind the other in their order, the
        prefix before short ones. ValueError for a state (the past is in `cond.history`), stages and blocks that do not
        fit.
        """
        if state is not None or commit:
            raise ValueError("Helios keeps no state, its past is cond.history: sample it by diffusion.pyramid.Streamed")
        if cond.stage is None or not 0 <= cond.stage < self.stages:
            raise ValueError(f"cond.stage={cond.stage}: this model has stages 0 to {self.stages - 1}")
        kind = self.transformer.patch_embedding.weight.dtype
        first = cond.layout.position[:1]
        self._grid[:] = [size * 2 ** (self.stages - 1 - cond.stage) // 2 for size in x.shape[-2:]]
        call = {"hidden_states": x.to(kind), "timestep": self._time(t, cond.stage)}
        call["encoder_hidden_states"] = self._text(cond).to(kind)
        shared = {"indices_hidden_states": self._index(cond.layout.position, first)}
        keeps, dropping = [], any(block.keep is not None for block in cond.history)
        for tier in PATCHES:
            blocks = [b for b in cond.history if b.tier == tier or (tier == "short" and b.tier == "prefix")]
            blocks.sort(key=lambda block: block.tier != "prefix")
            if not blocks:
                continue
            indices = [0 * b.position if b.tier == "prefix" else self._index(b.position, first)[0] for b in blocks]
            shared[f"indices_latents_history_{tier}"] = torch.cat(indices)[None]
            call[f"latents_history_{tier}"] = torch.cat([b.latents for b in blocks], dim=2).to(kind)
            keeps += [_kept(block, PATCHES[tier], last=block is blocks[-1]) for block in blocks]
        if keeps and "latents_history_short" not in call:
            raise ValueError("cond.history has mid or long frames but no short ones or prefix, which give their grid")
        return self._grouped(call, shared, torch.cat(keeps, 1) if dropping else None).to(x.dtype), None

    @staticmethod
    def _index(position: Tensor, first: Tensor) -> Tensor:
        return (1 + sum(HISTORY) + position - first)[None]

    def _time(self, t: Tensor, stage: int) -> Tensor:
        """The one place where local times become the global ones (B,) that the weights know."""
        high, low = self.config["stage_times"][stage : stage + 2]
        times = low + t[:, 0].double() / TOP * (high - low)
        # A local time of fp32 may miss a whole number from below.
        return (times + 1e-4).long() if self.config["truncate_times"] else times.float()

    def _text(self, cond: Conditioning) -> Tensor:
        """One text a sample, (B,text_length,D), padded with zeros."""
        states, places = cond.text.states, cond.text.states.shape[2]
        if places > self.text_length:
            raise ValueError(f"texts have {self.text_length} places (model.text_length), got {places}: cut them")
        shot = cond.layout.shot[:, 0] if cond.prompt is None else cond.prompt[:, 0]
        rows = torch.arange(len(states), device=states.device)
        chosen = rows, (shot if states.shape[1] > 1 else 0 * shot)
        own = states[chosen] * cond.text.mask[chosen][..., None]
        return nn.functional.pad(own, (0, 0, 0, self.text_length - places))

    def _grouped(self, call: dict[str, Tensor], shared: dict[str, Tensor], keep: Tensor | None) -> Tensor:
        """Samples that keep as many tokens in one call; padding would let the padded ones be read."""
        if keep is None or bool(keep.all()):
            return self._call(call, shared, None)
        counts = keep.sum(1)
        groups = [(counts == count).nonzero()[:, 0] for count in counts.unique()]
        index = [keep[rows].nonzero()[:, 1].view(len(rows), -1) for rows in groups]
        if len(groups) == 1:
            return self._call(call, shared, index[0])
        parts = [self._call({k: v[g] for k, v in call.items()}, shared, i) for g, i in zip(groups, index)]
        return torch.cat(parts)[torch.cat(groups).argsort()]

    def _call(self, call: dict[str, Tensor], shared: dict[str, Tensor], index: Tensor | None) -> Tensor:
        """The transformer's velocity where of the history the tokens `index` (B,K) alone are read."""
        model, read = self.transformer, partial(_narrowed, index, {})
        checkpointed = self.activation_checkpointing and torch.is_grad_enabled()
        model.gradient_checkpointing = checkpointed
        with contextlib.ExitStack() as stack:
            if checkpointed:  # recomputed in the backward, when hooks are gone
                model._gradient_checkpointing_func = partial(_checkpointed, read)
                stack.callback(setattr, model, "_gradient_checkpointing_func", None)
            elif index is not None:
                for block in model.blocks:
                    stack.callback(block.register_forward_pre_hook(read).remove)
            return model(**call, **shared, return_dict=False)[0]


def _narrowed(
    index: Tensor | None, made: dict[str, Tensor], _block: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """A block's arguments without the dropped history tokens; `made` keeps what all blocks of a call share."""
    tokens, text, modulation, rotary, target = args
    if index is None:
        return args
    if not made:
        batch, length = len(index), rotary.shape[1]
        behind = torch.arange(length - target, length, device=index.device).expand(batch, -1)
        made["index"] = torch.cat([index, behind], dim=1)
        rows = torch.arange(batch, device=index.device)[:, None]
        made["rows"] = rows
        made["modulation"] = modulation[rows, made["index"]]
        made["rotary"] = rotary.expand(batch, -1, -1)[rows, made["index"]]
    if tokens.shape[1] == rotary.shape[1]:  # the first block; behind it they are fewer
        tokens = tokens[made["rows"], made["index"]]
    return tokens, text, made["modulation"], made["rotary"], target


def _checkpointed(read: Any, block: nn.Module, *args: Any) -> Tensor:
    return checkpoint(block, *read(block, args), use_reentrant=False)


def _kept(block: HistoryBlock, patch: tuple[int, int, int], last: bool) -> Tensor:
    """Which tokens (B,L) of a block stay, t, y, x; ValueError where cells would reach into the next block."""
    batch, _, *size = block.latents.shape
    if size[0] % patch[0] and not last:
        raise ValueError(f"{size[0]} frames of tier {block.tier} before more of it: give a multiple of {patch[0]}")
    grid = [-(-n // p) for n, p in zip(size, patch)]
    if block.keep is None:
        return torch.ones(batch, grid[0] * grid[1] * grid[2], dtype=torch.bool, device=block.latents.device)
    if any(have not in (1, want) for have, want in zip(block.keep.shape, (batch, *grid))):
        raise ValueError(f"keep {tuple(block.keep.shape)} of tier {block.tier} is for its tokens, {(batch, *grid)}")
    return block.keep.expand(batch, *grid).flatten(1)


def _spread(grid: list[int], height: int, width: int, device: str) -> tuple[Tensor, ...]:
    """Rows and columns (height, width) of cells that are spread evenly over the full grid."""
    sizes = zip((height, width), grid)
    lines = [(torch.arange(n, dtype=torch.float32, device=device) + 0.5) * (full / n) - 0.5 for n, full in sizes]
    return torch.meshgrid(*lines, indexing="ij")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    named = {theirs: config[ours] for ours, theirs in _SIZES.items()}
    return named | {"out_channels": config["in_channels"], **config["options"]}


def staged(folder: str | Path) -> dict[str, bool]:
    """How weights of a released folder are sampled, as its scheduler/ says: settings of `diffusion.pyramid.Streamed`.

    ValueError for a scheduler that is none of Helios' in three stages, or shifts other than linearly (spec 1.4).
    """
    path = Path(folder, "scheduler", "scheduler_config.json")
    told = json.loads(path.read_text())
    kind, shifted = told.get("_class_name"), bool(told.get("use_dynamic_shifting", False))
    types = {"HeliosDMDScheduler": "linear", "HeliosScheduler": "exponential"}  # what each shifts by unless told
    if kind not in types or told.get("stages", 3) != 3 or told.get("shift", 1.0) != 1.0:
        raise ValueError(f"{path}: {kind} of {told.get('stages', 3)} stages; {' or '.join(types)} of 3 is understood")
    if shifted and told.get("time_shift_type", types[kind]) != "linear":
        raise ValueError(f"{path}: times are shifted exponentially, which no released few-step weights need")
    return {"distilled": kind == "HeliosDMDScheduler", "shifted": shifted}


def to_diffusers(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our arguments and tensors as diffusers has them; what only we know is written where it is not as released."""
    own = {k: v for k, v in config.items() if k not in _SIZES and k != "options" and _listed(_defaults()[k]) != v}
    return _settings(config) | own, {k.removeprefix("transformer."): v for k, v in tensors.items()}


def from_diffusers(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse: constructor arguments, `options` among them where something is not as released, and tensors."""
    from diffusers import HeliosTransformer3DModel

    plain = {k: p.default for k, p in inspect.signature(HeliosTransformer3DModel).parameters.items()}
    own = {k: config[k] for k in (_defaults().keys() - _SIZES.keys()) & config.keys()}
    sizes = {ours: config.get(theirs, plain[theirs]) for ours, theirs in _SIZES.items()}
    plain = json.loads(json.dumps(plain | _settings({**sizes, "options": {}})))  # lists, as in files
    options = {k: v for k, v in config.items() if k not in own and plain.get(k) != v}
    return {**sizes, "options": options, **own}, {f"transformer.{k}": v for k, v in tensors.items()}


def _defaults() -> dict[str, Any]:
    return {k: p.default for k, p in inspect.signature(Helios).parameters.items()}


# Reading and writing, as of the other models.
ADAPTERS = {_CLASS: from_diffusers}
EXPORTS = {"diffusers": (_CLASS, "diffusion_pytorch_model", to_diffusers)}

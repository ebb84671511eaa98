"""Adapters on a frozen video model that make it follow warps of what it has seen (warp adapter, specs 3.2 and 8.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgr.diffusion import flow
from vgr.diffusion.objectives import Noised
from vgr.models.warp_adapter import RULES, evidence_block
from vgr.nn import lora
from vgr.seeding import derive_seed
from vgr.training.conditioning import conditioning, dropped
from vgr.training.validation import Validation, told_gain
from vgr.training.world_model import WorldModelTraining
from vgr.types import Codec, Conditioning, HistoryBlock, VideoBatch, raw_frames

_DRAWS = 4  # chunks and times that each validation clip is measured at


@dataclasses.dataclass(frozen=True)
class WarpValidation(Validation):
    """loss_N3: of N clips' chunks by the frozen model, by it beside its warps, and with adapters as well."""

    loss_N3: Tensor

    def metrics(self) -> dict[str, float]:
        """Beside val/loss val/loss_frozen, val/loss_zero_shot, and what adapters gain with paired 95 % intervals."""
        values = super().metrics()
        frozen, zero_shot, adapted = self.loss_N3.unbind(1)
        for name, loss in (("frozen", frozen), ("zero_shot", zero_shot)):
            values[f"val/loss_{name}"] = float(loss.mean())
            values |= told_gain(f"val/gain_over_{name}", loss - adapted)
        return values


class WarpAdapterTraining(WorldModelTraining):
    """`WorldModelTraining` of chunks beside warps; the objective chooses the chunk and its noise.

    A model with a state has the chunk's past committed without adapters, as a rollout commits it; another is given it
    by the objective as history. threshold, rule: which tokens of a warp are kept (`models.warp_adapter.select_tokens`);
    a rollout takes the same (spec 3.4).
    """

    def __init__(
        self, model: nn.Module, text: nn.Module, codec: Codec, *, threshold: float = 0.1, rule: str = "area",
        **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(model, text, codec, **settings)
        if rule not in RULES or not 0 <= threshold <= 1:
            raise ValueError(f"training.rule={rule}, training.threshold={threshold}: {' or '.join(RULES)}, and 0 to 1")
        self.codec_stride, self.evidence = tuple(codec.stride), {"threshold": threshold, "rule": rule}
        self.codec_clip = codec.clip

    def _sample_losses(self, batch: VideoBatch) -> Tensor:
        captions, _ = dropped(batch, self.seed, self.text_dropout, 0.0)
        cond = self._cond(self.text, captions, batch)
        noised = self._noised(batch, batch.position, cond, self.seed)
        torch.manual_seed(derive_seed(self.seed, "step", int(batch.position[0])))
        return self._losses(self.model, noised, cond, self._evidence(batch, noised.frames, batch.position))

    def _cond(self, text: nn.Module, captions: tuple[tuple[str, ...], ...], batch: VideoBatch) -> Conditioning:
        args = (captions, batch.cameras, batch.shot, self.stride, self.chunk, self.cut_prefix)
        return conditioning(text, *args, clips=self.codec_clip is not None)

    def _noised(self, batch: VideoBatch, positions: Tensor, cond: Conditioning, seed: int) -> Noised:
        still = {} if batch.warp is None or batch.warp.still is None else {"still": batch.warp.still}
        return self.objective(batch.latents, positions, cond.layout.chunk, seed, **still)

    def _evidence(self, batch: VideoBatch, frames: tuple[int, int], positions: Tensor) -> HistoryBlock:
        """The warps of latent frames a to b, with noise that is a function of (seed, position)."""
        if batch.warp is None:
            raise ValueError("these shards hold no warps; give data.video=<one shot>")
        a, b = frames
        begin = a * self.stride if self.codec_clip is None else raw_frames(a, self.stride, self.codec_clip)
        visible = batch.warp.visible[:, begin : raw_frames(b, self.stride, self.codec_clip)]
        seeds = [derive_seed(self.seed, "evidence", p) for p in positions.tolist()]
        at = torch.arange(a, b, device=batch.latents.device)
        return evidence_block(
            batch.warp.latents[:, :, a:b], visible, at, seeds, stride=self.codec_stride, **self.evidence
        )

    @staticmethod
    def _losses(model: nn.Module, noised: Noised, cond: Conditioning, *evidence: HistoryBlock) -> Tensor:
        told = noised.told(cond)
        told = dataclasses.replace(told, history=(*told.history, *evidence))
        state = None if noised.context is None else past(model, noised.context, cond)
        v, _ = model(noised.x, noised.t, told, state)
        return flow.velocity_loss(v, noised.target, noised.weight)

    @torch.no_grad()
    def validate(self, batches: Sequence[VideoBatch]) -> WarpValidation:
        """Fixed chunks, noise and times of each clip, under the averaged adapters."""
        self.ema.eval()
        model, losses, seed = self.ema["model"], [], derive_seed(self.seed, "validation")
        for number, batch in enumerate(batches):
            batch = batch.to(self.device)
            cond = self._cond(self.ema["text"], batch.captions, batch)
            found = []
            for draw in range(_DRAWS):
                positions = (number * _DRAWS + draw) * self.global_batch + torch.arange(len(batch.keys))
                noised = self._noised(batch, positions, cond, seed)
                evidence = self._evidence(batch, noised.frames, positions)
                with lora.without(model):
                    frozen = [self._losses(model, noised, cond, *given) for given in ((), (evidence,))]
                found.append(torch.stack([*frozen, self._losses(model, noised, cond, evidence)], 1))
            losses.append(torch.stack(found).mean(0).double().cpu())
        loss_N3 = torch.cat(losses)
        return WarpValidation(tuple(k for b in batches for k in b.keys), (), loss_N3[:, 2:], None, loss_N3)


@torch.no_grad()
def past(model: nn.Module, latents: Tensor, cond: Conditioning) -> Any:
    """The state in which a causal model has committed clean latents (B,C,T,H,W), T from 0, by its frozen weights."""
    state, frames = model.new_state(), latents.shape[2]
    if frames:
        with lora.without(model):
            zero = torch.zeros(len(latents), frames, device=latents.device)
            _, state = model(latents, zero, cond.frames(0, frames), state, commit=True)
    return state

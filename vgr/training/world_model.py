"""Training of the bidirectional world model: flow matching, first frame clean (SANA-WM, sections 5.2, C.2).

x_t = (1 - t) x0 + t noise, target v = noise - x0, squared error without weighting over times. Every random
number is a function of (seed, purpose, position of the sample), so a step is the same at any rank count,
micro-batch size or restart.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from vgr.diffusion import flow, timesteps
from vgr.geometry.cameras import group_by_latent
from vgr.seeding import derive_seed, normal_like, torch_generator
from vgr.training import optim
from vgr.types import Cameras, Codec, Conditioning, Layout, VideoBatch


@dataclasses.dataclass(frozen=True)
class Validation:
    """Losses of N held-out clips at L noise levels: with their own cameras and with another clip's."""

    keys: tuple[str, ...]
    levels: tuple[float, ...]
    own_NL: Tensor
    shuffled_NL: Tensor

    def metrics(self) -> dict[str, float]:
        """val/loss, val/loss_t*, val/loss_shuffled_camera and val/camera_gain with a normal 95 % interval.

        The gain is the shuffled minus the own loss of each clip, averaged over levels; its interval is that
        of a mean of N paired differences.
        """
        gain_N = (self.shuffled_NL - self.own_NL).mean(1)
        half = 1.96 * float(gain_N.std()) / math.sqrt(len(gain_N))
        values = {f"val/loss_t{level:g}": float(x) for level, x in zip(self.levels, self.own_NL.mean(0))}
        gain = float(gain_N.mean())
        return {
            "val/loss": float(self.own_NL.mean()),
            **values,
            "val/loss_shuffled_camera": float(self.shuffled_NL.mean()),
            "val/camera_gain": gain,
            "val/camera_gain_low": gain - half,
            "val/camera_gain_high": gain + half,
            "val/clips": len(gain_N),
        }


class WorldModelTraining(pl.LightningModule):
    """Trains `model` and `text` jointly; `codec` only says how raw frames group into latent frames.

    warmup_samples, max_samples and ema_half_life are counted in samples (clips). clip: largest gradient norm.
    schedule: "constant" or "cosine" (to a tenth at max_samples). camera_dropout: probability that a clip's
    camera stands still at the first frame's pose instead (the model always takes cameras).
    """

    def __init__(
        self,
        model: nn.Module,
        text: nn.Module,
        codec: Codec,
        *,
        seed: int,
        global_batch: int,
        max_samples: int,
        lr: float = 1e-3,
        warmup_samples: int = 0,
        schedule: str = "constant",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip: float = 0.5,
        ema_half_life: float = 2000.0,
        flow_shift: float = 9.95,
        first_frame_clean: float = 0.9,
        text_dropout: float = 0.1,
        camera_dropout: float = 0.0,
        validation_levels: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 0.95),
    ) -> None:
        super().__init__()
        if schedule not in ("constant", "cosine"):
            raise ValueError(f"training.schedule={schedule}: choose constant or cosine")
        self.model, self.text = model, text
        average = {"model": copy.deepcopy(model), "text": copy.deepcopy(text)}
        self.ema = nn.ModuleDict(average).requires_grad_(False)
        self.stride = codec.stride[0]
        self.seed, self.global_batch, self.max_samples = seed, global_batch, max_samples
        self.lr, self.warmup_samples, self.schedule, self.clip = lr, warmup_samples, schedule, clip
        self.weight_decay, self.betas, self.eps = weight_decay, tuple(betas), eps
        self.ema_half_life, self.flow_shift = ema_half_life, flow_shift
        self.first_frame_clean = first_frame_clean
        self.text_dropout, self.camera_dropout = text_dropout, camera_dropout
        self.validation_levels = tuple(validation_levels)
        self.samples_seen = 0
        self.last_step: dict[str, float] = {}
        self.validation: tuple[int, float] | None = None
        self._pending: list[tuple[VideoBatch, Tensor]] = []

    @property
    def step(self) -> int:
        """Optimizer steps since the run began, over all restarts."""
        return self.samples_seen // self.global_batch

    def transfer_batch_to_device(self, batch: VideoBatch, device: torch.device, dataloader_idx: int) -> VideoBatch:
        # Positions seed CPU generators: kept on the CPU they cost no synchronisation.
        return dataclasses.replace(batch.to(device), position=batch.position)

    def conditioning(
        self, text: nn.Module, captions: tuple[tuple[str, ...], ...], cameras: Cameras, shot_BT: Tensor
    ) -> Conditioning:
        """Text states and grouped cameras for a denoiser; poses stay fp32 under autocast."""
        with torch.autocast(shot_BT.device.type, enabled=False):
            grouped = group_by_latent(cameras, self.stride)
        layout = dataclasses.replace(Layout.whole(*shot_BT.shape, device=shot_BT.device), shot=shot_BT)
        return Conditioning(layout, text(captions), grouped)

    def losses(self, network: Any, x0_BCTHW: Tensor, noise_BCTHW: Tensor, t_BT: Tensor, cond: Conditioning) -> Tensor:
        """Mean squared velocity error of each clip (B,) over its frames with t > 0, in fp32."""
        v, _ = network(flow.interpolate(x0_BCTHW, noise_BCTHW, t_BT), t_BT, cond)
        return flow.velocity_loss(v, flow.velocity(x0_BCTHW, noise_BCTHW), t_BT > 0)

    def _dropped(self, batch: VideoBatch) -> tuple[tuple[tuple[str, ...], ...], Cameras, Tensor]:
        """Captions, cameras and times (B,T) of a training batch after dropout, drawn per sample position."""
        captions, c2w = [], batch.cameras.c2w.clone()
        for b, position in enumerate(batch.position.tolist()):
            generator = torch_generator(self.seed, "dropout", position)
            no_text, no_camera = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            shots = batch.captions[b]
            captions.append(("",) * len(shots) if no_text < self.text_dropout else shots)
            if no_camera < self.camera_dropout:
                c2w[b] = c2w[b, :1]
        frames = batch.latents.shape[2]
        t_BT = timesteps.training_times(batch.position, frames, self.seed, self.flow_shift, self.first_frame_clean)
        return tuple(captions), Cameras(c2w, batch.cameras.intrinsics), t_BT.to(batch.latents.device)

    def _sample_losses(self, batch: VideoBatch) -> Tensor:
        captions, cameras, t_BT = self._dropped(batch)
        noise = normal_like(batch.latents, self.seed, "noise", batch.position)
        # A block that draws for itself (dropout) sees the same numbers after a restart.
        torch.manual_seed(derive_seed(self.seed, "step", int(batch.position[0])))
        cond = self.conditioning(self.text, captions, cameras, batch.shot)
        return self.losses(self.model, batch.latents, noise, t_BT, cond)

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        loss_B = self._sample_losses(batch)
        self._pending.append((batch, loss_B.detach()))
        return loss_B.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optim.adamw(self, self.lr, self.weight_decay, self.betas, self.eps)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip to `clip`, keep loss and norm for the log; FloatingPointError before a bad step is taken."""
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        loss = torch.cat([loss_B for _, loss_B in self._pending]).mean()
        values = torch.stack([loss, norm.to(loss)]).tolist()  # the only synchronisation of a step
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(self._divergence(*values))
        nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        loss = float(self.trainer.strategy.reduce(loss, reduce_op="mean"))
        lr = optimizer.param_groups[0]["lr"]
        self.last_step = {"train/loss": loss, "train/grad_norm": values[1], "train/lr": lr}
        self._pending.clear()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        seen, total = self.samples_seen, self.max_samples
        factor = optim.lr_factor(seen, self.warmup_samples, total, self.schedule, final=0.1)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * factor
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.samples_seen += self.global_batch
        decay = optim.ema_decay(self.samples_seen, self.global_batch, self.ema_half_life)
        trained = [*self.model.parameters(), *self.text.parameters()]
        optim.ema_update(self.ema.parameters(), trained, decay)

    def _divergence(self, loss: float, norm: float) -> str:
        """One line: step, samples with a non-finite loss, the first module or the parameters concerned."""
        bad = [(b, i) for b, x in self._pending for i in range(len(x)) if not math.isfinite(float(x[i]))]
        keys = [b.keys[i] for b, i in bad] or [k for b, _ in self._pending for k in b.keys]
        if bad:
            where = self._first_non_finite(bad[0][0])
        else:
            graded = [(n, p.grad) for n, p in self.named_parameters() if p.grad is not None]
            names = [n for n, g in graded if not g.isfinite().all()]
            where = f"gradient of {', '.join(names[:3])} ({len(names)} parameters)"
        return (
            f"training stopped at step {self.step + 1} (samples_seen {self.samples_seen}): loss {loss}, "
            f"gradient norm {norm}; samples {', '.join(keys[:8])}; first non-finite value in {where}"
        )

    def _first_non_finite(self, batch: VideoBatch) -> str:
        """Run the batch again and name the first module whose output is not finite."""
        if not batch.latents.isfinite().all() or not batch.cameras.c2w.isfinite().all():
            return "the sample itself (latents or cameras)"
        names = {module: name for name, module in self.named_modules()}
        found: list[str] = []

        def watch(module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and not first.isfinite().all():
                found.append(names.get(module, type(module).__name__))

        with torch.no_grad(), self.trainer.precision_plugin.forward_context(), register_module_forward_hook(watch):
            self._sample_losses(batch)
        return f"the output of `{found[0]}`" if found else "the loss"

    @torch.no_grad()
    def validate(self, batches: Sequence[VideoBatch]) -> Validation:
        """EMA losses on fixed clips with fixed noise, first frame clean, cameras own and from another clip.

        The other clip is half the set away, which crosses maps; at least two clips are needed (ValueError).
        """
        count = sum(len(b.keys) for b in batches)
        if count < 2:
            raise ValueError(f"validation compares cameras between clips and needs at least 2, got {count}")
        c2w, intrinsics = (torch.cat([getattr(b.cameras, k) for b in batches]) for k in ("c2w", "intrinsics"))
        other = Cameras(c2w.roll(count // 2, 0), intrinsics.roll(count // 2, 0))
        own, shuffled, start = [], [], 0
        self.ema.eval()
        for batch in batches:
            end = start + len(batch.keys)
            swapped = Cameras(other.c2w[start:end], other.intrinsics[start:end]).to(self.device)
            clips = torch.arange(start, end)
            batch = batch.to(self.device)
            for cameras, rows in ((batch.cameras, own), (swapped, shuffled)):
                cond = self.conditioning(self.ema["text"], batch.captions, cameras, batch.shot)
                losses = [self._level_losses(batch, clips, t, cond) for t in self.validation_levels]
                rows.append(torch.stack(losses, 1).double().cpu())
            start = end
        keys = tuple(k for b in batches for k in b.keys)
        return Validation(keys, self.validation_levels, torch.cat(own), torch.cat(shuffled))

    def _level_losses(self, batch: VideoBatch, clips: Tensor, level: float, cond: Conditioning) -> Tensor:
        noise = normal_like(batch.latents, self.seed, f"validation {level:g}", clips)
        t_BT = torch.full((len(clips), batch.latents.shape[2]), level, device=self.device)
        t_BT[:, 0] = 0.0
        return self.losses(self.ema["model"], batch.latents, noise, t_BT, cond)

    def weights(self) -> dict[str, Tensor]:
        """Trained tensors by name, `model.*` and `text.*`, as live references."""
        parts = {"model": self.model, "text": self.text}
        return {f"{k}.{n}": v for k, m in parts.items() for n, v in m.state_dict().items()}

    def ema_weights(self) -> dict[str, Tensor]:
        """Averaged tensors under the same names."""
        return {f"{k}.{n}": v for k, m in self.ema.items() for n, v in m.state_dict().items()}

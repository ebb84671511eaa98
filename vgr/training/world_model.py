"""Training one model by an objective: flow matching, chunk-causal or not, teacher forcing, a teacher's paths.

Every random number is a function of (seed, purpose, position of the sample), so a step is the same at any rank
count, micro-batch size or restart.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from vgr.diffusion import flow
from vgr.diffusion.guidance import guided, teacher_forced
from vgr.diffusion.objectives import Noised
from vgr.seeding import derive_seed
from vgr.training import optim
from vgr.training.conditioning import conditioning, dropped
from vgr.training.sharded import gradient_norm, gradients, is_split, split_networks
from vgr.training.validation import validate_average
from vgr.types import Codec, Conditioning, Denoiser, VideoBatch


class WorldModelTraining(pl.LightningModule):
    """Trains what of `model` and `text` is not frozen; `codec` only says how raw frames group into latent frames.

    objective: latents, positions, chunk of each frame and seed to what the model sees and should predict
    (`diffusion.objectives`, `distillation.ode.regression`). packed: it also gives the past of each chunk, which the
    model sees beside it in one packed call (causal video, spec 3.2). teacher: {"model", "text"}, frozen, for an
    objective that takes the velocities of a teacher, guided by `guidance` against `negative` (a prompt), and of the
    average (`distillation.consistency`). chunk: latent frames of a chunk, None for the bidirectional model.
    cut_prefix: what stands before the caption in the first chunk after a cut (`training.conditioning`).
    warmup_samples, max_samples and ema_half_life are counted in samples (clips). clip: largest gradient norm. schedule:
    "constant" or "cosine" (to a tenth at max_samples). camera_dropout: probability that a clip's camera stands still
    at the first frame's pose instead (the world model always takes cameras).
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
        objective: Callable[..., Noised],
        packed: bool = False,
        teacher: dict[str, nn.Module] | None = None,
        guidance: float = 1.0,
        negative: str = "",
        chunk: int | None = None,
        cut_prefix: str | None = None,
        lr: float = 1e-3,
        warmup_samples: int = 0,
        schedule: str = "constant",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip: float = 0.5,
        ema_half_life: float = 2000.0,
        text_dropout: float = 0.1,
        camera_dropout: float = 0.0,
        validation_levels: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 0.95),
    ) -> None:
        super().__init__()
        if schedule not in ("constant", "cosine"):
            raise ValueError(f"training.schedule={schedule}: choose constant or cosine")
        if (takes := "teacher" in inspect.signature(objective).parameters) != (teacher is not None):
            fix = "needs a teacher: give teacher=<run folder>" if takes else "has no teacher: leave teacher=null"
            raise ValueError(f"training.objective {fix}")
        if any(p.requires_grad and p.dtype != torch.float32 for m in (model, text) for p in m.parameters()):
            raise ValueError("model.dtype: what is trained is float32; bfloat16 is for a frozen base, under lora.rank")
        self.model, self.text = model, text
        # Frozen parameters (the base of adapters) are their own average, and are held once.
        frozen = {id(p): p for m in (model, text) for p in m.parameters() if not p.requires_grad}
        average = copy.deepcopy({"model": model, "text": text}, frozen)
        self.ema = nn.ModuleDict(average).requires_grad_(False)
        self.teacher = None if teacher is None else nn.ModuleDict(teacher).requires_grad_(False)
        self.guidance, self.negative, self.packed = guidance, negative, packed
        self.objective, self.chunk, self.stride, self.cut_prefix = objective, chunk, codec.stride[0], cut_prefix
        self.seed, self.global_batch, self.max_samples = seed, global_batch, max_samples
        self.lr, self.warmup_samples, self.schedule, self.clip = lr, warmup_samples, schedule, clip
        self.weight_decay, self.betas, self.eps = weight_decay, tuple(betas), eps
        self.ema_half_life = ema_half_life
        self.text_dropout, self.camera_dropout = text_dropout, camera_dropout
        self.validation_levels = tuple(validation_levels)
        self.samples_seen = 0
        self.last_step: dict[str, float] = {}
        self.initial: dict[str, Mapping[str, Tensor]] = {}  # by names of networks that are filled when they are split
        self._pending: list[tuple[VideoBatch, Tensor]] = []

    validate = validate_average
    configure_model = split_networks

    @property
    def step(self) -> int:
        """Optimizer steps since the run began, over all restarts."""
        return self.samples_seen // self.global_batch

    def _sample_losses(self, batch: VideoBatch) -> Tensor:
        """Loss of each clip (B,) after text and camera dropout, in fp32."""
        captions, cameras = dropped(batch, self.seed, self.text_dropout, self.camera_dropout)
        cond = conditioning(self.text, captions, cameras, batch.shot, self.stride, self.chunk, self.cut_prefix)
        told = self._velocities(batch, cond)
        noised = self.objective(batch.latents, batch.position, cond.layout.chunk, self.seed, **told)
        if self.packed != (noised.context is not None):
            gives = "no past" if self.packed else "the past of each chunk"
            raise ValueError(f"training.packed={self.packed}, but training.objective gives {gives}: change one")
        forced = (noised.context, noised.context_t)
        denoiser = teacher_forced(self.model, *forced) if self.packed else self.model
        # A block that draws for itself (dropout) sees the same numbers after a restart.
        torch.manual_seed(derive_seed(self.seed, "step", int(batch.position[0])))
        v, _ = denoiser(noised.x, noised.t, noised.told(cond))
        return flow.velocity_loss(v, noised.target, noised.weight)

    def _velocities(self, batch: VideoBatch, cond: Conditioning) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """Velocities at (x, t) of the teacher and of the average, each under the batch's own past in a packed run."""
        if self.teacher is None:
            return {}
        model, text = self.teacher["model"], self.teacher["text"]
        with torch.no_grad():
            args = (batch.captions, batch.cameras, batch.shot, self.stride, self.chunk, self.cut_prefix)
            own = conditioning(text, *args)
            negative = text(tuple((self.negative,) * len(row) for row in batch.captions))

        def of(denoiser: Denoiser, cond: Conditioning) -> Callable[[Tensor, Tensor], Tensor]:
            denoiser = teacher_forced(denoiser, batch.latents) if self.packed else denoiser
            return lambda x, t: denoiser(x, t, cond)[0]

        return {"teacher": of(guided(model, self.guidance, negative), own), "average": of(self.ema["model"], cond)}

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
        norm = gradient_norm(self)
        loss = torch.cat([loss_B for _, loss_B in self._pending]).mean()
        values = torch.stack([loss, norm.to(loss)]).tolist()  # the only synchronisation of a step
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(self._divergence(*values))
        nn.utils.clip_grads_with_norm_(self.parameters(), self.clip, norm)  # ZeRO's are clipped in its step
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
        current = [*self.model.parameters(), *self.text.parameters()]
        pairs = [(a, p) for a, p in zip(self.ema.parameters(), current, strict=True) if p.requires_grad]
        optim.ema_update(*zip(*pairs), decay)

    def _divergence(self, loss: float, norm: float) -> str:
        """One line: step, samples with a non-finite loss, the first module or the parameters concerned."""
        bad = [(b, i) for b, x in self._pending for i in range(len(x)) if not math.isfinite(float(x[i]))]
        keys = [b.keys[i] for b, i in bad] or [k for b, _ in self._pending for k in b.keys]
        if bad:
            where = self._first_non_finite(bad[0][0])
        else:
            names = [n for n, g in gradients(self).items() if not g.isfinite().all()]
            where = f"gradient of {', '.join(names[:3]) or 'what other ranks hold'} ({len(names)} parameters)"
        return (
            f"training stopped at step {self.step + 1} (samples_seen {self.samples_seen}): loss {loss}, "
            f"gradient norm {norm}; samples {', '.join(keys[:8])}; first non-finite value in {where}"
        )

    def _first_non_finite(self, batch: VideoBatch) -> str:
        """Run the batch again and name the first module whose output is not finite."""
        if is_split(self.trainer.strategy):
            return "the loss"  # other ranks, whose loss may be finite, would have to run it too
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

    def weights(self) -> dict[str, Tensor]:
        """Trained tensors by name, `model.*` and `text.*`, as live references."""
        return self._unfrozen({"model": self.model, "text": self.text})

    def ema_weights(self) -> dict[str, Tensor]:
        """Averaged tensors under the same names."""
        return self._unfrozen(dict(self.ema.items()))

    def _unfrozen(self, parts: dict[str, nn.Module]) -> dict[str, Tensor]:
        own = (("model", self.model), ("text", self.text))
        frozen = {f"{k}.{n}" for k, m in own for n, p in m.named_parameters() if not p.requires_grad}
        state = {f"{k}.{n}": v for k, m in parts.items() for n, v in m.state_dict(keep_vars=True).items()}
        return {name: tensor for name, tensor in state.items() if name not in frozen}

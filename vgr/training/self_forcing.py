"""Self-forcing: a few-step chunk-causal student trained on its own rollouts by two scores (spec 6.2, DMD).

The student rolls out chunk by chunk from its own memory and stops at a random one of its few steps, which alone
carries a gradient. A frozen teacher and a critic that follows the student score the whole clip bidirectionally;
their difference moves the samples. Random numbers are functions of (seed, purpose, position) as everywhere.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from vgr.diffusion import flow
from vgr.diffusion.guidance import guided
from vgr.diffusion.rollout import stream
from vgr.diffusion.samplers import frame_noise
from vgr.distillation.dmd import matching_loss, score_times
from vgr.seeding import derive_seed, normal_like, torch_generator
from vgr.training import optim, validation
from vgr.training.conditioning import conditioning
from vgr.types import Codec, Conditioning, Denoiser, VideoBatch


class SelfForcing(pl.LightningModule):
    """Trains `model` (the student) and a critic that starts as `teacher["model"]`; texts and teacher stay frozen.

    teacher: {"model", "text"}, bidirectional. sigmas: the student's times, falling from 1 to 0. chunk: latent frames
    of a chunk. critic_steps: critic updates, at lr * critic_lr_factor, for one of the student. guidance: of the
    teacher's score, against `negative` (a prompt; "" is the null text). score_shift: flow shift of the times the
    scores are asked at. max_samples and ema_half_life are counted in samples; each step takes a global batch.
    """

    def __init__(
        self,
        model: nn.Module,
        text: nn.Module,
        codec: Codec,
        teacher: dict[str, nn.Module],
        *,
        seed: int,
        global_batch: int,
        max_samples: int,
        sigmas: Sequence[float],
        chunk: int,
        lr: float = 1e-5,
        critic_lr_factor: float = 0.2,
        critic_steps: int = 5,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float = 10.0,
        guidance: float = 4.0,
        negative: str = "",
        score_shift: float = 10.0,
        ema_half_life: float = 2000.0,
        validation_levels: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 0.95),
    ) -> None:
        super().__init__()
        if list(sigmas) != sorted(sigmas, reverse=True) or sigmas[0] != 1.0 or sigmas[-1] != 0.0:
            raise ValueError(f"training.sigmas={list(sigmas)} must fall from 1 to 0")
        self.automatic_optimization = False
        self.model, self.text, self.critic = model, text.requires_grad_(False), copy.deepcopy(teacher["model"])
        self.critic.requires_grad_(True)
        self.critic.activation_checkpointing = model.activation_checkpointing  # a rebuilt teacher has none
        self.teacher = nn.ModuleDict(teacher).requires_grad_(False)
        average = {"model": copy.deepcopy(model), "text": text}
        self.ema = nn.ModuleDict(average).requires_grad_(False)
        self.chunk, self.stride = chunk, codec.stride[0]
        self.sigmas = torch.tensor(list(sigmas), dtype=torch.float64)
        self.seed, self.global_batch, self.max_samples = seed, global_batch, max_samples
        self.rates, self.critic_steps, self.clip = (lr, lr * critic_lr_factor), critic_steps, clip
        self.adam = (weight_decay, tuple(betas), eps)
        self.guidance, self.negative, self.score_shift = guidance, negative, score_shift
        self.ema_half_life, self.validation_levels = ema_half_life, tuple(validation_levels)
        self.samples_seen = 0
        self.last_step: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0

    @property
    def step(self) -> int:
        """Updates since the run began, over all restarts; every `critic_steps`-th also updates the student."""
        return self.samples_seen // self.global_batch

    def transfer_batch_to_device(self, batch: VideoBatch, device: torch.device, dataloader_idx: int) -> VideoBatch:
        return dataclasses.replace(batch.to(device), position=batch.position)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [optim.adamw(m, rate, *self.adam) for m, rate in zip((self.model, self.critic), self.rates)]

    def rollout(self, batch: VideoBatch, cond: Conditioning, purpose: str) -> Tensor:
        """The student's clean latents (B,C,T,H,W), first frame given, stopped at this step's common exit."""
        generator = torch_generator(self.seed, f"{purpose} exit", self.step)  # one exit for all ranks and clips
        exit_step = int(torch.randint(len(self.sigmas) - 1, (), generator=generator))
        seeds = [derive_seed(self.seed, purpose, position) for position in batch.position.tolist()]
        channels, _, height, width = batch.latents.shape[1:]
        noise = frame_noise(seeds, (channels, height, width), self.device)
        state, first = self.model.new_state(), batch.latents[:, :, :1]
        chunks = stream(self.model, state, cond, self.sigmas, noise, first, renoise=True, exit_step=exit_step)
        return torch.cat([latents for latents, _ in chunks], dim=2)

    def _conditions(self, batch: VideoBatch) -> tuple[Conditioning, Conditioning]:
        """Of the student (chunks, its own text) and of the scores (one chunk, the teacher's text)."""
        args = (batch.captions, batch.cameras, batch.shot, self.stride)
        with torch.no_grad():
            return conditioning(self.text, *args, self.chunk), conditioning(self.teacher["text"], *args, None)

    def _noised(self, sample: Tensor, positions: Tensor, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy version of the samples, its times and the noise."""
        t_BT = score_times(positions, sample.shape[2], self.seed, self.score_shift, f"{purpose} time")
        t_BT = t_BT.to(sample.device)
        noise = normal_like(sample, self.seed, f"{purpose} noise", positions)
        return flow.interpolate(sample, noise, t_BT), t_BT, noise

    def generator_losses(self, batch: VideoBatch) -> tuple[Tensor, Tensor]:
        """Distribution matching loss of each clip (B,), and the samples it was taken at."""
        cond, whole = self._conditions(batch)
        sample = self.rollout(batch, cond, "student")
        with torch.no_grad():
            x, t_BT, _ = self._noised(sample.detach(), batch.position, "student")
            negative = self.teacher["text"](tuple((self.negative,) * len(row) for row in batch.captions))
            teacher: Denoiser = guided(self.teacher["model"], self.guidance, negative)
            fake, real = (flow.clean_estimate(x, score(x, t_BT, whole)[0], t_BT) for score in (self.critic, teacher))
        return matching_loss(sample, fake, real, t_BT > 0), sample.detach()

    def critic_losses(self, batch: VideoBatch) -> Tensor:
        """Flow-matching loss (B,) of the critic on the student's samples."""
        cond, whole = self._conditions(batch)
        with torch.no_grad():
            sample = self.rollout(batch, cond, "critic")
        x, t_BT, noise = self._noised(sample, batch.position, "critic")
        v, _ = self.critic(x, t_BT, whole)
        return flow.velocity_loss(v, flow.velocity(sample, noise), t_BT > 0)

    def training_step(self, batch: VideoBatch, batch_idx: int) -> None:
        parts = self.global_batch // (len(batch.keys) * self.trainer.world_size)
        if self._micro_batches == 0:
            self._sums = {}
            for optimizer in self.optimizers(use_pl_optimizer=False):
                optimizer.zero_grad()
        values = {}
        if self._students_turn:
            loss_B, sample = self.generator_losses(batch)
            values = {"train/student_loss": loss_B.mean(), **_health(sample, batch.latents)}
            self._backward(loss_B.mean() / parts)
        critic_B = self.critic_losses(batch)
        values["train/loss"] = critic_B.mean()
        self._backward(critic_B.mean() / parts)
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach() / parts
        self._micro_batches += 1
        if self._micro_batches == parts:
            self._micro_batches = 0
            self._update(batch)

    def _backward(self, loss: Tensor) -> None:
        # A manual backward pass runs inside the step's autocast, which would round the fp32 parts' gradients to bf16.
        with torch.autocast(self.device.type, enabled=False):
            self.manual_backward(loss)

    @property
    def _students_turn(self) -> bool:
        return (self.step + 1) % self.critic_steps == 0

    def _update(self, batch: VideoBatch) -> None:
        """Clip and step both networks; FloatingPointError before a bad step is taken."""
        turns = [("critic_", self.critic, 1)] + ([("", self.model, 0)] if self._students_turn else [])
        norms = {}
        for name, network, _ in turns:
            parameters = [p for p in network.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
            norms[f"train/{name}grad_norm"] = norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        reduced = {k: self.trainer.strategy.reduce(v, reduce_op="mean") for k, v in self._sums.items()}
        self.last_step = {k: float(v) for k, v in {**reduced, **norms}.items()}
        bad = [name for name, value in self.last_step.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"training stopped at step {self.step + 1} (samples_seen {self.samples_seen}): {', '.join(bad)} not "
                f"finite; samples {', '.join(batch.keys[:8])}"
            )
        optimizers = self.optimizers(use_pl_optimizer=False)
        for *_, index in turns:
            optimizers[index].step()
        self.samples_seen += self.global_batch
        if len(turns) > 1:
            self.last_step["train/lr"] = self.rates[0]
            span = self.global_batch * self.critic_steps
            decay = optim.ema_decay(self.samples_seen, span, self.ema_half_life)
            optim.ema_update(self.ema["model"].parameters(), self.model.parameters(), decay)

    def validate(self, batches: Sequence[VideoBatch]) -> validation.Validation:
        """The averaged student's velocities on held-out clips."""
        self.ema.eval()
        return validation.validate(
            self.ema["model"], self.ema["text"], batches, self.validation_levels, seed=self.seed, stride=self.stride,
            chunk=self.chunk, device=self.device,
        )  # fmt: skip

    def weights(self) -> dict[str, Tensor]:
        """Student, its text encoder and critic by name, as live references."""
        parts = {"model": self.model, "text": self.text, "critic": self.critic}
        return {f"{k}.{n}": v for k, m in parts.items() for n, v in m.state_dict().items()}

    def ema_weights(self) -> dict[str, Tensor]:
        """The averaged student under the names `model.*`, and its text encoder."""
        return {f"{k}.{n}": v for k, m in self.ema.items() for n, v in m.state_dict().items()}


def _health(sample: Tensor, data: Tensor) -> dict[str, Tensor]:
    """Movement between frames and spread of the samples over those of the data: 1 is alike, 0 a still or grey video."""
    motions = [(x[:, :, 1:] - x[:, :, :-1]).abs().mean() for x in (sample, data)]
    deviations = [x.std() for x in (sample, data)]
    pairs = {"train/motion_ratio": motions, "train/std_ratio": deviations}
    return {name: own / reference.clamp_min(1e-6) for name, (own, reference) in pairs.items()}

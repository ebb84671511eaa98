"""Self-forcing: a few-step chunk-causal student trained on its own rollouts by two scores.

World model, spec 6.2; causal video, spec 6.

The student rolls out chunk by chunk from its own memory and stops at a random one of its few steps. A frozen teacher
and a critic that follows the student score the clip, whole or each chunk under its clean past; their difference moves
the samples. Only the last call of a chunk has a gradient: it is made again, chunk by chunk, when the samples' gradient
is known. Random numbers are functions of (seed, purpose, position) as everywhere.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import ParallelStrategy
from torch import Tensor, nn

from vgr.data.modules import data_place
from vgr.diffusion import flow
from vgr.diffusion.guidance import guided, teacher_forced
from vgr.diffusion.rollout import Exit, self_forced
from vgr.diffusion.samplers import chunk_bounds, frame_noise
from vgr.distillation.dmd import discriminator_loss, matching_loss, score_times
from vgr.seeding import derive_seed, normal_like, torch_generator
from vgr.training import health, optim
from vgr.training.conditioning import conditioning
from vgr.training.sharded import split_networks
from vgr.training.validation import validate_average
from vgr.types import Codec, Conditioning, Denoiser, VideoBatch


@dataclasses.dataclass(frozen=True)
class Segment:
    """What one update works on: some successive chunks of a sequence, and what stands before them.

    number: of the update in the run; index, count: of the segments in its sequence; cond: of its frames, for the
    student; window: for the scores, also of the frames of `past` (B,C,O,H,W), the clean latents before; true: the
    data's latents of the window; state: the student's memory.
    """

    batch: VideoBatch
    number: int
    index: int
    count: int
    cond: Conditioning
    window: Conditioning
    past: Tensor
    true: Tensor
    state: Any

    def purpose(self, name: str) -> str:
        """Of random numbers that do not depend on the frame, and must differ between the segments of a sequence."""
        return f"{name} {self.index}" if self.index else name


class SelfForcing(pl.LightningModule):
    """Trains `model` (the student) and a critic that starts as `teacher["model"]`; texts and teacher stay frozen.

    teacher: {"model", "text"}. scores: "bidirectional", of the clip as a whole, or "causal", of each chunk under the
    clean samples before it in one packed call; teacher and critic are models of that kind. image: the clip's first
    latent frame is given. sigmas: the student's times, falling from 1 to 0. chunk: latent frames of a chunk.
    critic_steps: critic updates, at lr * critic_lr_factor, for one of the student. guidance: of the teacher's score,
    against `negative` (a prompt; "" is the null text). cut_prefix: see `training.conditioning`.
    score_shift: flow shift of the times the scores are asked at.
    judge: a head on the critic (`models.critic.Judge`), whose loss on the samples counts `adversarial` times (causal
    video, eq. 11); true samples are the data's. segment: chunks of one update, of a sequence that grows segment by
    segment from the student's detached memory (causal video, spec 6.4; None: all); the scores also see `overlap`
    latent frames before them, which are not counted. max_samples and ema_half_life are counted in samples; a whole
    sequence of a global batch is one step.
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
        cut_prefix: str | None = None,
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
        scores: str = "bidirectional",
        image: bool = True,
        judge: nn.Module | None = None,
        adversarial: float = 0.0,
        segment: int | None = None,
        overlap: int = 0,
        ema_half_life: float = 2000.0,
        validation_levels: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 0.95),
    ) -> None:
        super().__init__()
        if list(sigmas) != sorted(sigmas, reverse=True) or sigmas[0] != 1.0 or sigmas[-1] != 0.0:
            raise ValueError(f"training.sigmas={list(sigmas)} must fall from 1 to 0")
        if scores not in ("bidirectional", "causal"):
            raise ValueError(f"training.scores={scores}: choose bidirectional or causal")
        if (judge is None) != (adversarial == 0):
            raise ValueError(f"training.adversarial={adversarial} and training.judge go together: give both or none")
        if overlap < 0 or (segment is None and overlap) or (segment is not None and segment < 1):
            raise ValueError(f"training.segment={segment}, overlap={overlap}: give chunks, latent frames, or null, 0")
        self.automatic_optimization = False
        self.model, self.text, self.critic = model, text.requires_grad_(False), copy.deepcopy(teacher["model"])
        self.critic.requires_grad_(True)
        self.critic.activation_checkpointing = model.activation_checkpointing  # a rebuilt teacher has none
        self.judge, self.adversarial = judge, adversarial
        self.teacher = nn.ModuleDict(teacher).requires_grad_(False)
        self.ema = nn.ModuleDict({"model": copy.deepcopy(model), "text": text}).requires_grad_(False)
        self.chunk, self.stride, self.cut_prefix = chunk, codec.stride[0], cut_prefix
        self.sigmas = torch.tensor(list(sigmas), dtype=torch.float64)
        self.seed, self.global_batch, self.max_samples = seed, global_batch, max_samples
        self.rates, self.critic_steps, self.clip = (lr, lr * critic_lr_factor), critic_steps, clip
        self.adam = (weight_decay, tuple(betas), eps)
        self.guidance, self.negative, self.score_shift = guidance, negative, score_shift
        self.packed, self.image, self.segment, self.overlap = scores == "causal", image, segment, overlap
        self.ema_half_life, self.validation_levels = ema_half_life, tuple(validation_levels)
        self.samples_seen = self._micro_batches = 0
        self.last_step: dict[str, float] = {}
        self.initial: dict[str, Mapping[str, Tensor]] = {}  # by names of networks that are filled when they are split
        self._sums: dict[str, Tensor] = {}

    validate = validate_average

    @property
    def step(self) -> int:
        """Steps since the run began, over all restarts."""
        return self.samples_seen // self.global_batch

    configure_model = split_networks

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [optim.adamw(m, rate, *self.adam) for m, rate in zip((self.model, self._follower()), self.rates)]

    def _follower(self) -> nn.ModuleList:
        """What follows the student: the critic and, if there is one, its judge."""
        return nn.ModuleList([self.critic] if self.judge is None else [self.critic, self.judge])

    def segments(self, batch: VideoBatch) -> Generator[Segment, tuple[Tensor, Any], None]:
        """The segments of a sequence in order; send the latents (B,C,T,H,W) of each and the state that holds them."""
        args = (batch.captions, batch.cameras, batch.shot, self.stride)
        with torch.no_grad():
            cond = conditioning(self.text, *args, self.chunk, self.cut_prefix)
            whole = conditioning(self.teacher["text"], *args, self.chunk if self.packed else None, self.cut_prefix)
        chunks = chunk_bounds(cond.layout)
        each = self.segment or len(chunks)
        spans = [(part[0][0], part[-1][1]) for part in (chunks[i : i + each] for i in range(0, len(chunks), each))]
        state, past = self.model.new_state(), batch.latents[:, :, :0]
        for i, (a, b) in enumerate(spans):
            start = a - past.shape[2]
            parts = (cond.frames(a, b), whole.frames(start, b), past, batch.latents[:, :, start:b], state)
            sample, state = yield Segment(batch, self.step * len(spans) + i, i, len(spans), *parts)
            past = torch.cat([past, sample], dim=2)
            past = past[:, :, max(0, past.shape[2] - self.overlap) :]

    def rollout(self, segment: Segment, purpose: str) -> tuple[Tensor, list[Exit], Any]:
        """The student's clean latents (B,C,T,H,W), stopped at this update's common exit, each chunk's exit, the state.

        A sequence's last state is let go: nothing follows, and it holds the whole video's keys and values.
        """
        batch = segment.batch
        generator = torch_generator(self.seed, f"{purpose} exit", segment.number)  # one exit for all ranks and chunks
        exit_step = int(torch.randint(len(self.sigmas) - 1, (), generator=generator))
        seeds = [derive_seed(self.seed, purpose, position) for position in batch.position.tolist()]
        channels, _, height, width = batch.latents.shape[1:]
        noise = frame_noise(seeds, (channels, height, width), self.device)
        first = batch.latents[:, :, :1] if self.image and segment.index == 0 else None
        args = (self.model, segment.state, segment.cond, self.sigmas, noise, first)
        sample, exits, state = self_forced(*args, exit_step=exit_step)
        return sample, exits, state if segment.index + 1 < segment.count else None

    def _noised(self, window: Tensor, segment: Segment, purpose: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy version of a window, its times, the noise, and which frames count (B,T): noisy ones behind the past."""
        purpose, positions = segment.purpose(purpose), segment.batch.position
        args = (positions, window.shape[2], self.seed, self.score_shift, f"{purpose} time", self.image)
        t_BT = score_times(*args).to(window.device)
        noise = normal_like(window, self.seed, f"{purpose} noise", positions)
        made_BT = t_BT > 0
        made_BT[:, : segment.past.shape[2]] = False
        return flow.interpolate(window, noise, t_BT), t_BT, noise, made_BT

    def _score(self, network: Denoiser, clean: Tensor, x: Tensor, t_BT: Tensor, segment: Segment) -> Tensor:
        """Velocity at x, noisy versions of `clean`, in the form of this run's scores."""
        score = teacher_forced(network, clean.detach()) if self.packed else network
        return score(x, t_BT, segment.window)[0]

    def _follow(self, clean: Tensor, x: Tensor, t_BT: Tensor, segment: Segment) -> tuple[Tensor, list[Tensor]]:
        """The critic's velocity and what its judge sees of it (nothing without a judge)."""
        with contextlib.nullcontext([]) if self.judge is None else self.judge.watch(self.critic) as seen:
            return self._score(self.critic, clean, x, t_BT, segment), seen

    def _logits(self, seen: list[Tensor]) -> Tensor:
        return self.judge(seen, 0.5 if self.packed else 1.0)

    def student_losses(self, segment: Segment) -> tuple[Tensor, Tensor, list[Exit], dict[str, Tensor]]:
        """Loss of each clip (B,), the samples it has a gradient for, their exits, and the run's health."""
        sample, exits, _ = self.rollout(segment, "student")
        window = torch.cat([segment.past, sample.requires_grad_()], dim=2)
        x, t_BT, _, made_BT = self._noised(window, segment, "student")
        with torch.no_grad():
            negative = self.teacher["text"](tuple((self.negative,) * len(row) for row in segment.batch.captions))
            teacher = guided(self.teacher["model"], self.guidance, negative)
            real = flow.clean_estimate(x, self._score(teacher, window, x, t_BT, segment), t_BT)
        with torch.set_grad_enabled(self.judge is not None):
            v, seen = self._follow(window, x, t_BT, segment)
        with torch.no_grad():
            fake = flow.clean_estimate(x, v, t_BT)
            values = health.samples(window, segment.true)
            chunk_T = F.pad(segment.cond.layout.chunk, (segment.past.shape[2], 0))
            values |= health.scores(window, fake, real, chunk_T.where(made_BT[0], -1))
        loss_B = matching_loss(window, fake, real, made_BT)
        values["train/student_loss"] = loss_B.detach().mean()
        if self.judge is not None:
            fooled_B = F.softplus(-self._logits(seen))
            values["train/adversarial_loss"] = fooled_B.detach().mean()
            loss_B = loss_B + self.adversarial * fooled_B
        return loss_B, sample, exits, values

    def critic_losses(self, segment: Segment) -> tuple[Tensor, Tensor, Any, dict[str, Tensor]]:
        """Loss of each clip (B,) for the critic, by flow matching, and its judge; the samples, and the student's state.

        The judge learns from what the critic sees, not the critic from the judge.
        """
        sample, state = self.rollout(segment, "critic")[::2]  # exits would hold memory through the backward pass
        window = torch.cat([segment.past, sample], dim=2)
        x, t_BT, noise, made_BT = self._noised(window, segment, "critic")
        v, seen = self._follow(window, x, t_BT, segment)
        loss_B = flow.velocity_loss(v, flow.velocity(window, noise), made_BT)
        values = {"train/loss": loss_B.detach().mean()}
        if self.judge is not None:
            true = segment.true
            noise = normal_like(true, self.seed, f"{segment.purpose('true')} noise", segment.batch.position)
            with torch.no_grad():
                _, seen_true = self._follow(true, flow.interpolate(true, noise, t_BT), t_BT, segment)
            logits = (self._logits([x.detach() for x in tokens]) for tokens in (seen_true, seen))
            told_B = discriminator_loss(*logits)
            values["train/judge_loss"] = told_B.detach().mean()
            loss_B = loss_B + told_B
        return loss_B, sample, state, values

    def training_step(self, batch: VideoBatch, batch_idx: int) -> None:
        at_once = len(batch.keys) * data_place(self.trainer)[1]
        parts = self.global_batch // at_once
        if self.segment is not None and parts > 1:
            raise ValueError(
                f"training.segment={self.segment} updates within a sequence, so training.global_batch="
                f"{self.global_batch} must be data.micro_batch x devices, {at_once}"
            )
        segments = self.segments(batch)
        with contextlib.suppress(StopIteration):
            segment = next(segments)
            while True:
                segment = segments.send(self._take(segment, parts))
        if self._micro_batches == 0:
            self.samples_seen += self.global_batch

    def _take(self, segment: Segment, parts: int) -> tuple[Tensor, Any]:
        """Gradients of a segment and, with the last of `parts` micro-batches, the update; its samples and the state."""
        if self._micro_batches == 0:
            self._sums = {}
            for optimizer in self.optimizers(use_pl_optimizer=False):
                optimizer.zero_grad()
        last, values = self._micro_batches == parts - 1, {}
        if self._students_turn(segment):
            loss_B, sample, exits, values = self.student_losses(segment)
            with torch.autocast(self.device.type, enabled=False):
                (dx,) = torch.autograd.grad(loss_B.mean() / parts, sample)
            self._replay(exits, dx, last)
        loss_B, sample, state, more = self.critic_losses(segment)
        self._backward(loss_B.mean() / parts, last)
        for name, value in {**values, **more}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value / parts
        self._micro_batches += 1
        if last:
            self._micro_batches = 0
            self._update(segment)
        return sample, state

    def _replay(self, exits: list[Exit], dx: Tensor, last: bool) -> None:
        """The student's gradient from that of its samples, dx (B,C,T,H,W): exits again, the last one first."""
        while exits:
            clean = exits.pop().again(self.model)
            dx, own = dx.tensor_split([dx.shape[2] - clean.shape[2]], dim=2)
            self._backward((clean * own).sum(), last and not exits)

    def _backward(self, loss: Tensor, sync: bool) -> None:
        """Gradients, reduced over ranks with the update's last backward pass of a network only."""
        strategy = self.trainer.strategy
        alone = not sync and isinstance(strategy, ParallelStrategy)
        # A manual backward pass runs inside the step's autocast, which would round the fp32 parts' gradients to bf16.
        quiet = strategy.block_backward_sync() if alone else contextlib.nullcontext()
        with quiet, torch.autocast(self.device.type, enabled=False):
            self.manual_backward(loss)

    def _students_turn(self, segment: Segment) -> bool:
        return (segment.number + 1) % self.critic_steps == 0

    def _update(self, segment: Segment) -> None:
        """Clip and step both networks; FloatingPointError before a bad step is taken."""
        turn = self._students_turn(segment)
        networks = {"critic_": self.critic, "judge_": self.judge, "": self.model if turn else None}
        norms = {}
        for name, network in networks.items():
            if network is None:
                continue
            parameters = [p for p in network.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
            norms[f"train/{name}grad_norm"] = norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        reduced = {k: self.trainer.strategy.reduce(v, reduce_op="mean") for k, v in self._sums.items()}
        values = {k: float(v) for k, v in {**reduced, **norms}.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"training stopped at step {self.step + 1} (samples_seen {self.samples_seen}): {', '.join(bad)} not "
                f"finite; samples {', '.join(segment.batch.keys[:8])}"
            )
        optimizers = self.optimizers(use_pl_optimizer=False)
        for optimizer in optimizers if turn else optimizers[1:]:
            optimizer.step()
        if turn:
            values["train/lr"] = self.rates[0]
            seen = self.samples_seen + self.global_batch * (segment.index + 1) / segment.count
            span = self.global_batch * self.critic_steps / segment.count
            decay = optim.ema_decay(seen, span, self.ema_half_life)
            optim.ema_update(self.ema["model"].parameters(), self.model.parameters(), decay)
        self.last_step = {**(self.last_step if segment.index else {}), **values}

    def weights(self) -> dict[str, Tensor]:
        """Student, its text encoder, critic and judge by name, as live references."""
        parts = {"model": self.model, "text": self.text, "critic": self.critic}
        if self.judge is not None:
            parts["judge"] = self.judge
        return {f"{k}.{n}": v for k, m in parts.items() for n, v in m.state_dict().items()}

    def ema_weights(self) -> dict[str, Tensor]:
        """The averaged student under the names `model.*`, and its text encoder."""
        return {f"{k}.{n}": v for k, m in self.ema.items() for n, v in m.state_dict().items()}

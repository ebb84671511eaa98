"""`trainer.strategy=zero2` and `zero3`: the training of one network split over ranks by DeepSpeed's ZeRO.

Of DeepSpeed its partitions and their collectives are used. Precision, optimizer, learning rate, norm, average and
files are the house's: numbers are those of one device, and a run goes on under any other strategy.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from vgr.parallel.fsdp import blocks, whole_shape
from vgr.training import checkpoints
from vgr.training.sharded import networks

BUCKET = 50_000_000  # numbers that are reduced at once, or gathered ahead of their use
_READ = 16  # tensors of a checkpoint that every rank reads at once


def require(strategy: str) -> None:
    """ValueError where `strategy` needs a package that is not here."""
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"trainer.strategy={strategy} needs DeepSpeed: pip install 'vgr[deepspeed]', or use fsdp")


def _deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed for a kind of device; for CPUs without the kernel that it would compile."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # it would take a GPU that is there
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # of inference alone
    return deepspeed


class ZeroStrategy(DDPStrategy):
    """Stage 2 splits gradients and moments over all ranks, stage 3 parameters and averages as well.

    Not Lightning's DeepSpeedStrategy: that refuses CPUs, clips by a norm that is seen when the step is taken, counts a
    step for every micro-batch and saves pickles.
    """

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.stage = stage

    def setup_distributed(self) -> None:
        super().setup_distributed()
        os.environ["LOCAL_RANK"] = str(self.local_rank)  # where DeepSpeed looks for it, whoever started the ranks
        backend = self._get_process_group_backend()
        _deepspeed(self.root_device).init_distributed(backend, auto_mpi_discovery=False, verbose=False)

    def _config(self) -> dict[str, Any]:
        module = self.lightning_module
        return {
            "train_micro_batch_size_per_gpu": 1,  # of its throughput lines, which nobody reads
            "gradient_accumulation_steps": 1,  # losses come divided
            "gradient_clipping": module.clip,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET,
                "stage3_prefetch_bucket_size": BUCKET, "stage3_max_reuse_distance": 0,
                "stage3_param_persistence_threshold": 0,  # averages change in parts
                "memory_efficient_linear": False,  # it would replace torch's for good
            },
            # It allows no autocast but its own around a step. Nothing is sent in less than fp32.
            "torch_autocast": {
                "enabled": module.trainer.precision == "bf16-mixed", "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }  # fmt: skip

    def split(self, module: pl.LightningModule) -> None:
        """Stage 3: put every parameter on the device and split it, one by one; called by `configure_model`, once.

        Networks may be on the meta device: then they are filled from `module.initial` by their names, else a checkpoint
        is about to.
        """
        if self.stage < 3:
            return
        from deepspeed.utils import set_z3_leaf_module

        initial, module.initial = module.initial, {}
        zero, config = _deepspeed(self.root_device).zero, self._config()
        for called, network in networks(module):
            for block in blocks(network):
                set_z3_leaf_module(block, True)  # gathered as one: their modules may read each other's parameters
            for path, part in reversed(list(network.named_modules())):  # children first: a module's own are left
                for name, p in list(part.named_parameters(recurse=False)):
                    if p.is_meta:
                        made = torch.empty_like(p, device=self.root_device)
                        if called in initial:
                            made.copy_(initial[called][f"{path}.{name}".lstrip(".")])
                        setattr(part, name, nn.Parameter(made, p.requires_grad))
                zero.Init(module=part, config_dict_or_path=config)
        for p in module.text.parameters(recurse=False):  # it makes no tensors, by which it would be seen backward
            zero.register_external_parameter(module, p)

    def setup(self, trainer: pl.Trainer) -> None:
        self.accelerator.setup(trainer)
        self.model_to_device()
        self.model, optimizer, *_ = _deepspeed(self.root_device).initialize(
            model=self.lightning_module, optimizer=self.lightning_module.configure_optimizers(),
            config=self._config(), dist_init_required=False,
        )  # fmt: skip
        self.optimizers = [optimizer]
        self.setup_precision_plugin()
        flats = optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        for flat in flats:  # AdamW's own beginning, before DeepSpeed looks for it: it does after the first group's step
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
        if self.stage == 2:
            optimizer._lazy_init_hp_params_optimizer_state()

    def block_backward_sync(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # gradients are split, and so reduced, at every micro-batch

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        trainer = self.lightning_module.trainer
        last = (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(closure_loss)
        return closure_loss.detach()

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        told = self.precision_plugin._wrap_closure(self.lightning_module, optimizer, closure)
        self.model.step()
        if self.stage == 3:
            self.model.optimizer.grad_partitions_flat_buffer.zero_()  # where no gradient comes the last one would stay
        return told

    def gradients(self) -> dict[str, Tensor]:
        """This rank's parts of the mean gradients, between backward pass and step, by names of parameters."""
        zero, names = self.model.optimizer, self.model.param_names
        groups = zero.fp16_groups if self.stage == 3 else zero.params_in_partition
        return {names[p]: g for i, parts in zero.averaged_gradients.items() for p, g in zip(groups[i], parts)}

    def tensors(self) -> dict[str, dict[str, Tensor | Callable[[], Tensor]]]:
        """What a checkpoint holds (`saving.Saver`); a function gathers a tensor that no rank has whole."""
        from deepspeed.utils import safe_get_full_optimizer_state

        module, state = self.lightning_module, next(iter(self.model.optimizer.state.values()))
        moments = {
            f"{name}:{key}": partial(safe_get_full_optimizer_state, p, key) if value.ndim else value
            for name, p in module.named_parameters() if p.requires_grad for key, value in state.items()
        }  # fmt: skip
        weights, ema = (
            {name: partial(_gathered, p) if hasattr(p, "ds_id") else p for name, p in tensors.items()}
            for tensors in (module.weights(), module.ema_weights())
        )
        return {"weights": weights, "ema": ema, "optimizer": moments}

    def restore(self, checkpoint: Path) -> None:
        """Fill weights, average and moments from a verified checkpoint of any strategy and world size.

        Raises ValueError if names or shapes differ, or if steps were counted for some parameters alone.
        """
        module = self.lightning_module
        for part, own in (("weights", module.weights()), ("ema", module.ema_weights())):
            stored = {name: info.size for name, info in checkpoints.stored_tensors(checkpoint / part).items()}
            shapes = {name: torch.empty(whole_shape(p), device="meta") for name, p in own.items()}
            checkpoints.match(shapes, stored, checkpoint / part)
            for name, value in _read(checkpoint / part):
                if hasattr(own[name], "ds_tensor"):
                    self._fill(own[name].ds_tensor, value)
                else:
                    own[name].data.copy_(value)
        self.model.optimizer.refresh_fp32_params()  # that it steps: copies of what it owns
        self._restore_moments(checkpoint / "optimizer")

    def _restore_moments(self, folder: Path) -> None:
        from deepspeed.utils import safe_get_local_optimizer_state, safe_set_full_optimizer_state

        zero, own = self.model.optimizer, dict(self.lightning_module.named_parameters())
        steps: dict[float, str] = {}
        for key, value in _read(folder):
            name, _, slot = key.rpartition(":")
            if slot == "step":
                steps[value.item()] = name
            elif self.stage == 3:
                self._fill(safe_get_local_optimizer_state(own[name], slot), value)
            else:
                safe_set_full_optimizer_state(own[name], value, slot)
        if len(steps) != 1:
            told = ", ".join(f"{name} {step:.0f}" for step, name in steps.items())
            raise ValueError(f"{folder} counts steps by parameter ({told}), ZeRO for all together; go on with fsdp")
        for state in zero.state.values():
            state["step"].fill_(next(iter(steps)))

    def _fill(self, part: Tensor, value: Tensor) -> None:
        """Copy this rank's part of a tensor as ZeRO-3 splits it: equal runs of its numbers, the last one padded."""
        own = value.flatten()[self.global_rank * part.numel() :][: part.numel()]
        part[: own.numel()].copy_(own)


def _gathered(p: nn.Parameter) -> Tensor:
    """A parameter that ZeRO-3 splits, whole; all ranks call this."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([p]):
        return p.detach().clone()


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors of one part of a checkpoint, in CPU memory a few at once."""
    stored = list(checkpoints.stored_tensors(folder).items())
    for start in range(0, len(stored), _READ):
        some = {name: torch.empty(tuple(x.size), dtype=x.properties.dtype) for name, x in stored[start : start + _READ]}
        checkpoints.load_tensors(some, folder, alone=True)
        yield from some.items()

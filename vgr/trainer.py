"""The Lightning trainer of a configuration: on what, in how many parts, in which precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from vgr.training import callbacks


def settings(cfg: DictConfig) -> dict[str, Any]:
    """cfg.trainer and cfg.fsdp with accumulation; `precision: auto` is bf16-mixed on a GPU that has it, else fp32.

    Raises ValueError for a GPU that is not there, devices or a precision it cannot take, batches that do not divide.
    """
    import logging

    import torch
    from hydra.utils import get_class

    from vgr.training import sharded

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    told = OmegaConf.to_container(cfg.trainer, resolve=True) | OmegaConf.to_container(cfg.fsdp)
    on_gpu = told["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if told["accelerator"] in ("gpu", "cuda") and not on_gpu:
        raise ValueError(f"trainer.accelerator={told['accelerator']}, but torch finds no GPU: use cpu")
    if told["precision"] == "auto":
        told["precision"] = "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"
    if told["precision"] not in ("bf16-mixed", "32-true"):
        raise ValueError(
            f"trainer.precision={told['precision']}: choose auto, bf16-mixed or 32-true; weights stay fp32, and "
            "gradients are clipped without a loss scaler"
        )
    if not isinstance(told["devices"], int) or told["devices"] < 1:
        raise ValueError(f"trainer.devices={told['devices']}: give their number; the global batch is dealt to them")
    world = told["devices"] * told["num_nodes"] // sharded.clip_ranks(told, cfg, get_class(cfg.model._target_))
    batch, micro = cfg.training.global_batch, cfg.data.micro_batch
    if micro < 1 or batch % (micro * world):
        raise ValueError(
            f"training.global_batch={batch} is not a multiple of data.micro_batch={micro} x {world} devices"
        )
    return {**told, "accumulate_grad_batches": batch // (micro * world)}


def fit(
    settings: dict[str, Any],
    steps: callbacks.BetweenSteps,
    module: callbacks.Training,
    data: pl.LightningDataModule,
    compiled: bool = False,
) -> None:
    """The remaining steps, if any; compiled: every block of every network."""
    import warnings

    from hydra.utils import instantiate

    from vgr.parallel.fsdp import blocks
    from vgr.training.sharded import ShardedStrategy, networks
    from vgr.training.zero import ZeroStrategy

    if data.start_batch >= data.total_batches:
        return
    replicas, context = settings["replicas"], settings["context"]
    settings = {k: v for k, v in settings.items() if k not in ("replicas", "context")}
    if settings["strategy"] == "fsdp":
        settings["strategy"] = ShardedStrategy(replicas, context)
    elif settings["strategy"].startswith("zero"):
        settings["strategy"] = ZeroStrategy(stage=int(settings["strategy"][-1]))
    if not module.automatic_optimization:  # it accumulates itself, and a backward pass reaches one of two networks
        settings = {**settings, "accumulate_grad_batches": 1}
        if settings["devices"] * settings["num_nodes"] > 1 and settings["strategy"] in ("auto", "ddp"):
            settings["strategy"] = "ddp_find_unused_parameters_true"
    steps.pace.know(module, steps.batches)
    for _, network in networks(module) if compiled else ():
        for block in blocks(network):
            block.compile()  # before it is split: what gathers its parameters stays outside
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # jobs are slurm/submit's
        warnings.filterwarnings("ignore", module="pytorch_lightning.*")
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        trainer = instantiate(
            settings,
            logger=False, callbacks=[steps], max_epochs=1, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, default_root_dir=str(steps.run_dir),
        )  # fmt: skip
        trainer.fit(module, datamodule=data)

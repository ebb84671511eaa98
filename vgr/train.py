"""vgr-train: train a preset, or list them all.

vgr-train experiments=world_model/tiny seed=1
vgr-train experiments=world_model/lora base=weights/SANA-WM_bidirectional
vgr-train --list
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from vgr import command, trainer

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor

    from vgr.training import callbacks
    from vgr.types import VideoBatch


def main() -> None:
    """Entry point of `vgr-train` and `python -m vgr.train`."""
    if "--list" in sys.argv[1:]:
        print(preset_table())
        return
    command.run("train", body)


def body(cfg: DictConfig) -> None:
    """Train what the command line says, in the folder that belongs to it."""
    from hydra.core.hydra_config import HydraConfig

    job = HydraConfig.get()
    experiment = job.runtime.choices.get("experiments")
    train(cfg, command.run_folder(cfg.runs, experiment, job.overrides.task, cfg.seed))


def train(cfg: DictConfig, run_dir: Path) -> None:
    """Train cfg in run_dir, continuing what is found there; the last step validates and saves. Or tell the plan of it.

    Raises ValueError or OSError, before a GPU is held, for settings, data and checkpoints that do not fit;
    FloatingPointError, naming the last good checkpoint, when loss or gradient stop being finite.
    """
    import torch
    from hydra.utils import instantiate
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    from vgr.training import budget, checkpoints, zero

    command.check_targets(cfg)
    with torch.device("meta"):  # settings that cannot be are refused before weights are read
        instantiate(cfg.model)
    if cfg.plan:
        from vgr import planner

        planner.tell(cfg, rank_zero_only(print))
        return
    settings = trainer.settings(cfg)
    zero.require(settings["strategy"])
    if told := budget.of_training(cfg, settings):
        rank_zero_only(print)(told)
    config = OmegaConf.to_container(cfg, resolve=True)
    if cfg.teacher is not None:  # frozen networks are known by hash: another teacher is another run
        config["teacher_sha256"] = checkpoints.weights_hash(checkpoints.resolve(Path(cfg.teacher)))
    checkpoint = find_checkpoint(cfg.resume, run_dir)
    initial = read_initial(cfg, checkpoint)
    if cfg.lora.rank:  # the base is not in the checkpoints: it too is known by hash
        config["init_from_sha256"] = checkpoints.tensors_hash(initial)
    if checkpoint is not None:
        refuse_other_config(checkpoints.read_state(checkpoint)["config"], config, checkpoint)
    module, data, codec = build(cfg, initial, checkpoint is not None)
    inputs = rank_zero_only(made_from)(cfg, config, module, data, initial)
    del initial  # 11 GB at full size
    steps = prepare_run(cfg, config, run_dir, module, data, codec, checkpoint)
    steps.record.keep(inputs)
    try:
        trainer.fit(settings, steps, module, data, cfg.compile)
    except FloatingPointError as error:
        good = checkpoints.latest(run_dir / "checkpoints")
        raise FloatingPointError(f"{error}; last good checkpoint: {good or 'none yet'}") from error
    finally:
        steps.record.close()
    if steps.signal is not None:
        print(f"stopped by signal {steps.signal}; the same command continues", file=sys.stderr)
        sys.exit(128 + steps.signal)
    if rank_zero_only.rank == 0:
        print(f"trained {module.samples_seen} samples; run folder {run_dir}, validation {run_dir / 'validation.json'}")


def find_checkpoint(resume: str | None, run_dir: Path) -> Path | None:
    """The checkpoint to continue from, a whole one: null none, `auto` the run's newest, else a path inside run_dir.

    A requeued run has nobody to choose: where the newest is damaged `auto` goes back to an earlier one, and says so.
    """
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    from vgr.training import checkpoints

    folder = run_dir / "checkpoints"
    if resume is None and checkpoints.latest(folder) is not None:
        raise ValueError(f"resume=null, but {run_dir} holds a run: remove that folder, or use resume=auto")
    if resume in (None, "auto"):
        good, wrong = checkpoints.newest_good(folder)
        if wrong:
            told = f"{'; '.join(wrong)}. Continuing from {good.name}, the newest that is whole"
            rank_zero_only(print)(f"vgr-train: warning: {told}", file=sys.stderr)
        return good
    chosen = checkpoints.resolve(Path(resume))
    if chosen.resolve().parent != folder.resolve():
        raise ValueError(f"resume={resume} is not a checkpoint of {run_dir}; init_from={resume} takes its weights only")
    checkpoints.verify(chosen)
    return chosen


def refuse_other_config(saved: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """ValueError naming every setting that would change results and differs from the run's own."""
    different = []
    for key in sorted((old := command.flat(saved)).keys() | (new := command.flat(now)).keys()):
        was, is_ = old.get(key, "unset"), new.get(key, "unset")
        if command.changes_results(key) and was != is_ and not isinstance(was, dict) and not isinstance(is_, dict):
            different.append(f"{key} (was {was}, is {is_})")
    if different:
        raise ValueError(
            f"{checkpoint} was made with other settings: {', '.join(different)}. Restore them, or remove the run"
        )


def build(
    cfg: DictConfig, initial: Mapping[str, Tensor] | None = None, going_on: bool = False
) -> tuple[callbacks.Training, pl.LightningDataModule, Any]:
    """Training module, data and codec of a configuration, started from `initial`, checked. Raises ValueError.

    going_on: a checkpoint's weights will take their place.
    """
    import contextlib

    import torch
    from hydra.utils import instantiate

    from vgr.nn import lora
    from vgr.prepare import one_video
    from vgr.seeding import derive_seed
    from vgr.training import rebuild
    from vgr.training.conditioning import cached_text

    codec = instantiate(cfg.codec)
    global_batch = cfg.training.global_batch
    if cfg.data.get("video"):
        one_video(cfg, codec)
    data = instantiate(cfg.data, codec_fingerprint=codec.fingerprint, seed=cfg.seed, global_batch=global_batch)
    refuse_unfit(cfg, data, codec)
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    text = cached_text(data, cfg.text) or instantiate(cfg.text)
    # Of a split model no rank makes the whole: weights that are there are read when it is split, tensor by tensor.
    later = (initial is not None or going_on) and split(cfg) and not cfg.surgery
    with torch.device("meta") if later else contextlib.nullcontext():
        model = instantiate(cfg.model)
    prepared = [shards.manifest["extra"].get("settings", {}) for shards in data.train_sets]
    if model.takes_cameras and any(own.get("cameras", "") is None for own in prepared):
        raise ValueError("data.train was prepared with source.cameras=null, but this model takes cameras")
    if initial is not None:
        if "latents" not in cfg.surgery:
            rebuild.refuse_other_codec("init_from", cfg.init_from, codec)
        rebuild.load_initial({"text": text} if later else {"model": model, "text": text}, initial, cfg.surgery)
    # Numbers drawn from here on do not depend on how many the model drew, on the meta device none.
    torch.manual_seed(derive_seed(cfg.seed, "beside"))
    if cfg.lora.rank:
        if text.state_dict() and not any(name.startswith("text.") for name in initial):
            raise ValueError(
                f"lora.rank={cfg.lora.rank} trains adapters only, but init_from={cfg.init_from} holds no text encoder "
                "of its own: give the run it is of, or take a frozen one (text=gemma2)"
            )
        text.requires_grad_(False)
        lora.add(model, **cfg.lora)
    teacher, given = read_teacher(cfg, codec)
    module = instantiate(cfg.training, model=model, text=text, codec=codec, **teacher, seed=cfg.seed)
    if cfg.critic_from is not None and not hasattr(module, "critic"):
        raise ValueError(f"critic_from={cfg.critic_from}: {cfg.training._target_} has no critic; leave it null")
    rebuild.fill_later(module, initial if later else None, given, going_on)
    if initial is not None and cfg.critic_from is not None:
        rebuild.load_critic(module, Path(cfg.critic_from))
    return module, data, codec


def split(cfg: DictConfig) -> bool:
    """Whether networks are split over ranks, and get their weights then."""
    return cfg.trainer.strategy in ("fsdp", "zero3")


def refuse_unfit(cfg: DictConfig, data: pl.LightningDataModule, codec: Any) -> None:
    """ValueError, naming the key, for settings that do not go with the data, the codec or each other."""
    from vgr.training.teacher_paths import refuse_other_shards

    if cfg.model.in_channels != codec.channels:
        raise ValueError(
            f"model.in_channels={cfg.model.in_channels}, but the codec makes {codec.channels} channels: set it so"
        )
    sampled = cfg.sampling.cut_prefix
    if ((marked := cfg.training.get("cut_prefix", sampled)) or "") != (sampled or ""):
        told = f"training.cut_prefix={marked!r}, sampling.cut_prefix={sampled!r}"
        raise ValueError(f"{told}: cuts are sampled as they are trained; set sampling.cut_prefix alone")
    refuse_other_shards(data.train_shards, data.val_shards, cfg.training.get("objective", {}))
    if "fps" in cfg.model and cfg.model.fps != (fps := data.train_shards.manifest["fps"]):
        raise ValueError(f"model.fps={cfg.model.fps:g}, but {cfg.data.train} has {fps:g} frames a second: set it so")
    for name in ("sample", "bench") if "fps" in cfg.model else ():
        if cfg.every[name]:
            raise ValueError(f"every.{name}={cfg.every[name]}: a refiner makes no videos of its own; set it to 0")


def read_teacher(cfg: DictConfig, codec: Any) -> tuple[dict[str, Any], Mapping[str, Tensor] | None]:
    """{"teacher": its model and text encoder} if training takes one; of one that is split, on the meta device, weights.

    Raises ValueError where one is missing, idle, of other chunks than it is asked in or of another codec.
    """
    import inspect

    from hydra.utils import get_class

    from vgr.training.rebuild import rebuild_teacher

    parameter = inspect.signature(get_class(cfg.training._target_)).parameters.get("teacher")
    if cfg.teacher is None and parameter is not None and parameter.default is parameter.empty:
        raise ValueError(f"teacher=null: {cfg.training._target_} needs one; give teacher=<run folder>")
    if cfg.teacher is not None and parameter is None:
        raise ValueError(f"teacher={cfg.teacher}: {cfg.training._target_} has no teacher; leave teacher=null")
    if cfg.teacher is None:
        return {}, None
    causal = cfg.training.get("scores") == "causal" or cfg.training.get("packed")
    chunk = cfg.training.chunk if causal else None
    parts = rebuild_teacher(cfg.teacher, codec, chunk, cfg.training.get("cut_prefix"), filled=not split(cfg))
    return {"teacher": {k: parts[k] for k in ("model", "text")}}, parts.get("initial")


def read_initial(cfg: DictConfig, checkpoint: Path | None) -> Mapping[str, Tensor] | None:
    """The tensors of init_from, the averaged ones of a run, where a run begins with them or adapters sit on them.

    Those of a run for a split model are read when they are asked for. Raises ValueError for `lora` that cannot be and a
    critic_from without a critic, FileNotFoundError for what is not there.
    """
    from vgr.training import checkpoints, rebuild

    if cfg.lora.rank and cfg.init_from is None:
        raise ValueError(f"lora.rank={cfg.lora.rank}: adapters sit on a frozen base; give init_from=<a run or weights>")
    if cfg.lora.rank and (cfg.surgery or cfg.teacher is not None):
        raise ValueError(f"lora.rank={cfg.lora.rank}: a frozen base takes no surgery and no teacher; leave them out")
    if cfg.critic_from is not None and (cfg.teacher is None or cfg.init_from is None):
        raise ValueError(f"critic_from={cfg.critic_from}: a critic follows a student, of a teacher; give both or null")
    if cfg.init_from is None or (checkpoint is not None and not cfg.lora.rank):
        return None
    if not Path(cfg.init_from).exists():
        raise FileNotFoundError(
            f"init_from={cfg.init_from} does not exist; give a run folder, a checkpoint in it, or weights: our export, "
            f"a diffusers folder or a released file. {rebuild.WEIGHTS[cfg.model._target_.split('.')[-1]].HOW_TO_GET}"
        )
    record, initial = rebuild.read(cfg.init_from, whole=not split(cfg) or bool(cfg.surgery))
    if record["model"]["class"] == "Refiner":
        rebuild.refuse_other_refiner(cfg.init_from, record["model"]["config"], cfg.model)
    if cfg.critic_from is not None:
        stored = checkpoints.stored_tensors(checkpoints.resolve(Path(cfg.critic_from)) / "weights")
        if not any(name.startswith("critic.") for name in stored):
            raise ValueError(f"critic_from={cfg.critic_from} holds no critic; give a run of self-forcing")
    return initial


def made_from(
    cfg: DictConfig, config: dict[str, Any], module: callbacks.Training, data: pl.LightningDataModule,
    initial: Mapping[str, Tensor] | None,
) -> dict[str, Any]:  # fmt: skip
    """inputs.json: hashes of the shards, of the weights a run starts from and of its protocol, and its parameters."""
    from vgr.bench import load_protocol
    from vgr.report.sets import fingerprint
    from vgr.training.checkpoints import tensors_hash

    told = {"data.train": fingerprint([shards.manifest for shards in data.train_sets]),
            "data.val": fingerprint([data.val_shards.manifest])}  # fmt: skip
    if initial is not None:
        told["init_from"] = config.get("init_from_sha256") or tensors_hash(initial)
    if cfg.every.bench:
        told["bench"] = load_protocol(cfg.bench)["sha256"]
    return told | {"parameters": sum(p.numel() for part in (module.model, module.text) for p in part.parameters())}


def prepare_run(
    cfg: DictConfig,
    config: dict[str, Any],
    run_dir: Path,
    module: callbacks.Training,
    data: pl.LightningDataModule,
    codec: Any,
    checkpoint: Path | None,
) -> callbacks.BetweenSteps:
    """What happens between steps; makes the run folder, sets module, data and metrics to the checkpoint's position."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    from vgr.bench import bench_between
    from vgr.data.files import write_text
    from vgr.generator import sample_writer
    from vgr.training import callbacks, checkpoints, tracking

    batches = data.val_batches(cfg.data.micro_batch)
    story = data.story and bool(data.val_shards.read(0).meta.get("story"))
    generator = generator_record(cfg, config, module, codec, batches[0]) | {"story": story}
    state = {"samples_seen": 0, "time_s": 0.0} if checkpoint is None else checkpoints.read_state(checkpoint)
    module.samples_seen = state["samples_seen"]
    data.start_batch, data.total_batches = module.step, -(-module.max_samples // module.global_batch)
    rank_zero_only(write_text)(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    if checkpoint is not None:
        rank_zero_only(checkpoints.point_latest)(checkpoint)
    wandb = cfg.wandb if tracking.asked(cfg.logger) else None
    record = tracking.start(run_dir, config, state["samples_seen"], state["time_s"], wandb, print)
    write = sample_writer(generator, codec, batches[0], cfg.seed)
    measure = bench_between(generator, codec, cfg.data.val, cfg.bench) if cfg.every.bench else None
    told = (config, generator, batches, write, measure, cfg.profile, cfg.watchdog_s)
    return callbacks.BetweenSteps(run_dir, checkpoint, record, cfg.every, cfg.keep, *told)


def generator_record(
    cfg: DictConfig, config: dict[str, Any], module: callbacks.Training, codec: Any, batch: VideoBatch
) -> dict[str, Any]:
    """generator.json: everything sampling needs beside the weights."""
    from vgr.types import raw_frames

    frames, height, width = batch.latents.shape[2:]
    parts = {"model": module.model, "text": module.text, "codec": codec}
    base = {"base": cfg.init_from, "folder": str(Path.cwd()), "sha256": config.get("init_from_sha256")}
    return {
        "format": 1,
        **({"lora": {**config["lora"], **base}} if cfg.lora.rank else {}),
        **{k: {"class": getattr(m, "stands_for", type(m).__name__), "config": m.config} for k, m in parts.items()},
        **({"evidence": module.evidence} if hasattr(module, "evidence") else {}),
        "codec_fingerprint": codec.fingerprint,
        "fps": float(batch.fps[0]),
        "intrinsics": batch.cameras.intrinsics[0, 0].tolist(),
        "size_hw": [height * codec.stride[1], width * codec.stride[2]],
        "max_frames": raw_frames(frames, codec.stride[0], codec.clip),
        "chunk": module.chunk,
        "sampling": OmegaConf.to_container(cfg.sampling, resolve=True),
    }


def preset_table() -> str:
    """One paragraph a preset: parameters, devices, memory, needs, and its question; one a study of many arms."""
    from vgr import planner, studies

    rows, arms = [], studies.presets()
    for name in command.presets():
        if name in arms:
            continue
        cfg, header = command.compose("train", [f"experiments={name}"]), command.preset_header(name)
        if (memory := header.get("Memory")) is None:
            held = planner.held(planner.module_of(cfg), planner.Layout())
            memory = f"about {sum(held.values()) / 2**30:.2f} GiB and activations (estimated; plan=true tells them)"
        rows.append(
            f"experiments={name}\n"
            f"  parameters {_parameters(name):.1f} M   devices {header['Hardware']}   memory {memory}\n"
            f"  needs {header['Needs']}   hours {header['Hours']}\n"
            f"  {header['Question']}"
        )
    for study in map(studies.read, studies.names()):
        row = [f"experiments={study.name}/<arm> of {', '.join(arm.name for arm in study.arms)}"]
        for tiny, scale in ((False, study.full), (True, study.tiny)):
            sizes = sorted(_parameters(name) for name in study.presets(tiny))
            told = " to ".join(dict.fromkeys(f"{size:.1f}" for size in (sizes[0], sizes[-1])))
            row.append(f"  {f'<arm>{studies.TINY}: ' * tiny}parameters {told} M   devices {scale.hardware}")
            row.append(f"  needs {scale.needs}   hours {scale.hours} an arm")
        rows.append("\n".join([*row, f"  {study.question}"]))
    return "\n".join(rows)


def _parameters(preset: str) -> float:
    """Millions of them in a preset's model and its own text encoder."""
    import torch
    from hydra.utils import instantiate

    cfg = command.compose("train", [f"experiments={preset}"])
    with torch.device("meta"):
        modules = [instantiate(cfg.model), instantiate(cfg.text)]
    return sum(p.numel() for m in modules for p in m.parameters()) / 1e6


if __name__ == "__main__":
    main()

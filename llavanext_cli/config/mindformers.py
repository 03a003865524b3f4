"""From a preset to MindFormers' complete configuration. No other file spells its keys."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli.config.architecture import PART_PREFIXES, Architecture

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset, Train

DATA_PARALLEL, SEMI_AUTO_PARALLEL = 0, 1
COLUMNS = ("input_ids", "tiles", "feature_index", "labels")
"""What the data set gives to `LlavaNext.construct`, in its order."""


def expand(
    preset: Preset,
    *,
    architecture: Architecture | None = None,
    out: Path | str = "output",
    steps: int | None = None,
    batch: int = 1,
) -> dict[str, Any]:
    """The MindFormers configuration of a preset.

    Args:
        preset: a validated preset.
        architecture: of the checkpoint; None for the preset's own.
        out: folder for everything MindFormers writes.
        steps: optimizer steps of the run; None when the data is not known yet.
        batch: sequences that an ask preset answers at once.

    Returns:
        A mapping of plain values, for YAML or a `MindFormerConfig`.
    """
    on_cpu = preset.runtime.target == "CPU"
    training = preset.task == "train"
    parallel = preset.parallel
    several = parallel.devices > 1
    config: dict[str, Any] = {
        "seed": preset.train.seed if preset.train else 0,
        "output_dir": str(out),
        "run_mode": "train" if training else "predict",
        "use_parallel": several,
        "load_checkpoint": "",
        "auto_trans_ckpt": False,
        "resume_training": False,
        "use_legacy": True,
        "use_legacy_format": True,
        "load_ckpt_format": "safetensors",
        "context": _context(preset),
        "parallel": {
            "parallel_mode": DATA_PARALLEL if on_cpu else SEMI_AUTO_PARALLEL,
            "gradients_mean": False,
            "full_batch": several and not training,
            "enable_parallel_optimizer": parallel.optimizer_sharding and not on_cpu,
            "parallel_optimizer_config": {"gradient_accumulation_shard": _accumulates(preset)},
        },
        "parallel_config": {
            "data_parallel": parallel.data,
            "model_parallel": parallel.tensor,
            "pipeline_stage": parallel.pipeline,
            "micro_batch_num": 1,
            "use_seq_parallel": parallel.tensor > 1 and training,
            "vocab_emb_dp": parallel.tensor == 1,
            "gradient_aggregation_group": 4,
        },
        "micro_batch_interleave_num": 1,
        "recompute_config": {
            "recompute": [preset.train.recompute] if preset.train and preset.train.recompute else False,
            "parallel_optimizer_comm_recompute": True,
            "mp_comm_recompute": True,
            "recompute_slice_activation": True,
        },
        "model": {
            "arch": {"type": "LlavaNext"},
            "model_config": {"type": "LlavaNextConfig", **model_section(preset, architecture or preset.model, batch)},
        },
        "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "llava_next"},
    }
    if not on_cpu and several and training:
        columns = [[parallel.data] + [1] * rank for rank in (1, 4, 1, 1)]
        config["parallel"]["dataset_strategy"] = columns
    if preset.train:
        config |= _training(preset, preset.train, steps)
    return config


def _context(preset: Preset) -> dict[str, Any]:
    context: dict[str, Any] = {"mode": 0, "device_target": preset.runtime.target, "max_call_depth": 10000}
    if preset.runtime.target == "Ascend":
        if preset.runtime.memory:
            context |= {"max_device_memory": preset.runtime.memory, "mempool_block_size": preset.runtime.memory}
        context |= {
            "memory_optimize_level": "O0",
            "jit_config": {"jit_level": "O1" if preset.task == "train" else "O0"},
            "ascend_config": {"precision_mode": "must_keep_origin_dtype"},
        }
    return context


def model_section(preset: Preset, architecture: Architecture, batch: int = 1) -> dict[str, Any]:
    """The arguments of `model.config.LlavaNextConfig`. Arguments as of `expand`."""
    cache, runtime = {}, preset.runtime
    if preset.ask:
        blocks = -(-preset.ask.cache_tokens // preset.ask.block_size)
        cache = {"block_size": preset.ask.block_size, "num_blocks": blocks * batch}
    return {
        "architecture": _plain(asdict(architecture)),
        "target": runtime.target,
        "batch_size": preset.train.batch_size if preset.train else batch,
        "seq_length": preset.ask.cache_tokens if preset.ask else preset.data.seq_length,
        "frames": preset.data.frame_budget,
        "compute_dtype": runtime.compute_dtype,
        "param_init_type": runtime.compute_dtype if runtime.parameter_dtype == "stored" else runtime.parameter_dtype,
        "use_flash_attention": preset.runtime.flash_attention,
        "use_past": preset.ask is not None and preset.runtime.target == "Ascend",  # the CPU has a cache of its own
        "calculate_per_token_loss": _sums_losses(preset),
        "lora": _lora(preset.train) if preset.train else None,
        # MindSpore 2.9.0 does not find the accumulated batches in a graph that is inlined late, except in Llama's.
        "lazy_inline": not _accumulates(preset),
        **cache,
    }


def _sums_losses(preset: Preset) -> bool:
    """Whether the network returns the sum of losses and the number of supervised tokens instead of their quotient.

    Several CPU workers, or several batches before a step, hold different numbers of tokens, so the sums are divided
    when all are known. On Ascend MindSpore averages over all devices.
    """
    return preset.train is not None and (preset.runtime.target == "CPU" or _accumulates(preset))


def _accumulates(preset: Preset) -> bool:
    return preset.train is not None and preset.train.accumulate > 1


def _lora(train: Train) -> dict[str, Any] | None:
    """Read by `model.lora.add_lora`, as MindFormers' own adapters do not fit these cells."""
    return _plain(asdict(train.lora) | {"seed": train.seed}) if train.method == "lora" else None


def _training(preset: Preset, train: Train, steps: int | None) -> dict[str, Any]:
    on_cpu = preset.runtime.target == "CPU"
    return {
        "runner_config": {
            "epochs": 1,
            "batch_size": train.batch_size,
            "gradient_accumulation_steps": train.accumulate,
            "sink_mode": not on_cpu,
            "sink_size": 1,
        },
        "runner_wrapper": {
            "type": "CPUTrainOneStepCell" if on_cpu else "MFTrainOneStepCell",
            "scale_sense": 1.0,
            "use_clip_grad": train.clip_norm is not None,
            "max_grad_norm": train.clip_norm or 1.0,
        },
        "calculate_per_token_loss": _sums_losses(preset),
        "optimizer": {
            "type": "CPUAdamW" if on_cpu and preset.runtime.parameter_dtype == "float32" else "AdamW",
            "betas": list(train.betas),
            "eps": train.epsilon,
            "weight_decay": train.weight_decay,
        },
        **_schedules(train, steps),
        "callbacks": [],
        "monitor_config": {"monitor_on": False},
        "train_dataset": {"batch_size": train.batch_size, "drop_remainder": True, "input_columns": list(COLUMNS)},
        "train_dataset_task": {"type": "CausalLanguageModelDataset"},
    }


def _schedules(train: Train, steps: int | None) -> dict[str, Any]:
    """One schedule; or, where parts have learning rates of their own, a default and one for each other rate."""
    schedule: dict[str, Any] = {
        "learning_rate": train.learning_rate,
        "total_steps": steps if steps is not None else -1,
        "warmup_lr_init": 0.0,
        "warmup_ratio": train.warmup_ratio,
    }
    if train.schedule == "cosine":
        schedule |= {"type": "CosineWithWarmUpLR", "lr_end": train.final_learning_rate}
    else:
        schedule |= {"type": "ConstantWarmUpLR"}
    groups: dict[float, list[str]] = {}
    for part, rate in train.part_rates.items():
        groups.setdefault(rate, []).extend(PART_PREFIXES[part])
    groups.pop(train.learning_rate, None)
    if not groups:
        return {"lr_schedule": schedule}
    grouped = [schedule | {"learning_rate": rate, "params": names} for rate, names in groups.items()]
    return {"grouped_lr_schedule": {"default": schedule, "grouped": grouped}}


def _plain(value: Any) -> Any:
    """Tuples become lists, as YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value

"""The network of a checkpoint on the device of a preset, and the engine that computes with it (cpu.py, ascend.py).

engine.prefill(samples, room, limit, past)   the prompts             -> Step
engine.decode(tokens, lengths)               one more token of each  -> Step
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset
    from llavanext_cli.weights.checkpoint import Checkpoint


def build_engine(
    checkpoint: Checkpoint,
    preset: Preset,
    folder: Path,
    *,
    batch_size: int,
    cache_tokens: int,
    bucket: int,
    cache_step: int,
    verbose: bool,
) -> Any:
    """Load the libraries and the weights; arguments as for `Session`.

    With several devices this runs in each of the workers that msrun started.

    Returns:
        The engine.
    """
    assert preset.ask is not None, "an engine needs an ask preset"
    if preset.runtime.target == "CPU":
        return _build_for_cpu(checkpoint, preset, folder, batch_size, bucket, cache_step, verbose)
    ask = replace(preset.ask, cache_tokens=cache_tokens)
    network = _build_for_ascend(checkpoint, replace(preset, ask=ask), folder, batch_size, verbose)
    from llavanext_cli.inference.ascend import AscendEngine

    return AscendEngine(network, checkpoint.architecture, batch_size, cache_tokens, ask.block_size)


def _build_for_cpu(
    checkpoint: Checkpoint, preset: Preset, folder: Path, batch: int, bucket: int, cache_step: int, verbose: bool
) -> Any:
    from llavanext_cli.model.runtime import load_libraries, share_threads

    workers = preset.parallel.devices
    load_libraries(
        folder, "CPU", threads=share_threads(preset.runtime.threads, workers), mindformers=False, verbose=verbose
    )
    from llavanext_cli.inference.cpu import CpuEngine, worker_parts
    from llavanext_cli.weights.mapped import MappedWeights

    parts = {}
    if workers > 1:
        from mindspore.communication import get_rank, init

        init()
        parts = worker_parts(checkpoint.architecture, get_rank(), workers)
    weights = MappedWeights(checkpoint, parts, keep_wide=preset.runtime.parameter_dtype == "float32")
    return CpuEngine(weights, checkpoint.architecture, batch, bucket, cache_step, workers)


def _build_for_ascend(checkpoint: Checkpoint, preset: Preset, folder: Path, batch_size: int, verbose: bool) -> Any:
    """The same network that simulation compiles."""
    from llavanext_cli.model.runtime import load_libraries

    os.environ["RUN_MODE"] = "predict"  # MindFormers' Llama reads it
    load_libraries(folder, preset.runtime.target, threads=preset.runtime.threads, verbose=verbose)
    from llavanext_cli.model.network import build_preset_network
    from llavanext_cli.weights.checkpoint import load_into

    network = build_preset_network(preset, architecture=checkpoint.architecture, folder=folder, batch=batch_size)[1]
    load_into(network, checkpoint)
    network.set_train(False)
    return network

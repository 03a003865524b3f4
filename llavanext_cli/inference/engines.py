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
    graphs: Path | None,
    verbose: bool,
) -> tuple[Any, Any]:
    """Load the libraries, build the network and load its weights; arguments as for `Session`.

    With several devices this runs in each of the workers that msrun started.

    Returns:
        The engine and its network.
    """
    from llavanext_cli.model.runtime import load_libraries, share_threads

    assert preset.ask is not None, "an engine needs an ask preset"
    on_cpu, workers = preset.runtime.target == "CPU", preset.parallel.devices
    scratch = folder / "graphs" if graphs and on_cpu else None
    if not on_cpu:
        os.environ["RUN_MODE"] = "predict"  # MindFormers' Llama reads it
    threads = share_threads(preset.runtime.threads, workers)
    load_libraries(folder, preset.runtime.target, threads=threads, graphs=scratch, verbose=verbose)
    from llavanext_cli.weights.checkpoint import load_into

    ask = replace(preset.ask, cache_tokens=cache_tokens)
    build = _build_for_cpu if on_cpu else _build_for_ascend
    network = build(replace(preset, ask=ask), checkpoint, folder, batch_size)
    load_into(network, checkpoint)
    network.set_train(False)
    if not on_cpu:
        from llavanext_cli.inference.ascend import AscendEngine

        return AscendEngine(network, checkpoint.architecture, batch_size, cache_tokens, ask.block_size), network

    from llavanext_cli.inference.cpu import CpuEngine
    from llavanext_cli.inference.graphs import GraphStore

    if workers > 1:
        from mindspore.communication import get_rank

        from llavanext_cli.model.backend.sharing import share_layers

        share_layers(network.language_model, get_rank(), workers)
    known = f"{checkpoint.architecture} {preset.runtime}"
    store = GraphStore(graphs, scratch, known) if graphs and scratch else None
    return CpuEngine(network, checkpoint.architecture, batch_size, bucket, cache_step, store, workers), network


def _build_for_cpu(preset: Preset, checkpoint: Checkpoint, folder: Path, batch_size: int) -> Any:
    from mindspore.nn.utils import no_init_parameters

    from llavanext_cli.config.mindformers import model_section
    from llavanext_cli.model.config import LlavaNextConfig
    from llavanext_cli.model.llava_next import LlavaNext

    if preset.parallel.devices > 1:
        from mindspore.communication import init

        init()
    config = LlavaNextConfig(**model_section(preset, checkpoint.architecture, batch_size))
    with no_init_parameters():  # drawing random weights takes longer than loading the real ones
        return LlavaNext(config)


def _build_for_ascend(preset: Preset, checkpoint: Checkpoint, folder: Path, batch_size: int) -> Any:
    """The same network that simulation compiles."""
    from llavanext_cli.model.network import build_preset_network

    network = build_preset_network(preset, architecture=checkpoint.architecture, folder=folder, batch=batch_size)[1]
    return network

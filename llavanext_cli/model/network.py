"""A preset's network on its devices, as every worker builds it and as the simulation compiles it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llavanext_cli.config.architecture import Architecture
    from llavanext_cli.config.schema import Preset


def build_preset_network(
    preset: Preset, *, architecture: Architecture | None, folder: Path, steps: int | None = None, batch: int = 1
) -> tuple[Any, Any]:
    """Set up MindSpore's contexts and build the network. The libraries must be loaded (runtime.py).

    Args:
        preset: for training or asking.
        architecture: the checkpoint's; None for the preset's.
        folder: for everything the libraries write.
        steps: optimizer steps of the run, when it trains.
        batch: sequences answered at once, when it asks.

    Returns:
        MindFormers' configuration and the `LlavaNext`, before weights are loaded and frozen.
    """
    import mindspore as ms
    from mindformers import MindFormerConfig
    from mindformers.core.context import build_context
    from mindformers.core.parallel_config import build_parallel_config
    from mindformers.models.build_model import build_network

    from llavanext_cli.config.mindformers import expand

    config = MindFormerConfig(**expand(preset, architecture=architecture, out=folder, steps=steps, batch=batch))
    build_context(config)
    build_parallel_config(config)
    # Frozen weights are split, too, and a checkpoint needs to know how.
    ms.set_auto_parallel_context(strategy_ckpt_config={"only_trainable_params": False})
    config.model.model_config.parallel_config = config.parallel_config
    ms.set_seed(config.seed)
    return config, build_network(config.model)

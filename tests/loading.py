"""Weights of a checkpoint folder as arrays, for comparisons."""

from pathlib import Path

import numpy as np

from llavanext_cli.weights.checkpoint import Checkpoint, open_checkpoint, read_array


def load_parameters(checkpoint: Checkpoint | str | Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    """All parameters as one type; see `read_array`."""
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    return {name: read_array(spec, dtype) for name, spec in checkpoint.parameters.items()}

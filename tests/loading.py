"""Conversion and loading in one line, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llavanext_cli.weights.checkpoint import Checkpoint, open_checkpoint, read_array
from llavanext_cli.weights.convert import ConvertReport, run_convert
from llavanext_cli.weights.request import ConvertRequest


def convert(
    source: Path | None, destination: Path, progress: Callable[[int, int], None] | None = None, **options: Any
) -> ConvertReport:
    """`run_convert`; see `ConvertRequest` for the options."""
    return run_convert(ConvertRequest(source, destination, **options), progress)


def load_parameters(checkpoint: Checkpoint | str | Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    """All parameters as one type; see `read_array`."""
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    return {name: read_array(spec, dtype) for name, spec in checkpoint.parameters.items()}

"""Tiny folders of weights, made without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.hf_config import architecture_to_hf
from llavanext_cli.weights import keymap
from tests.unit.weights.tiny import TINY, random_tensors, write_hf


@pytest.fixture
def tiny() -> Architecture:
    return TINY


@pytest.fixture
def hub_tensors(tiny: Architecture) -> dict[str, np.ndarray]:
    """A complete model under hub names."""
    return random_tensors(keymap.hub_tensors(tiny))


@pytest.fixture
def hf_folder(tmp_path: Path, tiny: Architecture, hub_tensors: dict[str, np.ndarray]) -> Path:
    return write_hf(tmp_path / "hf", hub_tensors, architecture_to_hf(tiny))


@pytest.fixture
def make_hf(tmp_path: Path, tiny: Architecture) -> Callable[..., Path]:
    """Make a Hugging Face folder from tensors, with fields of the architecture changed."""

    def make(tensors: dict[str, np.ndarray], name: str = "made", **changes: object) -> Path:
        return write_hf(tmp_path / name, tensors, architecture_to_hf(replace(tiny, **changes)))

    return make


@pytest.fixture
def no_leftovers(tmp_path: Path) -> Callable[[], list[str]]:
    """Names in tmp_path that a failed conversion should not have left."""
    return lambda: sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".") or p.name == "out")

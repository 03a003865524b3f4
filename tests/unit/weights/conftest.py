"""Tiny folders of weights, made without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.hf_config import architecture_to_hf
from llavanext_cli.errors import LlavaNextError
from llavanext_cli.weights import keymap
from tests.loading import convert
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
def refused(tmp_path: Path) -> Callable[..., LlavaNextError]:
    """`refused(source, match, …)` converts to tmp_path / "out", which must fail and leave nothing behind."""

    def refuse(source: Path | None, match: str, **options: object) -> LlavaNextError:
        with pytest.raises(LlavaNextError, match=match) as caught:
            convert(source, tmp_path / "out", **options)
        assert not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists() and caught.value.hint
        return caught.value

    return refuse

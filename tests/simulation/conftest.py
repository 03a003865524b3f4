"""Compiles of presets in MindSpore's simulation mode, each made once for all tests that look at it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llavanext_cli.simulation.simulate import SimulationReport, simulate

Compile = Callable[..., SimulationReport]


def has_ascend_plugin() -> bool:
    spec = importlib.util.find_spec("mindspore")
    return bool(spec and (Path(spec.origin).parent / "lib" / "plugin" / "ascend").is_dir())


@pytest.fixture(scope="session", autouse=True)
def ascend_plugin() -> None:
    """Only a MindSpore without its Ascend plugin (macOS, Windows) excuses these tests; a missing compiler does not."""
    if not has_ascend_plugin():
        pytest.skip("NOT CHECKED: this platform's MindSpore has no Ascend plugin, no preset can be compiled for NPUs")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """`compiled(preset, *settings, layers=2)`: the report; its folder keeps the graph after parallel planning."""
    made: dict[tuple, SimulationReport] = {}

    def compile_preset(preset: str, *settings: str, layers: int | None = 2, **options) -> SimulationReport:
        key = (preset, settings, layers, *options.items())
        if key not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))
                patch.setenv("MS_DEV_SAVE_GRAPHS", "2")
                patch.setenv("MS_DEV_DUMP_IR_PASSES", "validate")
                made[key] = simulate(
                    preset,
                    folder=tmp_path_factory.mktemp("compile"),
                    overrides=settings,
                    layers=layers,
                    **options,
                )
        return made[key]

    return compile_preset

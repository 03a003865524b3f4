"""Compiles of presets in MindSpore's simulation mode, each made once for all tests that look at it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llavanext_cli.simulation.simulate import WORKER, CompileRequest, SimulationReport, simulate

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
    reports: dict[tuple, SimulationReport] = {}

    def compile_preset(
        preset: str, *settings: str, layers: int | None = 2, worker: Path = WORKER, **options
    ) -> SimulationReport:
        request = CompileRequest(preset, settings, layers=layers, **options)
        if (request, worker) not in reports:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))
                patch.setenv("MS_DEV_SAVE_GRAPHS", "2")
                patch.setenv("MS_DEV_DUMP_IR_PASSES", "validate")
                reports[request, worker] = simulate(request, tmp_path_factory.mktemp("compile"), worker)
        return reports[request, worker]

    return compile_preset

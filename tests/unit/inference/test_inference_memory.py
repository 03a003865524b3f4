"""What answering on a CPU takes, against what is free."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.presets import load_preset
from llavanext_cli.errors import RuntimeMissingError
from llavanext_cli.inference import memory
from llavanext_cli.inference.memory import check_ask_memory, plan_ask_memory
from llavanext_cli.machine.memory import available_memory
from llavanext_cli.weights.keymap import expected_parameters

GB = 1 << 30


def plan(dtype: str, batch: int = 1, overrides: tuple[str, ...] = ()):
    """Of the published 7B with weights of one type."""
    specs = {
        name: SimpleNamespace(name=name, dtype=dtype, shape=shape, nbytes=2)
        for name, shape in expected_parameters(Architecture()).items()
    }
    checkpoint = SimpleNamespace(architecture=Architecture(), parameters=specs)
    return plan_ask_memory(checkpoint, load_preset("video-7b-ask-cpu", overrides), batch, 2560)


def test_the_parts_of_a_7b(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 20 * GB)
    half, wide = plan("BF16"), plan("F32")
    assert half.parts["cache"] == 2 * 32 * 32 * 128 * 2560 * 4
    assert 1.5 * GB < half.parts["weights"] < 1.7 * GB  # two layers in float32
    assert wide.parts["weights"] == 0  # mapped
    assert half.total < 6 * GB
    check_ask_memory(half)
    kept = plan("BF16", overrides=("runtime.parameter_dtype=float32",))
    with pytest.raises(
        RuntimeMissingError, match=r"asking needs 3\d(\.\d)? GB of memory \(.*\), but only 20 GB are free"
    ) as fault:
        check_ask_memory(kept)
    assert "runtime.parameter_dtype=stored" in fault.value.hint
    with pytest.raises(RuntimeMissingError) as fault:
        check_ask_memory(plan("BF16", batch=64))
    assert "--batch-size" in fault.value.hint


def test_a_container_has_less_than_its_machine(tmp_path: Path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       32000000 kB\nMemAvailable:   16000000 kB\n")
    assert available_memory(meminfo, tmp_path) == 16_000_000 * 1024
    for name, text in {"memory.max": "max", "memory.current": "5", "memory.stat": "inactive_file 1\n"}.items():
        (tmp_path / name).write_text(text)
    assert available_memory(meminfo, tmp_path) == 16_000_000 * 1024
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000000\n")
    assert available_memory(meminfo, tmp_path) == 1_500_000_000


def test_this_machine_has_memory():
    total = re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())
    assert total and 0 < available_memory() <= int(total[1]) * 1024

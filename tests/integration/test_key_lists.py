"""The committed lists of full-size names are made again by their own script."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ASSETS = Path(__file__).parents[1] / "assets" / "weights"


def test_the_lists_are_what_transformers_builds(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("make_key_lists", ASSETS / "make_key_lists.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.write_lists(tmp_path)
    assert {p.name for p in made} == {p.name for p in ASSETS.glob("*.txt")} and len(made) == 5
    for path in made:
        assert path.read_text() == (ASSETS / path.name).read_text()

"""Copies of presets, and where the presets are looked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import llavanext_cli.config.presets as presets
from llavanext_cli.config.presets import load_preset
from llavanext_cli.config.writing import copy_preset, preset_to_dict
from llavanext_cli.errors import ConfigError


def test_a_copy_loads_as_the_original_and_names_itself(tmp_path):
    target = copy_preset("tiny-ask", tmp_path / "my preset.yaml")
    assert preset_to_dict(load_preset(target)) == preset_to_dict(load_preset("tiny-ask"))
    assert target.read_text().splitlines()[0].endswith(f"--preset {target}")
    assert [path.name for path in tmp_path.iterdir()] == ["my preset.yaml"]


def test_a_copy_into_a_folder(tmp_path):
    assert copy_preset("tiny-ask", tmp_path) == tmp_path / "tiny-ask.yaml"


def test_a_copy_replaces_nothing_unless_forced(tmp_path):
    target = tmp_path / "mine.yaml"
    target.write_text("precious")
    with pytest.raises(ConfigError, match="is already there") as caught:
        copy_preset("tiny-ask", target)
    assert "--force" in caught.value.hint
    assert target.read_text() == "precious"
    copy_preset("tiny-ask", target, force=True)
    assert "extends: base/tiny" in target.read_text()
    assert list(tmp_path.iterdir()) == [target]


def test_a_copy_to_nowhere_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        copy_preset("tiny-ask", tmp_path / "missing" / "mine.yaml")
    with pytest.raises(ConfigError, match="no preset named 'tiny-aks'"):
        copy_preset("tiny-aks", tmp_path / "mine.yaml")
    assert list(tmp_path.iterdir()) == []


def test_presets_are_found_in_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "llavanext_cli"
    shutil.copytree(presets.presets_folder(), package / "presets")
    monkeypatch.setattr(presets, "__file__", str(package / "config" / "presets.py"))
    assert presets.presets_folder() == package / "presets"
    assert load_preset("tiny-ask").path.is_relative_to(package)


def test_a_damaged_installation_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "__file__", str(tmp_path / "llavanext_cli" / "config" / "presets.py"))
    with pytest.raises(ConfigError, match="the presets are missing") as caught:
        load_preset("tiny-ask")
    assert "reinstall" in caught.value.hint


def test_the_wheel_carries_the_presets():
    text = (Path(presets.__file__).parents[2] / "pyproject.toml").read_text()
    assert 'presets = "llavanext_cli/presets"' in text

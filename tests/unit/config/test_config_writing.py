"""Copies of presets, and where the presets are looked for."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

import llavanext_cli.config.shipped as shipped
from llavanext_cli.config.presets import load_preset
from llavanext_cli.config.writing import copy_preset, preset_to_dict
from llavanext_cli.errors import ConfigError, LlavaNextError


def test_a_copy_loads_as_the_original_and_names_itself(tmp_path):
    target = copy_preset("tiny-ask", tmp_path / "my preset.yaml")
    assert preset_to_dict(load_preset(target)) == preset_to_dict(load_preset("tiny-ask"))
    assert target.read_text().splitlines()[0].endswith(f"--preset {target}")
    assert [path.name for path in tmp_path.iterdir()] == ["my preset.yaml"]


def test_a_copy_into_a_folder(tmp_path):
    assert copy_preset("tiny-ask", tmp_path) == tmp_path / "tiny-ask.yaml"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("mine.yaml", "mine.yaml already holds a preset", "add --force to replace it, or choose another file"),
        ("notes.txt", "notes.txt exists and is not a preset", "choose another file"),
        ("missing/mine.yaml", "the folder .*/missing does not exist", "mkdir -p "),
        ("pipe", "pipe is a device or a pipe, not a file", "choose another file"),
        ("link", "link is a broken link", "choose another file"),
        ("", "tiny-ask.yaml is a folder, not a file", "choose another file"),
    ],
)
def test_a_copy_replaces_nothing(tmp_path, name, message, hint):
    for file in ("mine.yaml", "notes.txt"):
        (tmp_path / file).write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "tiny-ask.yaml").mkdir()
    before = {path: path.lstat() for path in tmp_path.iterdir()}
    with pytest.raises(LlavaNextError, match=message) as caught:
        copy_preset("tiny-ask", tmp_path / name)
    assert caught.value.hint.startswith(hint)
    assert {path: path.lstat() for path in tmp_path.iterdir()} == before


def test_force_replaces_a_preset(tmp_path):
    target = tmp_path / "mine.yaml"
    target.write_text("old")
    copy_preset("tiny-ask", target, force=True)
    assert "extends: base/tiny" in target.read_text()
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_reported_with_the_name_that_was_given(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"/mine.yaml cannot be written: No space left on device"):
        copy_preset("tiny-ask", tmp_path / "mine.yaml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x93\xff\x00", "it is not UTF-8 text"),
        (b"a: &x [*x]\n", "anchors and aliases are not supported"),
        (b"", "is empty"),
    ],
)
def test_a_file_that_is_not_yaml_is_not_copied(tmp_path, data, what):
    source = tmp_path / "odd.yaml"
    source.write_bytes(data)
    with pytest.raises(ConfigError, match=what):
        copy_preset(str(source), tmp_path / "mine.yaml")
    assert list(tmp_path.iterdir()) == [source]


def test_a_preset_with_unknown_keys_is_copied(tmp_path):
    source = tmp_path / "odd.yaml"
    source.write_text("trian: {epohcs: 1}\n")
    assert copy_preset(str(source), tmp_path / "mine.yaml").read_text() == source.read_text()


def test_presets_are_found_in_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "llavanext_cli"
    shutil.copytree(shipped.presets_folder(), package / "presets")
    monkeypatch.setattr(shipped, "__file__", str(package / "config" / "shipped.py"))
    assert shipped.presets_folder() == package / "presets"
    assert load_preset("tiny-ask").path.is_relative_to(package)


def test_a_damaged_installation_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "llavanext_cli" / "config" / "shipped.py"))
    with pytest.raises(ConfigError, match="the presets are missing") as caught:
        load_preset("tiny-ask")
    assert "reinstall" in caught.value.hint


def test_the_wheel_carries_the_presets():
    text = (Path(shipped.__file__).parents[2] / "pyproject.toml").read_text()
    assert 'presets = "llavanext_cli/presets"' in text

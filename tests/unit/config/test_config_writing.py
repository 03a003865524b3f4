"""Copies of presets, and where the presets are looked for."""

from __future__ import annotations

import errno
import os
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
    missing = tmp_path / "not there"
    with pytest.raises(ConfigError, match=f"mine.yaml: there is no folder {missing}$") as caught:
        copy_preset("tiny-ask", missing / "mine.yaml")
    assert caught.value.hint == f"Make it first: mkdir -p '{missing}'"
    with pytest.raises(ConfigError, match="no preset named 'tiny-aks'"):
        copy_preset("tiny-aks", tmp_path / "mine.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_the_name_that_was_given(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"/mine.yaml cannot be written: No space left on device") as caught:
        copy_preset("tiny-ask", tmp_path / "mine.yaml")
    assert "there is room" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
def test_only_a_file_is_replaced(tmp_path, force):
    pipe, loop, device, folder = (tmp_path / name for name in ("pipe", "loop", "device", "tiny-ask.yaml"))
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    device.symlink_to("/dev/null")
    folder.mkdir()
    before = {path: path.lstat() for path in tmp_path.iterdir()}
    for target, what in (
        (pipe, f"{pipe} is a device or a pipe, not a file"),
        (loop, f"{loop} is a broken link, not a file"),
        (device, f"{device} is a device or a pipe, not a file"),
        (tmp_path, f"{folder} is a folder, not a file"),
    ):
        with pytest.raises(ConfigError) as caught:
            copy_preset("tiny-ask", target, force)
        assert (caught.value.what, caught.value.hint) == (what, "Choose another file.")
    assert {path: path.lstat() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x93\xff\x00", "it is not UTF-8 text"),
        (b"a: &x [*x]\n", "anchors and aliases are not read here"),
        (b"", "is empty"),
    ],
)
def test_what_is_no_yaml_is_not_copied(tmp_path, data, what):
    source = tmp_path / "odd.yaml"
    source.write_bytes(data)
    with pytest.raises(ConfigError, match=what):
        copy_preset(str(source), tmp_path / "mine.yaml")
    assert list(tmp_path.iterdir()) == [source]


def test_a_preset_with_wrong_keys_is_copied_to_be_mended(tmp_path):
    source = tmp_path / "odd.yaml"
    source.write_text("trian: {epohcs: 1}\n")
    assert copy_preset(str(source), tmp_path / "mine.yaml").read_text() == source.read_text()


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

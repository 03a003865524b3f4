"""Stubs of CANN: they are built once, and an error says why they cannot be built."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from llavanext_cli.errors import RuntimeMissingError
from llavanext_cli.simulation import cann_stubs


@pytest.fixture
def no_cann(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    monkeypatch.setattr(cann_stubs, "SYSTEM_CANN", tmp_path / "nowhere")


@pytest.fixture
def mindspore(tmp_path: Path) -> Path:
    """A MindSpore of one plugin library that needs one function of CANN, and looks another up by its name."""
    folder = tmp_path / "mindspore"
    plugin = folder / "lib" / "plugin"
    (plugin / "ascend").mkdir(parents=True)
    (folder / "version.py").write_text("__version__ = '0'")
    (folder / ".commit_id").write_text("0")
    source = tmp_path / "plugin.c"
    source.write_text(
        'int needed_of_cann(void); const char* text = "aclrtLookedUp"; int f(void){return needed_of_cann();}'
    )
    cann_stubs._run(["gcc", "-shared", "-fPIC", "-o", str(plugin / "libmindspore_ascend.so.2"), str(source)])
    return folder


def test_every_missing_function_gets_a_body_that_returns_0(mindspore: Path, tmp_path: Path):
    folder = cann_stubs.build_stubs(mindspore, tmp_path / "cache")
    library = ctypes.CDLL(str(folder / "ascend-toolkit/latest/cann/lib64/libascendcl.so"))
    assert library.needed_of_cann() == 0
    assert library.aclrtLookedUp() == 0
    count = ctypes.c_uint32()
    assert library.aclrtGetDeviceCount(ctypes.byref(count)) == 0
    assert count.value == 8
    assert (folder / "ascend-toolkit/latest/cann/lib64/libhccl.so").resolve().name == "libascendcl.so"
    assert os.listdir(tmp_path / "cache") == [folder.name]


def test_they_are_built_once_for_a_version(mindspore: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = cann_stubs.build_stubs(mindspore, tmp_path / "cache")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cann_stubs.build_stubs(mindspore, tmp_path / "cache") == first
    (mindspore / "version.py").write_text("__version__ = '1'")
    with pytest.raises(RuntimeMissingError, match="gcc is not installed"):
        cann_stubs.build_stubs(mindspore, tmp_path / "cache")


def test_a_compiler_that_fails_is_quoted(mindspore: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cann_stubs, "WITH_RESULTS", {"f": "this is not C;"})
    with pytest.raises(RuntimeMissingError, match="gcc cannot build stubs for CANN: "):
        cann_stubs.build_stubs(mindspore, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_written(mindspore: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeMissingError) as caught:
        cann_stubs.build_stubs(mindspore, tmp_path / "file")
    assert "XDG_CACHE_HOME" in caught.value.hint


def test_a_mindspore_without_the_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(cann_stubs.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(RuntimeMissingError, match="Ascend plugin is missing"):
        cann_stubs.find_mindspore()
    monkeypatch.setattr(cann_stubs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeMissingError, match="MindSpore is not installed"):
        cann_stubs.find_mindspore()


@pytest.mark.usefixtures("no_cann")
def test_cann_itself_is_used_when_it_is_set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "cann" / "lib64").mkdir(parents=True)
    (tmp_path / "cann" / "lib64" / "libascendcl.so").touch()
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann"))
    found = cann_stubs.simulation_environment(tmp_path / "cache")
    assert not found.cann_stubs
    assert found.variables == {"MS_SIMULATION_LEVEL": "0"}
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("no_cann")
def test_cann_that_is_installed_but_not_set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "set_env.sh").touch()
    monkeypatch.setattr(cann_stubs, "SYSTEM_CANN", tmp_path)
    with pytest.raises(RuntimeMissingError) as caught:
        cann_stubs.simulation_environment(tmp_path / "cache")
    assert caught.value.hint == f"run `source {tmp_path}/set_env.sh`"

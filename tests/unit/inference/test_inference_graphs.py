"""Graphs that are kept: taken from the store and put there, and never a reason to fail."""

import errno
import shutil

import pytest

from llavanext_cli.inference.graphs import DEPENDENCIES, GraphStore


def compile_once(store, scratch) -> bool:
    """Whether the graph was in the scratch folder when MindSpore looked for it."""
    made = GraphStore(store, scratch, "a model")
    with made.compiling("shapes"):
        (file,) = list(made.scratch.glob("*.mindir")) or [None]
        if file is None:
            (made.scratch / DEPENDENCIES).write_text("versions")
            (made.scratch / f"compile_cache_{GraphStore.compiled - 1}.mindir").write_text("graph")
    assert not list(made.scratch.glob("*.mindir"))
    return file is not None


def test_a_graph_is_compiled_once(tmp_path):
    assert [compile_once(tmp_path / "store", tmp_path / f"{run}") for run in range(3)] == [False, True, True]


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "evicted"), OSError(errno.ENOSPC, "disk full")])
def test_a_graph_that_cannot_be_copied_is_compiled_again(tmp_path, monkeypatch, error):
    compile_once(tmp_path / "store", tmp_path / "0")
    copy = shutil.copyfile

    def half(source, target):
        if tmp_path / "1" in target.parents:
            target.write_text("gra")
            raise error
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", half)
    assert not compile_once(tmp_path / "store", tmp_path / "1")

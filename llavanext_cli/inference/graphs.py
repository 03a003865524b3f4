"""Compiled graphs that outlive the process: MindSpore's compile cache, made safe for many shapes.

MindSpore keeps the n-th graph that a process compiles as `compile_cache_n.mindir`, and the n-th graph of the next
process is read from that file, whatever its shapes are. So each process gets a scratch folder of its own, and a store
that all processes share names graphs by a digest of everything that shaped them. Before a graph is compiled, it is
copied from the store to the scratch folder under its number; a new graph is copied to the store afterwards.

    store/    compile_dependency.hash  <digest>.mindir …     all processes; may be deleted at any time
    scratch/rank_0/graph_cache/  compile_cache_<n>.mindir    this process alone
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llavanext_cli import __version__

DEPENDENCIES = "compile_dependency.hash"
MOST_GRAPHS = 200
"""Graphs that are kept; the oldest are deleted first."""


class GraphStore:
    """Copies graphs from the store to MindSpore and back.

    Args:
        store: folder of all processes.
        scratch: `MS_COMPILER_CACHE_PATH` of this process.
        model: everything that decides what a graph computes, except its shapes, as text.
    """

    compiled = 0
    """Graphs that this process has compiled so far: the number of the next one."""

    def __init__(self, store: Path, scratch: Path, model: str):
        self.scratch = scratch / "rank_0" / "graph_cache"
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.model = f"{__version__} {_sources()} {model}"
        self.store = store
        self.known: set[str] = set()
        _copy(store / DEPENDENCIES, self.scratch / DEPENDENCIES)

    @contextmanager
    def compiling(self, key: str) -> Iterator[None]:
        """Around the call of a graph; `key` names its shapes."""
        if key in self.known:
            yield
            return
        number = self.scratch / f"compile_cache_{GraphStore.compiled}.mindir"
        GraphStore.compiled += 1
        self.known.add(key)
        kept = self.store / (hashlib.sha256(f"{self.model} {key}".encode()).hexdigest()[:32] + ".mindir")
        had = _copy(kept, number)
        yield
        if not had and number.is_file():
            self._keep(number, kept)
        number.unlink(missing_ok=True)

    def _keep(self, file: Path, kept: Path) -> None:
        """A store that cannot be written only makes the next start slower."""
        try:
            self.store.mkdir(parents=True, exist_ok=True)
            old = sorted(self.store.glob("*.mindir"), key=lambda path: path.stat().st_mtime)
            for path in old[: max(0, len(old) + 1 - MOST_GRAPHS)]:
                path.unlink(missing_ok=True)
            for source, target in ((self.scratch / DEPENDENCIES, self.store / DEPENDENCIES), (file, kept)):
                temporary = target.with_name(f".{target.name}.{os.getpid()}")
                shutil.copyfile(source, temporary)
                temporary.replace(target)
        except OSError:
            return


def _copy(source: Path, target: Path) -> bool:
    """Whether a file exists and was copied completely. Another process may just have deleted it."""
    try:
        shutil.copyfile(source, target)
        return True
    except OSError:
        target.unlink(missing_ok=True)
        return False


def _sources() -> str:
    """A digest of the code that graphs are compiled from."""
    from importlib.metadata import version

    folder = Path(__file__).parents[1] / "model"
    digest = hashlib.sha256(version("mindspore").encode() + version("mindformers").encode())
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]

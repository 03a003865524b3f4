"""The floors of the package, and what `--help` may load: read from the syntax tree of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llavanext_cli
from llavanext_cli import errors

PACKAGE = Path(llavanext_cli.__file__).parent
FLOORS = (
    ("errors",),
    ("config", "files", "machine", "plots", "records", "signals", "units"),
    ("processing", "mixing", "fetching"),
    ("model", "scoring", "weights"),
    ("launching",),
    ("training", "inference"),
    ("simulation",),
    ("demo",),
    ("app", "commands", "console", "options", "__main__"),
)
"""Folders and files of the package, lowest first. A file imports from its own floor and those below."""
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
TOP = len(FLOORS) - 1
HEAVY = {
    "numpy",
    "PIL",
    "mindspore",
    "mindformers",
    "transformers",
    "torch",
    "sentencepiece",
    "safetensors",
    "huggingface_hub",
    "av",
    "decord",
    "cv2",
    "pyarrow",
}


def modules() -> dict[str, Path]:
    """Dotted name → file of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(tree: ast.AST, module: str, only_at_start: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import; of `from a import b` both a and a.b.

    Args:
        only_at_start: leave out what is inside functions or under `if TYPE_CHECKING`.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: imports are absolute here"
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif only_at_start and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        elif only_at_start and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imports(other, module, only_at_start)
        else:
            yield from imports(node, module, only_at_start)


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def part(module: str) -> str:
    """`llavanext_cli.model.backend.cpu` belongs to "model"; the package itself to no floor."""
    return module.split(".")[1] if "." in module else ""


def files_imported_by(module: str) -> set[str]:
    """Files of the package that a file imports anywhere, inside functions and for types too."""
    names = {name for _, name in imports(tree_of(module), module)}
    return {name for name in names if name in MODULES} - {module, "llavanext_cli"}


def test_every_folder_and_file_has_a_floor():
    assert len(MODULES) > 20
    assert {part(module) for module in MODULES} - {""} == set(FLOOR)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    wrong = [
        f"line {line}: {name}"
        for line, name in imports(tree_of(module), module)
        if name.startswith("llavanext_cli.") and FLOOR.get(part(name), 0) > FLOOR.get(part(module), 0)
    ]
    assert not wrong


def test_neighbours_on_a_floor_import_in_one_direction_only():
    """Some folders share a floor, as training and inference do: between two of them there is at most one direction."""
    arrows = {(part(a), part(b)) for a in MODULES for b in files_imported_by(a)}
    assert not {frozenset(arrow) for arrow in arrows if arrow[0] != arrow[1] and arrow[::-1] in arrows}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of two or more nodes of a graph that reach each other."""
    reached = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for node in graph[waiting.pop()] - seen:
                seen.add(node)
                waiting.append(node)
        reached[start] = seen
    found = {frozenset({a, *(b for b in reached[a] if a in reached[b])}) for a in graph if a in reached[a]}
    return [set(circle) for circle in found]


def test_no_files_import_each_other():
    assert circles({module: files_imported_by(module) for module in MODULES}) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
    assert circles({"a": {"b"}, "b": set()}) == []


@pytest.mark.parametrize("module", sorted(m for m in MODULES if part(m) == "processing"))
def test_processing_does_not_know_the_model(module):
    assert not [name for _, name in imports(tree_of(module), module) if part(name) in ("model", "weights")]


def loaded_with(*starts: str) -> dict[str, str]:
    """Every module that importing `starts` imports with it → the module that imports it."""
    found = {start: "" for start in starts}
    waiting = list(starts)
    while waiting:
        module = waiting.pop()
        names = [name for _, name in imports(tree_of(module), module, only_at_start=True)] if module in MODULES else []
        names += [module.rpartition(".")[0]] if "." in module else []  # a package is imported before what is in it
        for name in names:
            if name not in found and (name in MODULES or not name.startswith("llavanext_cli")):
                found[name] = module
                waiting.append(name)
    return found


def test_nothing_heavy_is_imported_on_the_way_to_help():
    commands = [module for module in MODULES if part(module) == "commands"]
    assert len(commands) > 1
    loaded = loaded_with("llavanext_cli.app", *commands)
    assert "typer" in loaded
    heavy = {name: importer for name, importer in loaded.items() if name.split(".")[0] in HEAVY}
    assert not heavy


@pytest.mark.parametrize("module", sorted(m for m in MODULES if FLOOR.get(part(m), 0) < TOP))
def test_nothing_below_the_commands_prints_or_uses_typer(module):
    tree = tree_of(module)
    printed = [
        f"line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "input")
    ]
    assert not printed
    assert not [name for _, name in imports(tree, module) if name.split(".")[0] in ("typer", "rich")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import numpy", ["numpy"]),
        ("def f():\n    import numpy", []),
        ("class A:\n    import numpy", ["numpy"]),
        ("try:\n    import numpy\nexcept ImportError:\n    pass", ["numpy"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy", ["typing", "typing.TYPE_CHECKING"]),
        ("from a.b import c", ["a.b", "a.b.c"]),
    ],
)
def test_imports_at_the_start_of_a_file(source, expected):
    assert [name for _, name in imports(ast.parse(source), "m", only_at_start=True)] == expected


def test_imports_inside_functions():
    assert [name for _, name in imports(ast.parse("def f():\n    import numpy"), "m")] == ["numpy"]


def test_every_error_has_a_hint() -> None:
    families = {name for name, kind in vars(errors).items() if isinstance(kind, type)} - {"RunStoppedError"}
    raised, bare = 0, []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in families:
                raised += 1
                if len(node.args) < 2 and not any(keyword.arg == "hint" for keyword in node.keywords):
                    bare.append(f"{path.name}: {ast.unparse(node)}")
    assert raised
    assert not bare

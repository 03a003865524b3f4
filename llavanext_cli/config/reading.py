"""YAML text → nested values with the line of every key → frozen dataclasses, with every problem collected.

Only the plain part of YAML is read: mappings, lists, strings, numbers in the 1.2 spelling (so `2e-6` is a number, and
`no` and `1:30` are text), true, false and null. A key that stands twice, an anchor or a tag is an error.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

import yaml

from llavanext_cli.errors import ConfigError

MAX_DEPTH = 20
"""Deepest nesting that is read; a preset has four levels."""


class _Loader(yaml.SafeLoader):
    """Composes nodes; resolves plain scalars as YAML 1.2's core schema does."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the base class declares it so

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs leave it untyped
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read here", event.start_mark)
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9][0-9_]{0,30}", lambda text: int(text)),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    "str": (r"(?s).*", str),
}
_TAG = "tag:yaml.org,2002:"
for _name in ("null", "bool", "int", "float"):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_SCALARS[_name][0]})$"), None)


@dataclass(frozen=True)
class Problem:
    """One fault of a preset: where it stands ("my.yaml, line 7"), its dotted key, and what is wrong."""

    where: str
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.text) if part)


@dataclass(frozen=True)
class Document:
    """Nested values, and for each dotted key where it was given."""

    values: dict[str, Any]
    origins: dict[str, str]

    def updated(self, other: Document) -> Document:
        """This document with the other's values on top: mappings are merged key by key, anything else replaced."""
        return Document(_merged(self.values, other.values), self.origins | other.origins)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        result[key] = _merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return result


PRESET_HINT = "`llavanext presets copy NAME FILE` makes a preset to start from."


def load_yaml(path: Path, hint: str = PRESET_HINT) -> Document:
    """Read a YAML file whose top is a mapping.

    Args:
        hint: what to do when it is something else.

    Raises:
        ConfigError: the file cannot be read, is not YAML (with line and column), or repeats a key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path} cannot be read: {reason}") from fault
    origins: dict[str, str] = {}
    values = parse_yaml(text, str(path), origins)
    if values is None:
        raise ConfigError(f"{path} is empty", hint)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a mapping of keys to values is expected, not {_shown(values)}", hint)
    return Document(values, origins)


def parse_yaml(text: str, where: str, origins: dict[str, str] | None = None) -> Any:
    """Parse YAML text.

    Args:
        where: name of the text, for messages.
        origins: filled with "WHERE, line N" for each dotted key.

    Raises:
        ConfigError: not YAML, or something in it is not read here; with line and column.
    """
    problems: list[str] = []
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        value = None if node is None else _value(node, where, "", origins if origins is not None else {}, problems)
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise ConfigError(f"{place}: {fault.problem or fault.context}") from fault
    except yaml.YAMLError as fault:  # a character that YAML does not allow
        raise ConfigError(f"{where}: not YAML: {str(fault).splitlines()[0]}") from fault
    if problems:
        raise ConfigError(f"{where} is not read", details=problems)
    return value


def _value(node: Any, where: str, key: str, origins: dict[str, str], problems: list[str]) -> Any:
    place = f"{where}, line {node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, where, f"{key}.{number}", origins, problems) for number, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = f"{where}, line {key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(f"{line}: a key must be a word")
                continue
            name = str(key_node.value)
            dotted = f"{key}.{name}" if key else name
            if name in result:
                problems.append(f"{origins[dotted]}, and {line}: {dotted} is given twice")
            origins[dotted] = line
            result[name] = _value(value_node, where, dotted, origins, problems)
        return result
    scalar = _SCALARS.get(node.tag.removeprefix(_TAG))
    if scalar is None or not re.fullmatch(scalar[0], node.value):
        problems.append(": ".join(filter(None, (place, key, f"the tag {node.tag} is not read here"))))
        return None
    return scalar[1](node.value)


# ---------------------------------------------------------------------------------------------- values → dataclasses


def setting(
    default: Any = dataclasses.MISSING,
    *,
    doc: str,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    task: str | None = None,
) -> Any:
    """A dataclass field that a user may set.

    Args:
        default: its value when it is not given; without one it is required.
        doc: what it is, with its unit.
        least, most, above, below: bounds of the number (or of each number of a list), the first two included.
        task: the only task that reads it.
    """
    metadata = {"doc": doc, "least": least, "most": most, "above": above, "below": below, "task": task}
    if isinstance(default, tuple) or default is dataclasses.MISSING or default.__hash__:
        return field(default=default, metadata=metadata)
    raise TypeError("a setting's default must not be mutable")


class Mismatch(Exception):
    """A value that a field cannot take; the text says what it can."""


@cache
def hints(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields."""
    return get_type_hints(cls)


def is_section(kind: Any) -> TypeGuard[type]:
    """Whether a field's type is a dataclass, a mapping with keys of its own."""
    return dataclasses.is_dataclass(kind)


class Builder:
    """Turns a document into dataclasses and keeps the problems found on the way."""

    def __init__(self, document: Document, name: str):
        self.document, self.name = document, name
        self.problems: list[Problem] = []

    def add(self, key: str, text: str) -> None:
        """Note a problem; its place is that of the key, or of the nearest key above it."""
        self.problems.append(Problem(self.where(key), key, text))

    def where(self, key: str) -> str:
        while key and key not in self.document.origins:
            key = key.rpartition(".")[0]
        return self.document.origins.get(key, self.name)

    def build(self, cls: type, values: Any, prefix: str = "", known: Iterable[str] = ()) -> Any:
        """One dataclass from one mapping; a field with a problem takes its default, or None.

        Args:
            values: the mapping; None stands for an empty one.
            prefix: dotted key of the mapping.
            known: every dotted key of the whole document, to suggest from.
        """
        if values is None:
            values = {}
        if not isinstance(values, dict):
            self.add(prefix, f"expected a mapping of keys to values, not {_shown(values)}")
            values = {}
        names = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                self.add(_join(prefix, name), "unknown key" + suggestion(name, names, prefix, known))
        chosen = {}
        for f in dataclasses.fields(cls):
            chosen[f.name] = self._field(cls, f, values, _join(prefix, f.name), known)
        return cls(**chosen)

    def _field(
        self, cls: type, f: dataclasses.Field[Any], values: Mapping[str, Any], key: str, known: Iterable[str]
    ) -> Any:
        kind = hints(cls)[f.name]
        default = f.default if f.default is not dataclasses.MISSING else None
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        if is_section(kind):
            return self.build(kind, values.get(f.name), key, known)
        if f.name not in values:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                self.add(key, f"missing: {f.metadata.get('doc', 'it must be given')}")
            return default
        try:
            value = converted(kind, values[f.name])
            _check_bounds(value, f.metadata)
        except Mismatch as mismatch:
            self.add(key, str(mismatch))
            return default
        return value


def suggestion(name: str, siblings: Iterable[str], prefix: str = "", known: Iterable[str] = ()) -> str:
    """`; did you mean X?`: the nearest sibling, else the same name elsewhere, else the siblings themselves."""
    siblings = list(siblings)
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {_join(prefix, near[0])}?"
    # `learning_rate` at the top belongs under train.
    ends = {key.rpartition(".")[2]: key for key in known}
    near = difflib.get_close_matches(name, list(ends), n=1, cutoff=0.75)
    if near:
        return f"; did you mean {ends[near[0]]}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def converted(kind: Any, value: Any) -> Any:
    """The value as the field's type.

    Raises:
        Mismatch: it is of another type.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        try:
            return converted(next(a for a in arguments if a is not type(None)), value)
        except Mismatch as mismatch:
            raise Mismatch(f"expected {expected(kind)}, not {_shown(value)}") from mismatch
    if origin is Literal and value in arguments and type(value) is str:
        return value
    if origin is tuple and isinstance(value, list):
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) == len(value):
            return tuple(converted(k, v) for k, v in zip(inner, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    raise Mismatch(f"expected {expected(kind)}, not {_shown(value)}")


def takes_mapping(kind: Any) -> bool:
    """Whether a type is `dict[...]`, or that or None."""
    return get_origin(kind) is dict or any(get_origin(argument) is dict for argument in get_args(kind))


def expected(kind: Any) -> str:
    """A type in a user's words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return expected(next(a for a in arguments if a is not type(None))) + " or null"
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, each {expected(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {expected(arguments[0])}"
    if origin is dict:
        return "a mapping"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _check_bounds(value: Any, limits: Mapping[str, Any]) -> None:
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        for name, word, holds in (
            ("least", "at least", operator.ge),
            ("most", "at most", operator.le),
            ("above", "more than", operator.gt),
            ("below", "less than", operator.lt),
        ):
            bound = limits.get(name)
            if bound is not None and not holds(number, bound):
                raise Mismatch(f"must be {word} {bound:g}, got {number:g} ({limits['doc']})")


def _shown(value: Any) -> str:
    """A value as the user wrote it, cut where it is long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

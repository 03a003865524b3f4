"""Nested values → frozen dataclasses, with every problem collected."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

from llavanext_cli.config.documents import Document, shown


@dataclass(frozen=True)
class Problem:
    """One fault of a preset: where it stands ("my.yaml, line 7"), its dotted key, and what is wrong."""

    where: str
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.text) if part)


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
        """Note a problem; its place is that of the key, of the first key below it, or of the nearest above it."""
        self.problems.append(Problem(self.where(key), key, text))

    def where(self, key: str) -> str:
        origins = self.document.origins
        if key not in origins:
            key = next((other for other in origins if other.startswith(f"{key}.")), key)
        while key and key not in origins:
            key = key.rpartition(".")[0]
        return origins.get(key, self.name)

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
            self.add(prefix, f"expected a mapping of keys to values, not {shown(values)}")
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
    near = nearest(name, siblings)
    if near:
        return f"; did you mean {_join(prefix, near)}?"
    # `learning_rate` at the top belongs under train.
    ends = {key.rpartition(".")[2]: key for key in known}
    same = difflib.get_close_matches(name, list(ends), n=1, cutoff=0.75)
    if same:
        return f"; did you mean {ends[same[0]]}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


RENAMED = {"clips": "videos"}
"""Keys of earlier releases."""


def nearest(name: str, keys: Sequence[str]) -> str | None:
    """The key that has replaced a name, else the first that it is short for, else the one spelled most like it."""
    if RENAMED.get(name) in keys:
        return RENAMED[name]
    short_for = [key for key in keys if _is_short_for(name, key.rpartition(".")[2].split("_"))]
    return next(iter(short_for or difflib.get_close_matches(name, keys, n=1)), None)


def _is_short_for(name: str, words: Sequence[str]) -> bool:
    """Whether it is their initials, as lr of learning_rate, or begins one of them, as len does in seq_length."""
    return len(name) > 1 and (name == "".join(w[:1] for w in words) or any(w.startswith(name) for w in words))


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
            raise Mismatch(f"expected {expected(kind)}, not {shown(value)}") from mismatch
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
    raise Mismatch(f"expected {expected(kind)}, not {shown(value)}")


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

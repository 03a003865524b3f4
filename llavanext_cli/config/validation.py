"""Nested values → frozen dataclasses, with every problem reported. Presets and a model's config.json are checked here.

A field is declared with `setting`, which holds its meaning and its bounds. A field whose type is a dataclass is a
section: a mapping with keys of its own. (msgspec and pydantic know bounds, too, but msgspec stops at the first problem,
and neither says which key was meant.)
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import types
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

Problems = list[tuple[str, str]]
"""(dotted key, what is wrong)."""

RENAMED = {"data.clips": "data.videos"}
"""Keys of earlier releases, and their names now."""


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
    """A dataclass field that a file may set.

    Args:
        default: its value when it is not given; without one it is required.
        doc: what it is, with its unit.
        least, most, above, below: bounds of the number, or of each number of a list; the first two are allowed.
        task: the only task of a preset that reads it.
    """
    metadata = {"doc": doc, "least": least, "most": most, "above": above, "below": below, "task": task}
    return dataclasses.field(default=default, metadata=metadata)


@cache
def fields_of(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Name → (field, type) of a dataclass."""
    types_ = get_type_hints(cls)
    return {field.name: (field, types_[field.name]) for field in dataclasses.fields(cls)}


def section_of(kind: Any) -> type | None:
    """The dataclass in a field's type, `Section` or `Section | None`; None when the field is a plain value."""
    return next((part for part in (kind, *get_args(kind)) if dataclasses.is_dataclass(part)), None)  # type: ignore[return-value]


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(dotted key, field, type) of every plain value below a dataclass."""
    for name, (field, kind) in fields_of(cls).items():
        section = section_of(kind)
        if section is None:
            yield prefix + name, field, kind
        else:
            yield from leaves(section, f"{prefix}{name}.")


def build(cls: type, values: Any, problems: Problems, prefix: str = "", known: Collection[str] | None = None) -> Any:
    """A dataclass from nested values.

    Args:
        values: a mapping of field names to values, as YAML or JSON gives them.
        problems: every problem is added to it.
        prefix: dotted key of the mapping.
        known: every dotted key of the whole file, to suggest from. None: unknown keys are ignored.

    Returns:
        The dataclass. A field with a problem has its default, or None; so has an optional section with one inside.
    """
    if not isinstance(values, dict):
        problems.append((prefix, f"expected a mapping of keys to values, not {shown(values)}"))
        return build(cls, {}, problems=[])
    fields = fields_of(cls)
    for key in [join(prefix, name) for name in values if name not in fields and known is not None]:
        problems.append((key, "unknown key" + suggestion(key, fields, known or ())))
    chosen = {}
    for name, (field, kind) in fields.items():
        key, section, value, before = join(prefix, name), section_of(kind), values.get(name), len(problems)
        is_required = field.default is dataclasses.MISSING
        chosen[name] = None if is_required else field.default
        if section is not None:
            if value is not None or is_required:
                inside = build(section, {} if value is None else value, problems, key, known)
                if len(problems) == before or kind is section:
                    chosen[name] = inside
        elif name in values:
            try:
                converted = convert(kind, value)
                check_bounds(converted, field.metadata)
                chosen[name] = converted
            except Mismatch as mismatch:
                problems.append((key, str(mismatch)))
        elif is_required:
            problems.append((key, f"missing: {field.metadata['doc']}"))
    return cls(**chosen)


def has_problem(keys: Collection[str], problems: Problems) -> bool:
    """Whether one of the keys, or a section that it is in, has a problem. What follows from it is not reported."""
    return any(key == bad or key.startswith(f"{bad}.") for key in keys for bad, _ in problems)


def suggestion(key: str, siblings: Collection[str], known: Collection[str]) -> str:
    """What follows "unknown key": the nearest key beside it, else the nearest one elsewhere, else all beside it."""
    if key in RENAMED:
        return f": it is now called {RENAMED[key]}"
    prefix, _, name = key.rpartition(".")
    near = _nearest(name, siblings)
    if near:
        return f"; did you mean {join(prefix, near)}?"
    elsewhere = {other.rpartition(".")[2]: other for other in known}
    near = _nearest(name, elsewhere, cutoff=0.75, abbreviated=not prefix)
    return f"; did you mean {elsewhere[near]}?" if near else f"; known here: {', '.join(siblings)}"


def _nearest(name: str, keys: Collection[str], cutoff: float = 0.6, abbreviated: bool = True) -> str | None:
    """The first key that the name is short for (lr, len), else the one that is spelled most like it."""
    if abbreviated and len(name) > 1:
        for key in keys:
            words = key.split("_")
            if name == "".join(word[:1] for word in words) or any(word.startswith(name) for word in words):
                return key
    return next(iter(difflib.get_close_matches(name, keys, n=1, cutoff=cutoff)), None)


def join(prefix: str, name: str) -> str:
    """The dotted key of a name below a prefix, which may be empty."""
    return f"{prefix}.{name}" if prefix else name


class Mismatch(Exception):
    """A value that a field cannot take; the text says what it can take."""


def convert(kind: Any, value: Any) -> Any:
    """The value as the field's type: a list as a tuple, a whole number as a float where that is wanted.

    Raises:
        Mismatch: it is of another type.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        try:
            return convert(arguments[0], value)
        except Mismatch as mismatch:
            raise Mismatch(f"expected {expected(kind)}, not {shown(value)}") from mismatch
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) == len(value):
            return tuple(map(convert, inner, value))
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind is int and is_int(value):
        return value
    if kind is float and is_number(value):
        return float(value)
    raise Mismatch(f"expected {expected(kind)}, not {shown(value)}")


def is_int(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number: a bool, which Python counts as one, is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number that a float can hold."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def expected(kind: Any) -> str:
    """A type in a user's words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return f"{expected(arguments[0])} or null"
    if origin is Literal:
        return " or ".join(arguments) if len(arguments) < 3 else "one of " + ", ".join(arguments)
    if origin is tuple:
        length = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
        return f"a list{length}, each {expected(arguments[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def shown(value: Any) -> str:
    """A value as a file has it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = f"{value!r:.61}" if isinstance(value, str) else str(value)[:61]
    return text if len(text) <= 60 else text[:57] + "..."


def check_bounds(value: Any, bounds: Mapping[str, Any]) -> None:
    """Raise a `Mismatch` where a number, or one of a list, is outside the bounds of its `setting`."""
    if isinstance(value, tuple):
        for item in value:
            check_bounds(item, bounds)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        for name, words, holds in (
            ("least", "at least", operator.ge),
            ("most", "at most", operator.le),
            ("above", "more than", operator.gt),
            ("below", "less than", operator.lt),
        ):
            if bounds[name] is not None and not holds(value, bounds[name]):
                raise Mismatch(f"must be {words} {bounds[name]:.10g}, not {value:.10g} ({bounds['doc']})")

"""YAML text → nested values with the line of every key.

Supported is the plain part of YAML 1.2: mappings, lists, text, numbers (`2e-6` is one; `no` and `1:30` are text), true,
false and null. A repeated key, an anchor or a tag is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llavanext_cli.config.validation import shown
from llavanext_cli.errors import ConfigError

MAX_DEPTH = 20
"""Deepest nesting; a preset has four levels."""

MAX_BYTES = 1_000_000
"""Largest file. A larger one is data given by mistake, and would take this parser hours."""


class _Loader(yaml.SafeLoader):
    """Composes nodes; resolves plain scalars as YAML 1.2's core schema does."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the base class declares it so

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs leave it untyped
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not supported", event.start_mark)
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
class Document:
    """Nested values, and for each dotted key where it was given: "my.yaml, line 7" or "--set KEY=VALUE".

    The key "" is the whole file.
    """

    values: dict[str, Any]
    origins: dict[str, str]

    def updated(self, other: Document) -> Document:
        """This document with the other's values on top: mappings are merged key by key, anything else is replaced."""
        return Document(_merge(self.values, other.values), self.origins | other.origins)

    def place(self, *keys: str) -> str:
        """Where one of these keys was given.

        What was given on the command line comes first. A key that is missing has the place of the section above it.
        """
        found = [origin for key in keys for origin in self._origins_below(key)]
        above = keys[0]
        while not found:
            above = above.rpartition(".")[0]
            found = [self.origins[above]] if above in self.origins else self._origins_below(above)
        return next((origin for origin in found if origin.startswith("--")), found[0])

    def gives(self, key: str) -> bool:
        """Whether a key, or one below it, is given."""
        return bool(self._origins_below(key))

    def _origins_below(self, key: str) -> list[str]:
        return [origin for given, origin in self.origins.items() if given == key or given.startswith(f"{key}.")]


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        result[key] = _merge(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return result


SYNTAX_HINTS = {
    "mapping values are not allowed": 'put text with a colon and a space in quotes ("a: b"), or remove the space (a:b)',
    "an alias": "put text that begins with * in quotes",
    "an anchor": "put text that begins with & in quotes",
    "anchors and aliases": "write the value out in each place; put text that begins with & or * in quotes",
    "": "close every bracket and quote, and indent with spaces",
}
"""A part of the parser's message → what to do; the first that fits counts."""
PRESET_HINT = "`llavanext presets copy NAME FILE` makes a preset to start from."


def load_yaml(path: Path, hint: str = PRESET_HINT) -> Document:
    """Read a YAML file whose top is a mapping.

    Args:
        hint: what to do when it is something else.

    Raises:
        ConfigError: the file cannot be read, is too large, is not YAML (with line and column), or repeats a key.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8") if len(data) <= MAX_BYTES else ""
    except OSError as fault:
        raise ConfigError(f"{path} cannot be read: {fault.strerror}", hint) from fault
    except UnicodeDecodeError as fault:
        raise ConfigError(f"{path} cannot be read: it is not UTF-8 text", "save it as UTF-8") from fault
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes: it is a data file, not a file of settings", hint)
    origins = {"": str(path)}
    values = parse_yaml(text, str(path), origins)
    if values is None:
        raise ConfigError(f"{path} is empty", hint)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, not {shown(values)}", hint)
    return Document(values, origins)


def parse_yaml(text: str, where: str, origins: dict[str, str] | None = None) -> Any:
    """Parse YAML text.

    Args:
        where: name of the text, for messages.
        origins: filled with "WHERE, line N" for each dotted key.

    Raises:
        ConfigError: not YAML, or something in it is not supported; with line and column.
    """
    problems: list[str] = []
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        value = None if node is None else _value(node, where, "", {} if origins is None else origins, problems)
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        hint = next(hint for part, hint in SYNTAX_HINTS.items() if part in f"{fault.context} {fault.problem}")
        raise ConfigError(f"{place}: {fault.problem or fault.context}", hint) from fault
    except yaml.YAMLError as fault:  # a character that YAML does not allow
        raise ConfigError(f"{where}: invalid YAML: {str(fault).splitlines()[0]}", "save it as UTF-8 text") from fault
    if problems:
        raise ConfigError(f"{where}: invalid YAML", "write each key once, with a plain value", details=problems)
    return value


def _value(node: Any, where: str, key: str, origins: dict[str, str], problems: list[str]) -> Any:
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
        problems.append(f"{where}, line {node.start_mark.line + 1}: {key}: the tag {node.tag} is not supported")
        return None
    return scalar[1](node.value)

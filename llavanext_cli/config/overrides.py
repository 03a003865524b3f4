"""`--set KEY=VALUE`: changes to single values of a preset, read as a document that is laid over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llavanext_cli.config.documents import Document, parse_yaml
from llavanext_cli.config.reading import Builder, Problem, nearest, suggestion, takes_mapping
from llavanext_cli.errors import ConfigError


def read_overrides(overrides: Sequence[str], known: Mapping[str, Any], builder: Builder) -> Document:
    """`a.b=c` settings as a document. An unknown key is a problem; it is noted and left out."""
    result = Document({}, {})
    for override in overrides:
        key, equals, text = override.partition("=")
        key, where = key.strip(), f"--set {override}"
        if not equals or not key:
            raise ConfigError(f"{where}: expected KEY=VALUE", "Such as --set data.frames=8.")
        value = parse_yaml(text, where)
        # Below model.text.rope_scaling, whose value is a mapping, the names are not the schema's.
        free = any(key.startswith(f"{leaf}.") and takes_mapping(kind) for leaf, kind in known.items())
        inner = any(leaf.startswith(f"{key}.") for leaf in known)
        if key == "extends" or not (free or inner or key in known):
            builder.problems.append(Problem(where, "", f"unknown key{_nearest_key(key, known)}"))
            continue
        values: Any = value
        for part in reversed(key.split(".")):
            values = {part: values}
        result = result.updated(Document(values, {name: where for name in (key, *_keys_below(value, key))}))
    return result


def keys_set(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each setting with the keys that it gives a value: those of the mapping `model={vision: {...}}`, not `model`."""
    for override in overrides:
        key, _, text = override.partition("=")
        keys = [key.strip(), *_keys_below(parse_yaml(text, f"--set {override}"), key.strip())]
        yield from ((override, k) for k in keys if not any(other.startswith(f"{k}.") for other in keys))


def _keys_below(value: Any, key: str) -> Iterator[str]:
    """Dotted keys inside a value that is a mapping."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield f"{key}.{name}"
        yield from _keys_below(inner, f"{key}.{name}")


def _nearest_key(key: str, known: Mapping[str, Any]) -> str:
    """`; did you mean X?`: a key is compared with those of the section that it begins with, so that the section's name,
    which all of them share, does not count."""
    section, name = "", key
    while "." in name and any(leaf.startswith(f"{section}{name.partition('.')[0]}.") for leaf in known):
        first, _, name = name.partition(".")
        section += f"{first}."
    below = [leaf.removeprefix(section) for leaf in known if leaf.startswith(section)]
    near = nearest(name, below)
    if near:
        return f"; did you mean {section}{near}?"
    siblings = dict.fromkeys(leaf.partition(".")[0] for leaf in below)
    return suggestion(name, siblings, section.rstrip("."), known)

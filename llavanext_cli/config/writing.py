"""A preset written out: as plain values, as YAML with the meaning of each key, and copied to a file of one's own."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavanext_cli.config.documents import load_yaml
from llavanext_cli.config.schema import Preset, Settings
from llavanext_cli.config.shipped import SUFFIXES, find_preset
from llavanext_cli.config.validation import fields_of, section_of
from llavanext_cli.errors import ConfigError
from llavanext_cli.files import check_target, write_whole


def preset_to_dict(preset: Preset) -> dict[str, Any]:
    """All values of a preset as plain nested values, defaults included, in the order of the schema."""
    values = _plain(preset, preset.task)
    return {name: values[name] for name in fields_of(Settings) if values[name] is not None}


def _plain(value: Any, task: str) -> Any:
    if dataclasses.is_dataclass(value):
        fields = (f for f in dataclasses.fields(value) if f.metadata.get("task") in (None, task))
        return {f.name: _plain(getattr(value, f.name), task) for f in fields}
    return [_plain(item, task) for item in value] if isinstance(value, tuple) else value


def diff_presets(one: Preset, other: Preset) -> dict[str, tuple[Any, Any]]:
    """Dotted key → both values, for each key in which two presets differ; None where a preset has no such key."""
    left, right = _flat(preset_to_dict(one)), _flat(preset_to_dict(other))
    keys = dict.fromkeys((*left, *right))
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def preset_to_yaml(preset: Preset) -> str:
    """A preset as YAML that can be loaded again: every key with its value, and a comment with meaning and unit."""
    return "\n".join(_yaml_lines(Settings, preset_to_dict(preset))) + "\n"


def _yaml_lines(cls: type, values: dict[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in values.items():
        field, kind = fields_of(cls)[name]
        section = section_of(kind)
        if section is not None and value is not None:
            yield from ([] if indent else [""])
            yield f"{indent}{name}:"
            yield from _yaml_lines(section, value, indent + "  ")
        else:
            # JSON's spelling of numbers, lists and texts is YAML's too.
            meaning = f"  # {field.metadata['doc']}" if "doc" in field.metadata else ""
            yield f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}{meaning}"


def copy_preset(name: str, target: Path, force: bool = False) -> Path:
    """Copy a preset, as it is written, to a file that can be changed.

    Args:
        name: of a shipped preset, or the path of one.
        target: the new file, or an existing folder to put it in.
        force: replace a YAML file that is there.

    Returns:
        The file that was written. The command in its first line names it.

    Raises:
        LlavaNextError: no such preset, or it is not YAML, or the file exists or cannot be written.
    """
    name, source = find_preset(name)
    load_yaml(source)  # its keys may be invalid: they can be corrected in the copy
    if target.is_dir():
        target = target / source.name
    check_target(target, kind="a preset", is_ours=lambda path: path.suffix in SUFFIXES, force=force, option="file")
    first, newline, rest = source.read_text(encoding="utf-8").partition("\n")
    first = re.sub(rf"(?<=\s){re.escape(name)}(?=\s|$)", lambda _: str(target), first, count=1)
    try:
        write_whole(target, (first + newline + rest).encode("utf-8"))
    except OSError as fault:
        raise ConfigError(
            f"{target} cannot be written: {fault.strerror}", "choose another file, or free some space"
        ) from fault
    return target

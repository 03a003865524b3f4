"""A preset written out: as plain values, as YAML with the meaning of each key, and copied to a file of one's own."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavanext_cli.config.documents import load_yaml
from llavanext_cli.config.presets import find_preset
from llavanext_cli.config.reading import hints, is_section
from llavanext_cli.config.schema import SECTIONS, Preset
from llavanext_cli.errors import ConfigError
from llavanext_cli.files import describe, write_whole


def preset_to_dict(preset: Preset) -> dict[str, Any]:
    """All values of a preset as plain nested values, defaults included, in the order of the schema."""
    result: dict[str, Any] = {"task": preset.task, "description": preset.description}
    for section in SECTIONS:
        value = getattr(preset, section)
        if value is not None:
            result[section] = _plain(value, preset.task)
    return result


def _plain(value: Any, task: str) -> Any:
    if dataclasses.is_dataclass(value):
        fields = [f for f in dataclasses.fields(value) if f.metadata.get("task") in (None, task)]
        return {f.name: _plain(getattr(value, f.name), task) for f in fields}
    if isinstance(value, (tuple, list)):
        return [_plain(item, task) for item in value]
    return value


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
    lines = [f"task: {preset.task}", f"description: {json.dumps(preset.description, ensure_ascii=False)}"]
    for section, cls in SECTIONS.items():
        value = getattr(preset, section)
        if value is not None:
            lines += ["", f"{section}:", *_yaml_lines(cls, value, "  ", preset.task)]
    return "\n".join(lines) + "\n"


def _yaml_lines(cls: type, value: Any, indent: str, task: str) -> Iterator[str]:
    for f in dataclasses.fields(cls):
        if f.metadata.get("task") not in (None, task):
            continue
        kind, item = hints(cls)[f.name], getattr(value, f.name)
        if is_section(kind):
            yield f"{indent}{f.name}:"
            yield from _yaml_lines(kind, item, indent + "  ", task)
        else:
            # JSON's spelling of numbers, lists and texts is YAML's too.
            line = f"{indent}{f.name}: {json.dumps(_plain(item, task))}"
            yield f"{line}  # {f.metadata['doc']}" if "doc" in f.metadata else line


def copy_preset(name: str, target: Path, force: bool = False) -> Path:
    """Copy a preset to a file to be changed. It goes on extending its base.

    Args:
        name: of a shipped preset, or the path of one.
        target: the new file, or an existing folder that is to hold it.
        force: replace a file that is there.

    Returns:
        The file that was written. Its first line, the command to run, names it.

    Raises:
        ConfigError: no such preset, or it is not YAML, or the file is there or cannot be written; nothing is left
            behind.
    """
    name, source = find_preset(name)
    load_yaml(source)  # its keys may be wrong: a copy may be made to mend them
    if target.is_dir():
        target = target / source.name
    if target.parent.exists() and not target.parent.is_dir():
        raise ConfigError(f"{target}: {target.parent} is a file, not a folder", "Choose another file.")
    if not target.parent.is_dir():
        folder = shlex.quote(str(target.parent))
        raise ConfigError(f"{target}: there is no folder {target.parent}", f"Make it first: mkdir -p {folder}")
    if (kind := describe(target)) not in (
        "a file",
        "missing",
    ):  # renaming a file over /dev/null would take it from the whole machine
        raise ConfigError(f"{target} is {kind}, not a file", "Choose another file.")
    if target.exists() and not force:
        raise ConfigError(f"{target} is already there", "Choose another file, or replace it with --force.")
    first, newline, rest = source.read_text(encoding="utf-8").partition("\n")
    # The command in the header named the preset; now it must name the copy.
    first = re.sub(rf"(?<=\s){re.escape(name)}(?=\s|$)", lambda _: str(target), first, count=1)
    try:
        write_whole(target, (first + newline + rest).encode("utf-8"))
    except OSError as fault:
        raise ConfigError(
            f"{target} cannot be written: {fault.strerror}",
            "Choose another file, in a folder where you may write and there is room.",
        ) from fault
    return target

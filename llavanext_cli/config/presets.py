"""Reading presets. `shipped.py` finds them, `writing.py` writes them out again.

A preset's values come from four places, each on top of the one before: the base that it extends, the file, `--set` and
`--devices`.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.documents import Document, load_yaml, parse_yaml
from llavanext_cli.config.rules import check_preset
from llavanext_cli.config.schema import Preset, Settings, schema_keys
from llavanext_cli.config.shipped import SUFFIXES, base_files, find_preset, preset_files
from llavanext_cli.config.validation import Problems, build, has_problem, leaves, shown
from llavanext_cli.errors import ConfigError


@dataclass(frozen=True)
class PresetInfo:
    """A shipped preset, as `presets list` shows it.

    Attributes:
        target: Ascend or CPU.
        tokens: longest sequence; of an ask preset, question and answer together.
        memory: of one NPU, such as "57GB"; None on a CPU.
    """

    name: str
    path: Path
    task: str
    target: str
    devices: int
    tokens: int | None
    memory: str | None
    description: str


@dataclass(frozen=True)
class CheckReport:
    """What `presets check` found: nothing, or one line for each problem, and what to do."""

    name: str
    path: Path | None
    problems: tuple[str, ...] = ()
    hint: str = ""

    @property
    def ok(self) -> bool:
        return not self.problems


def list_presets() -> list[PresetInfo]:
    """All shipped presets, in the order of their names."""
    presets = [load_preset(name) for name in preset_files()]
    return [
        PresetInfo(
            name=preset.name,
            path=preset.path,
            task=preset.task,
            target=preset.runtime.target,
            devices=preset.parallel.devices,
            tokens=preset.ask.cache_tokens if preset.ask else preset.data.seq_length,
            memory=preset.runtime.memory,
            description=preset.description,
        )
        for preset in presets
    ]


def check_presets(names: Sequence[str] = (), overrides: Sequence[str] = ()) -> list[CheckReport]:
    """Load presets and expand them to their MindFormers configuration; an invalid one does not stop the check.

    Args:
        names: names or files; without any, all that are shipped.
        overrides: `key.path=value` settings for each of them.
    """
    from llavanext_cli.config.mindformers import expand

    reports = []
    for name in names or preset_files():
        path = None
        try:
            _, path = find_preset(name)
            expand(load_preset(name, overrides))
            reports.append(CheckReport(name, path))
        except ConfigError as fault:
            reports.append(CheckReport(name, path, fault.details or (fault.what,), fault.hint))
    return reports


def load_preset(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    devices: int | None = None,
    model: Architecture | None = None,
) -> Preset:
    """Read a preset and check all of it.

    Args:
        name_or_path: name of a shipped preset, or path of a YAML file.
        overrides: `key.path=value` settings (`--set`), the value in YAML.
        devices: `--devices`. When training, they change the number of data-parallel groups; when asking, all of them
            share each layer.
        model: of the checkpoint that is trained or asked with the preset; see `check_preset`.

    Raises:
        ConfigError: no such preset, not YAML, or invalid; every problem is in `details`, with file and key.
    """
    name, path = find_preset(name_or_path)
    document = _read_file(path).updated(parse_overrides(overrides))
    if devices is not None:
        document = document.updated(_share_devices(document, devices))
    values = dict(document.values)
    problems = _drop_unread(values, document)
    settings: Settings = build(Settings, values, problems, known=schema_keys())
    lines = [f"{document.place(key)}: {key}: {text}" for key, text in problems]
    for keys, text in check_preset(settings, model):
        if not has_problem(keys, problems):
            lines.append(f"{document.place(*keys)}: {keys[0]}: {text}")
    if lines:
        example = (
            name
            if path in preset_files().values()
            else f"video-7b-{'ask-image' if settings.task == 'ask' else 'stage2'}"
        )
        raise ConfigError(
            f"preset {name} has {'a problem' if len(lines) == 1 else f'{len(lines)} problems'}",
            f"`llavanext presets show {example} --full` lists every key with its meaning",
            lines,
        )
    return Preset(name=name, path=path, **vars(settings))


def _drop_unread(values: dict[str, Any], document: Document) -> Problems:
    """Remove the section of the other task from the values; a problem for each key that the preset's task ignores."""
    task = values.get("task")
    if task not in ("train", "ask"):
        return []  # the task itself is the problem
    other = "ask" if task == "train" else "train"
    ignored = [other, *(key for key, field, _ in leaves(Settings) if field.metadata["task"] == other)]
    values.pop(other, None)
    if values.get(task) is None:
        values[task] = {}  # then the keys that it needs are reported as missing
    return [(key, f"is not used by the task {task}: leave it out") for key in ignored if document.gives(key)]


def _read_file(path: Path) -> Document:
    """The file on top of the base that it extends; a base extends nothing."""
    document = load_yaml(path)
    base = document.values.pop("extends", None)
    if base is None:
        return document
    where = document.origins.pop("extends")
    bases = base_files()
    if not isinstance(base, str):
        raise ConfigError(f"{where}: extends: expected the name of a base", f"the bases are {', '.join(bases)}")
    places = [path.parent / f"{base}{suffix}" for suffix in ("", *SUFFIXES)]
    found = next((place for place in places if place.is_file() and not place.samefile(path)), None)
    found = found or (bases | preset_files()).get(base)
    if found is None or found.samefile(path):
        near = difflib.get_close_matches(base, bases, n=1, cutoff=0.4)
        raise ConfigError(
            f"{where}: extends: unknown base {base}{f'; did you mean {near[0]}?' if near else ''}",
            f"the bases are {', '.join(bases)}; a file is looked up beside {path.name}",
        )
    below = load_yaml(found)
    if "extends" in below.values:
        source = base if base in preset_files() else shlex.quote(str(found))
        raise ConfigError(
            f"{where}: extends: {base} is not a base: it extends {below.values['extends']} itself",
            f"extend {' or '.join(bases)}, or change a copy: `llavanext presets copy {source} FILE`",
        )
    return below.updated(document)


def parse_overrides(overrides: Sequence[str]) -> Document:
    """`--set KEY=VALUE` settings as a document.

    Raises:
        ConfigError: one of them is not KEY=VALUE, or its value is not YAML.
    """
    result = Document({}, {})
    for override in overrides:
        key, equals, text = override.partition("=")
        key, where = key.strip(), f"--set {override}"
        if not equals or not key:
            raise ConfigError(f"{where}: expected KEY=VALUE", "write it like --set data.frames=8")
        inside: dict[str, str] = {}
        values = parse_yaml(text, where, inside)
        for part in reversed(key.split(".")):
            values = {part: values}
        result = result.updated(Document(values, dict.fromkeys([key, *(f"{key}.{name}" for name in inside)], where)))
    return result


def _share_devices(document: Document, devices: int) -> Document:
    """`--devices N`: when training, tensor and pipeline stay, and the rest are data-parallel groups. When asking, all
    devices share each layer."""
    where = f"--devices {devices}"
    values = document.values.get("parallel")
    values = values if isinstance(values, dict) else {}
    if document.values.get("task") == "ask":
        shared = {"devices": devices, "data": 1, "tensor": devices}
    else:
        sizes = [values.get(name, 1) for name in ("tensor", "pipeline")]
        tensor, pipeline = (size if isinstance(size, int) and size > 0 else 1 for size in sizes)
        if devices % (tensor * pipeline):
            raise ConfigError(
                f"{where} is not a multiple of tensor {tensor} x pipeline {pipeline}",
                f"use a multiple of {tensor * pipeline}, or change parallel.tensor and parallel.pipeline with --set",
            )
        shared = {"devices": devices, "data": devices // (tensor * pipeline)}
    return Document({"parallel": shared}, {f"parallel.{name}": where for name in shared})


def check_model_settings(preset: Preset, overrides: Sequence[str], architecture: Architecture) -> None:
    """Refuse a `--set model.…` that differs from the checkpoint, and samples that are longer than its positions.

    Raises:
        ConfigError: with both values.
    """
    origins = parse_overrides(overrides).origins
    for key, where in origins.items():
        if not key.startswith("model.") or any(other.startswith(f"{key}.") for other in origins):
            continue
        wanted: Any = preset.model
        found: Any = architecture
        for name in key.split(".")[1:]:
            wanted, found = getattr(wanted, name, None), getattr(found, name, None)
        if wanted != found:
            raise ConfigError(
                f"{where}: the checkpoint's {key} is {shown(found)}",
                "the checkpoint decides the architecture: leave the setting out, or convert another model",
            )
    length, positions = preset.data.seq_length, architecture.text.positions
    if length is not None and length > positions:
        raise ConfigError(
            f"data.seq_length is {length}, but the checkpoint's model has {positions} positions",
            f"give --set data.seq_length={positions}, or a checkpoint whose config.json has rope_scaling",
        )

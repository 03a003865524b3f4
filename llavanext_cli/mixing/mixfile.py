"""Reads the mix file: which data sets, how much of each, and where their media are.

datasets:
  - json_path: /data/images/llava_v1_5_mix665k.json
    sampling_strategy: random:10%          # all is the default
    media_root: /data/images               # the folder of json_path is the default
    name: mix665k                          # the file's name is the default
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavanext_cli.config.documents import load_yaml
from llavanext_cli.errors import ConfigError
from llavanext_cli.mixing.sampling import Strategy, parse_strategy

KEYS = ("json_path", "sampling_strategy", "media_root", "name")
EXAMPLE = "a mix file lists data files under datasets: see llavanext mix --help"


@dataclass(frozen=True)
class DataSet:
    """One entry of the mix file, with absolute paths. `strategy_text` is the strategy as it was written."""

    name: str
    json_path: Path
    media_root: Path
    strategy: Strategy
    strategy_text: str


def load_mix_file(path: Path) -> tuple[DataSet, ...]:
    """Read and check a mix file. Relative paths start at the file's own folder, or else at the working folder.

    Raises:
        ConfigError: it is not YAML; or, with every fault in `details`, unknown keys, strategies, missing data files.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such mix file", EXAMPLE)
    content = load_yaml(path, EXAMPLE).values
    entries = content.get("datasets")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: the key 'datasets' must hold a list with at least one data set", EXAMPLE)
    faults = [f"{path}: unknown key {key!r}; known: datasets" for key in content if key != "datasets"]
    data_sets: list[DataSet] = []
    taken: set[str] = set()
    for number, entry in enumerate(entries, 1):
        where = f"{path}: datasets[{number}]"
        try:
            data_sets.append(_read_entry(entry, path.parent, taken))
        except _FaultsError as error:
            faults += [f"{where}: {fault}" for fault in error.args[0]]
    if faults:
        raise ConfigError(
            f"{path}: {len(faults)} fault{'s' * (len(faults) > 1)} in the mix file", EXAMPLE, details=faults
        )
    return tuple(data_sets)


class _FaultsError(Exception):
    """Every fault of one entry, as a list."""


def _read_entry(entry: Any, folder: Path, taken: set[str]) -> DataSet:
    if not isinstance(entry, dict):
        raise _FaultsError([f"a data set is a mapping with json_path, not {entry!r}"])
    faults = [f"unknown key {key!r}{_nearest(str(key))}" for key in entry if key not in KEYS]
    json_path = _path(entry, "json_path", folder, faults)
    if "json_path" not in entry:
        faults.append("json_path is missing")
    elif json_path and json_path.suffix not in (".json", ".jsonl"):
        faults.append(f"json_path: {json_path.name} is neither .json nor .jsonl")
    elif json_path and not json_path.is_file():
        faults.append(f"json_path: {json_path} does not exist; llavanext fetch --list shows what can be fetched")
    media_root = _path(entry, "media_root", folder, faults) or (json_path.parent if json_path else None)
    if media_root and entry.get("media_root") and not media_root.is_dir():
        faults.append(f"media_root: {media_root} is no folder")
    if media_root and not _is_unicode(str(media_root)):
        faults.append(f"media_root: the name of {str(media_root)!r} is not Unicode, and JSON cannot hold it; rename it")
    written = entry.get("sampling_strategy", "all")
    try:
        strategy = parse_strategy(written)
    except ValueError as error:
        faults.append(f"sampling_strategy: {error}")
    name = entry.get("name", os.fsencode(json_path.stem).decode(errors="replace") if json_path else "")
    if not isinstance(name, str) or ("name" in entry and not (name and _is_unicode(name))):
        faults.append(f"name is a word, not {name!r}")
    elif name in taken and "name" in entry:
        faults.append(f"name: {name!r} stands twice")
    if faults:
        taken.add(str(name))
        raise _FaultsError(faults)
    base, number = name, 2
    while name in taken:  # the same file twice, with two strategies, is a fair thing to want
        name, number = f"{base}-{number}", number + 1
    taken.add(name)
    return DataSet(name, json_path, media_root, strategy, written)


def _is_unicode(text: str) -> bool:
    """Whether a path is more than bytes: Linux allows any in a name, and Python hides those it cannot read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _path(entry: dict[str, Any], key: str, folder: Path, faults: list[str]) -> Path | None:
    value = entry.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        faults.append(f"{key} is a path, not {value!r}")
        return None
    path = Path(value).expanduser()
    beside = (folder / path).absolute()
    # Mix files of the original were written for the folder in which its script was started.
    chosen = beside if path.is_absolute() or beside.exists() or not path.exists() else path.absolute()
    short, real = os.path.normpath(chosen), os.path.realpath(chosen)
    # a/link/../b is a/b only where the link leads to no other folder
    return Path(short if os.path.realpath(short) == real else real)


def _nearest(key: str) -> str:
    found = difflib.get_close_matches(key, KEYS, n=1)
    return f"; did you mean {found[0]!r}?" if found else f"; known: {', '.join(KEYS)}"

"""The presets that come with llavanext: where they are, and which file a name means."""

from __future__ import annotations

import difflib
from pathlib import Path

from llavanext_cli.errors import ConfigError
from llavanext_cli.files import describe

SUFFIXES = (".yaml", ".yml")
LIST_HINT = "`llavanext presets list` shows the presets"


def presets_folder() -> Path:
    """The shipped presets: inside the package when installed, beside it in a source tree.

    Raises:
        ConfigError: neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "presets", package.parent / "presets"):
        if (folder / "base").is_dir():
            return folder
    raise ConfigError(
        f"the presets are missing from {package}", "the installation is damaged: `pip install --force-reinstall` it"
    )


def preset_files() -> dict[str, Path]:
    """Name → file of every shipped preset."""
    return {path.stem: path for path in sorted(presets_folder().iterdir()) if path.suffix in SUFFIXES}


def base_files() -> dict[str, Path]:
    """Name → file of the shipped bases, which presets extend; a base alone is incomplete."""
    return {f"base/{path.stem}": path for path in sorted((presets_folder() / "base").iterdir())}


def find_preset(name_or_path: str | Path) -> tuple[str, Path]:
    """Name and file of a preset, given as the name of a shipped one or as the path of a YAML file.

    Raises:
        ConfigError: there is none; the nearest names are in the hint.
    """
    text, path = str(name_or_path), Path(name_or_path)
    files = preset_files()
    if text in files:
        return text, files[text]
    if path.is_file():
        return path.stem if path.suffix in SUFFIXES else path.name, path
    if text and (kind := describe(path)) not in ("a file", "missing"):
        raise ConfigError(f"{text} is {kind}, but a preset is a YAML file or a name", LIST_HINT)
    if path.suffix in SUFFIXES:
        raise ConfigError(f"the preset file {text} does not exist", LIST_HINT)
    near = difflib.get_close_matches(text, list(files), n=3, cutoff=0.4)
    raise ConfigError(
        f"there is no preset named {text!r}", (f"did you mean {' or '.join(near)}? " if near else "") + LIST_HINT
    )

"""The files of a checkpoint folder beside its weights, and whether a folder is a checkpoint that may be replaced."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavanext_cli.errors import CheckpointError
from llavanext_cli.files import check_target, replacing
from llavanext_cli.processing.tokenizer import TOKENIZER_FILES
from llavanext_cli.units import format_size
from llavanext_cli.weights.stream import disk_error

MANIFEST = "llavanext_manifest.json"
NAME_MAP = "param_name_map.json"
SPARE_BYTES = 64 << 20
"""Left free beyond the weights: for tokenizers, manifests and whoever else uses the disk."""

COMPANIONS = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)
"""Files that are copied with the weights, unchanged."""

_WEIGHT_FILES = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin|ckpt)(\.index\.json)?\Z")
_SUBFOLDERS = {"carried": {"model.safetensors"}, "training": {"state.safetensors", "state.json"}}


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, ours or Hugging Face's.

    Raises:
        CheckpointError: it holds something else beside the checkpoint, which must not be lost.
    """
    entries = sorted(folder.iterdir())
    if not any(entry.name == MANIFEST or _WEIGHT_FILES.match(entry.name) for entry in entries):
        return False
    if foreign := next((entry.name for entry in entries if not _is_part(entry)), None):
        raise CheckpointError(
            f"{folder}: holds {foreign!r:.100} beside a checkpoint", "move it away, or choose another destination"
        )
    return True


def _is_part(entry: Path) -> bool:
    if entry.is_dir():
        return entry.name in _SUBFOLDERS and {inner.name for inner in entry.iterdir()} <= _SUBFOLDERS[entry.name]
    return entry.name in (MANIFEST, NAME_MAP, *COMPANIONS) or bool(_WEIGHT_FILES.match(entry.name))


def check_folder(destination: Path, inputs: tuple[Path, ...], *, force: bool) -> None:
    """Check before any work that a checkpoint may be written to `destination`.

    Raises:
        LlavaNextError: with the reason.
    """
    check_target(
        destination,
        kind="a checkpoint",
        is_ours=_is_checkpoint,
        force=force,
        folder=True,
        option="destination",
        inputs=inputs,
    )


def check_space(destination: Path, nbytes: int) -> None:
    """Raises CheckpointError when the disk of `destination` has no room for `nbytes`."""
    existing = next(parent for parent in destination.resolve().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes + SPARE_BYTES:
        raise CheckpointError(
            f"{destination}: needs {format_size(nbytes + SPARE_BYTES)}, but "
            f"only {format_size(free)} are free on this disk",
            "free some space, or name a folder on another disk",
        )


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """An empty folder that takes the name `destination` when the block ends well, and is removed when it fails.

    Raises:
        CheckpointError: the disk is full, or cannot be written.
    """
    try:
        with replacing(destination) as partial:
            partial.mkdir(parents=True)
            yield partial
    except OSError as error:
        raise disk_error(destination, error) from error


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the files that belong beside the weights. A link is followed, as in the Hub's cache."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_json(path: Path, value: Any) -> None:
    # A path cannot be encoded when it was given in another encoding than the locale's; it is only mentioned here.
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")

"""Folders that appear whole or not at all: everything is written under a temporary name beside the destination."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llavanext_cli.config.hf_config import REFETCH
from llavanext_cli.errors import CheckpointError
from llavanext_cli.processing.tokens import TOKENIZER_FILES
from llavanext_cli.units import format_size
from llavanext_cli.weights.headers import short
from llavanext_cli.weights.stream import disk_error

MANIFEST = "llavanext_manifest.json"
NAME_MAP = "param_name_map.json"
SPARE_BYTES = 64 << 20
"""Left free beyond what is written: manifests, tokenizers and whoever else uses the disk."""

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
"""Files that travel beside the weights, unchanged."""
COMPANION_LIMIT = 64 << 20
"""Bytes of one of them. A tokenizer.json has 2 to 20 MB; what is longer is something else."""

WEIGHT_FILES = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin|ckpt)(\.index\.json)?\Z")
OURS = {"carried": {"model.safetensors"}, "training": {"state.safetensors", "state.json"}}
"""Folders inside a checkpoint, and what is in them."""


def check_destination(destination: Path, sources: tuple[Path, ...], force: bool) -> None:
    """Refuse a destination that would touch a source, or replace what is not ours to replace.

    Raises:
        CheckpointError: with the reason.
    """
    target = destination.resolve()
    for source in (path.resolve() for path in sources):
        if target == source or source in target.parents:
            raise CheckpointError(
                f"{destination}: the destination lies inside the source {source}", "Name a folder beside it."
            )
        if target in source.parents:
            raise CheckpointError(f"{destination}: the destination holds the source {source}", "Name another folder.")
    if destination.is_symlink() and not destination.exists():
        raise CheckpointError(f"{destination}: a link to nowhere", "Remove it, or name another folder.")
    if not destination.exists():
        return
    if not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file", "Name a folder.")
    if os.path.ismount(target):
        raise CheckpointError(f"{destination}: a disk is mounted here, it cannot be replaced", "Name a folder in it.")
    content = sorted(destination.iterdir())
    if not content:
        return
    if not force:
        raise CheckpointError(f"{destination}: is there already", "Add --force to replace it, or name another folder.")
    foreign = [entry.name for entry in content if not _is_ours(entry)]
    weights = any(entry.name == MANIFEST or WEIGHT_FILES.match(entry.name) for entry in content)
    if foreign or not weights:
        what = "holds more than a checkpoint" if weights else "holds no checkpoint"
        raise CheckpointError(
            f"{destination}: {what}, so --force does not replace it",
            "Name another folder, or move these away." if foreign else "Name another folder.",
            [*map(short, foreign[:5]), *([f"… and {len(foreign) - 5} more"] if len(foreign) > 5 else [])],
        )


def _is_ours(entry: Path) -> bool:
    """Whether an entry of a folder is a part of a checkpoint, of ours or of Hugging Face's."""
    if entry.is_dir():
        return entry.name in OURS and {inner.name for inner in entry.iterdir()} <= OURS[entry.name]
    return entry.name in (MANIFEST, NAME_MAP, *COMPANIONS) or bool(WEIGHT_FILES.match(entry.name))


def check_space(destination: Path, nbytes: int) -> None:
    """Raises CheckpointError when the disk of `destination` has no room for `nbytes`."""
    parent = destination.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"{parent}: cannot be written to", "Name a folder where you may write.")
    free = shutil.disk_usage(parent).free
    if free < nbytes + SPARE_BYTES:
        raise CheckpointError(
            f"{destination}: {format_size(nbytes + SPARE_BYTES)} are needed, {format_size(SPARE_BYTES)} of them as a "
            f"reserve, and {format_size(free)} are free on this disk",
            "Free some space, or name a folder on another disk.",
        )


@contextmanager
def new_folder(destination: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `destination` that takes its name when the block ends well.

    When the block fails, or is interrupted, the temporary folder is removed.

    Args:
        destination: nothing, or an empty folder.
        replace: it may hold something, which stays until the new folder is complete. Otherwise what another process
            puts there meanwhile stays, and the block's work is lost.

    Raises:
        CheckpointError: the disk is full or refuses; or another process was faster.
    """
    # Through a link, its aim is replaced and the link stays.
    destination = destination.resolve()
    temporary = destination.parent / f".{destination.name}.tmp-{os.getpid()}"
    made = [parent for parent in destination.parents if not parent.exists()]
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        retired = None
        if replace and destination.exists():
            retired = destination.parent / f".{destination.name}.old-{os.getpid()}"
            os.rename(destination, retired)
        try:
            os.rename(temporary, destination)
        except BaseException:
            if retired is not None:
                os.rename(retired, destination)
            raise
        if retired is not None:
            shutil.rmtree(retired, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # a rename takes the place of an empty folder only
            raise CheckpointError(
                f"{destination}: another command has made it meanwhile", "Add --force to replace it, or use that one."
            ) from error
        raise disk_error(destination, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:  # the innermost first; those that hold the result stay
            with suppress(OSError):
                parent.rmdir()


def find_leftovers(destination: Path) -> list[Path]:
    """Folders that runs which are over left beside `destination`: half-written, or replaced and not removed."""
    destination = destination.resolve()
    found = destination.parent.glob(f".{glob.escape(destination.name)}.*-*")
    pattern = re.compile(re.escape(f".{destination.name}.") + r"(?:tmp|old)-(\d{1,9})\Z")
    runs = {path: int(match[1]) for path in found if (match := pattern.match(path.name))}
    return sorted(path for path, pid in runs.items() if pid == os.getpid() or not _is_alive(pid))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


_RANK = re.compile(r"rank_(0|[1-9][0-9]*)\Z")


def find_ranks(folder: Path) -> dict[int, Path]:
    """Rank → its folder, when this is the folder of a distributed run; else nothing."""
    for place in (folder, folder / "checkpoint"):
        if place.is_dir():
            found = {int(m[1]): path for path in place.iterdir() if path.is_dir() and (m := _RANK.match(path.name))}
            if any(next(path.glob("*.safetensors"), None) for path in found.values()):
                return found
    return {}


def measure_companions(source: Path) -> int:
    """Bytes of the files that travel beside weights.

    Raises:
        CheckpointError: one of them is too large to be what its name says.
    """
    sizes = {name: (source / name).stat().st_size for name in COMPANIONS if (source / name).is_file()}
    for name, size in sizes.items():
        if size > COMPANION_LIMIT:
            raise CheckpointError(
                f"{source / name}: {format_size(size)}; at most {format_size(COMPANION_LIMIT)} are copied", REFETCH
            )
    return sum(sizes.values())


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy the files that travel beside weights; returns their names. A link is followed, as in the Hub's cache."""
    copied = [name for name in COMPANIONS if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, folder / name)
    return copied


def write_json(path: Path, value: Any) -> None:
    # A path is no text when it was given in another encoding than the locale's; it is only mentioned here.
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """`5GB`, `500 MB`, `2GiB` → bytes. Raises CheckpointError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper().removesuffix("B") + "B" if match[2] else "") if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise CheckpointError(f"{short(text)!r} is no size", "write it as 5GB, 500MB or 2GiB")
    return size

"""Reading files that come from elsewhere: JSON of a limited size, and text that is safe to print."""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from llavanext_cli.config.model_folder import JSON_LIMIT, REFETCH
from llavanext_cli.errors import CheckpointError


def open_regular(path: str | Path) -> BinaryIO:
    """Open for reading. A pipe or a device, which has no end, is an OSError."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return open(path, "rb")


def cannot_read(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the system refuses to open or read."""
    hint = "Check that it is a file and that you may read it: ls -lL shows both."
    if error.errno == errno.EMFILE:
        hint = "Allow more open files: ulimit -n 65536."
    return CheckpointError(f"{path}: cannot be read ({error.strerror or error})", hint)


def read_json(path: Path) -> Any:
    """Read a small JSON file.

    Raises:
        CheckpointError: it cannot be read, or is not JSON.
    """
    try:
        with open_regular(path) as file:
            data = file.read(JSON_LIMIT + 1)
        if len(data) > JSON_LIMIT:
            raise CheckpointError(f"{path}: larger than {JSON_LIMIT} bytes", REFETCH)
        return json.loads(data.decode())
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON file ({error})", REFETCH) from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; empty when the file is missing.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {short(value)}", REFETCH)
    return value


def is_shape(value: Any) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of sizes."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def short(value: Any) -> str:
    """A name or value out of a file, as one printable line of at most 120 characters."""
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return text if len(text) <= 120 else text[:117] + "..."

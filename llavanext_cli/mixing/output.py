"""The files that a mix writes: samples, rejected records, the report page. Each appears whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llavanext_cli.errors import DataError
from llavanext_cli.files import check_target, claim, replacing
from llavanext_cli.mixing.request import MixRequest

_JSON = (b"{", b"[")
_HTML = (b"<!doctype html", b"<html")


def check_outputs(request: MixRequest, inputs: list[Path]) -> None:
    """Check before any work that the files of a mix may be written, and are different ones.

    Raises:
        LlavaNextError: with the reason.
    """
    outputs = (
        (request.out, "a mix", "--out", _JSON),
        (request.rejects, "a list of rejected records", "--rejects", _JSON),
        (request.page, "a report", "--report", _HTML),
    )
    places = [os.path.realpath(path) for path in (request.out, request.rejects, request.page, request.cache) if path]
    for place in places:
        if places.count(place) > 1:
            raise DataError(f"{place}: two outputs have the same name", "choose another name for --rejects or --report")
    for source in inputs:
        if os.path.realpath(source) in places:
            raise DataError(f"{source}: writing there would damage the input", "choose another --out")
    if request.dry_run:
        return
    for path, kind, option, beginnings in outputs:
        if path:
            check_target(
                path,
                kind=kind,
                is_ours=lambda path, beginnings=beginnings: _begins_with(path, beginnings),
                force=request.force,
                option=option,
                inputs=inputs,
            )


def _begins_with(path: Path, beginnings: tuple[bytes, ...]) -> bool:
    """Whether a file is empty or begins so. One that cannot be read does not."""
    try:
        with path.open("rb") as file:
            head = file.read(16).lower()
    except OSError:
        return False
    return not head or head.startswith(beginnings)


@contextmanager
def open_output(path: Path | None) -> Iterator[BinaryIO]:
    """A file that takes the name `path` when the block ends well; with None, what is written is dropped.

    Raises:
        DataError: it cannot be written, or another command is writing it.
    """
    if path is None:
        with open(os.devnull, "wb") as nothing:
            yield nothing
        return
    with claim(path):
        try:
            with replacing(path) as partial, partial.open("wb", buffering=1 << 20) as file:
                yield file
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "free some space, or choose another disk" if is_full else "choose another folder for the output"
            raise DataError(f"{path} cannot be written: {error.strerror or error}", hint) from error

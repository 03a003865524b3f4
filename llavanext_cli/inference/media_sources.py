"""Media as the command line names them: files, `-` for an image on stdin, and addresses where they are allowed."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from llavanext_cli.errors import DataError, LlavaNextError

MAX_BYTES = {"image": 64_000_000, "video": 2_000_000_000}
CONNECT_SECONDS, DOWNLOAD_SECONDS = 10, 120


def resolve_media(
    images: Sequence[str], videos: Sequence[str], folder: Path, *, allow_url: bool = False
) -> tuple[list[Path], list[Path]]:
    """Paths of images and videos; stdin and downloads are written to `folder`.

    Raises:
        DataError: nothing on stdin, an address without `allow_url`, or a download that fails.
    """
    if list(images).count("-") > 1 or "-" in videos:
        raise DataError("only one image can come from stdin, and no video", "name a file")
    found: dict[str, list[Path]] = {"image": [], "video": []}
    for kind, names in (("image", images), ("video", videos)):
        for number, name in enumerate(names):
            target = _target(folder, kind, number)
            if name == "-":
                _read_stdin(target)
            elif "://" in name and not Path(name).exists():
                if not allow_url:
                    raise DataError(
                        f"{name}: web addresses are not downloaded by default", "add --allow-url to download it"
                    )
                download(name, target, MAX_BYTES[kind])
            else:
                target = Path(name)
            found[kind].append(target)
    return found["image"], found["video"]


@contextlib.contextmanager
def rename_in_errors(folder: Path, images: Sequence[str], videos: Sequence[str]) -> Iterator[None]:
    """Errors about files that `resolve_media` wrote to `folder` show the name that the user gave."""
    try:
        yield
    except LlavaNextError as fault:
        for kind, names in (("image", images), ("video", videos)):
            for number, name in enumerate(names):
                shown = "the image on stdin" if name == "-" else name
                fault.what = fault.what.replace(str(_target(folder, kind, number)), shown)
        raise


def _target(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{number}-{kind}"


def _read_stdin(target: Path) -> None:
    most = MAX_BYTES["image"]
    data = sys.stdin.buffer.read(most + 1)
    if not data:
        raise DataError("no image on stdin (0 bytes)", "pipe one in: ... --image - < image.jpg")
    if len(data) > most:
        raise DataError(f"the image on stdin has more than {most} bytes", "scale it down")
    target.write_bytes(data)


def download(url: str, target: Path, max_bytes: int) -> None:
    """Download one file over http or https, within limits of size and time.

    Raises:
        LlavaNextError: it cannot be downloaded.
    """
    import requests

    from llavanext_cli.fetching.network import open_session

    deadline = time.monotonic() + DOWNLOAD_SECONDS
    try:
        with (
            open_session(retries=0) as session,
            session.get(url, stream=True, timeout=CONNECT_SECONDS) as response,
            target.open("wb") as file,
        ):
            if response.status_code != 200:
                raise DataError(f"{url}: the server answers HTTP {response.status_code}", "check the address")
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                if file.tell() > max_bytes:
                    raise DataError(f"{url}: the file has more than {max_bytes} bytes", "download and shrink it first")
                if time.monotonic() > deadline:
                    raise DataError(
                        f"{url}: not downloaded after {DOWNLOAD_SECONDS} s", "download it yourself and name the file"
                    )
    except (requests.RequestException, ValueError) as error:  # ValueError: a redirect to an invalid address
        reason = type(error).__name__
        raise DataError(f"{url}: cannot be downloaded ({reason})", "check the address and the network") from error

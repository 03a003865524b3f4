"""Media as a command names them: files, `-` for a picture from stdin, and addresses where they are allowed."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urljoin

from llavanext_cli.errors import DataError, LlavaNextError
from llavanext_cli.fetching.network import check_redirect
from llavanext_cli.processing.decoding import open_clip

MOST_BYTES = {"image": 64_000_000, "video": 2_000_000_000}
CONNECT_SECONDS, WHOLE_SECONDS = 10, 120
REDIRECTS = 5


def resolve_media(
    images: Sequence[str], videos: Sequence[str], folder: Path, *, allow_url: bool = False
) -> tuple[list[Path], list[Path]]:
    """Paths of pictures and clips; what is no file yet is written to `folder`.

    Raises:
        DataError: an address where none is allowed, too much or too slow, or nothing on stdin.
    """
    if list(images).count("-") > 1 or "-" in videos:
        raise DataError("only one picture can come from stdin, and no clip", "name a file")
    found: dict[str, list[Path]] = {"image": [], "video": []}
    for kind, names in (("image", images), ("video", videos)):
        for number, name in enumerate(names):
            target = _target(folder, kind, number)
            if name == "-":
                found[kind].append(_read_stdin(target))
            elif "://" in name and not Path(name).exists():
                if name.partition("://")[0].lower() not in ("http", "https"):
                    raise DataError(f"{name}: of addresses only http and https are read", "name a file")
                if not allow_url:
                    raise DataError(f"{name}: addresses are not read", "add --allow-url to download it")
                found[kind].append(download(name, target, MOST_BYTES[kind]))
            else:
                found[kind].append(Path(name))
    return found["image"], found["video"]


@contextlib.contextmanager
def rename_in_errors(folder: Path, images: Sequence[str], videos: Sequence[str]) -> Iterator[None]:
    """An error about a file that `resolve_media` wrote to `folder` names what it was made from."""
    try:
        yield
    except LlavaNextError as fault:
        for kind, names in (("image", images), ("video", videos)):
            for number, name in enumerate(names):
                told = "the picture on stdin" if name == "-" else name
                fault.what = fault.what.replace(str(_target(folder, kind, number)), told)
        raise


def _target(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{number}-{kind}"


def _read_stdin(target: Path) -> Path:
    data = sys.stdin.buffer.read(MOST_BYTES["image"] + 1)
    if not data:
        raise DataError("no picture on stdin (0 bytes)", "pipe one in: ... --image - < picture.jpg")
    if len(data) > MOST_BYTES["image"]:
        raise DataError(f"the picture on stdin has more than {MOST_BYTES['image']} bytes", "scale it down")
    target.write_bytes(data)
    return target


def download(url: str, target: Path, most: int) -> Path:
    """Download one file: http or https, bounded in bytes and seconds; a redirect from https to http is refused.

    Raises:
        LlavaNextError: it cannot be had.
    """
    import requests

    begun, asked = time.monotonic(), url
    try:
        with requests.Session() as session:
            for _ in range(REDIRECTS + 1):
                with session.get(url, stream=True, timeout=CONNECT_SECONDS, allow_redirects=False) as response:
                    if response.is_redirect:
                        location = response.headers["location"]
                        location = urljoin(url, location)
                        check_redirect(url, location)
                        url = location
                        continue
                    if response.status_code != 200:
                        raise DataError(f"{asked}: the server answers {response.status_code}", "check the address")
                    size = 0
                    with target.open("wb") as file:
                        for chunk in response.iter_content(1 << 16):
                            size += len(chunk)
                            if size > most:
                                raise DataError(f"{asked}: more than {most} bytes", "download and shrink it yourself")
                            if time.monotonic() - begun > WHOLE_SECONDS:
                                raise DataError(f"{asked}: not there after {WHOLE_SECONDS} s", "download it yourself")
                            file.write(chunk)
                    return target
    except (requests.RequestException, ValueError) as error:  # ValueError: a redirect to what is no address
        raise DataError(
            f"{asked}: cannot be downloaded ({type(error).__name__})", "check address and network"
        ) from error
    raise DataError(f"{asked}: more than {REDIRECTS} redirects", "name the final address")


def describe_times(path: Path, times: Sequence[float]) -> str:
    """The original LLaVA-NeXT-Video's sentence about a clip: how long it lasts and when its frames were taken.

    Args:
        path: the clip, in whose header stands how long its last frame is shown.
        times: seconds of each frame, first and last of the clip among them.
    """
    container, stream = open_clip(path)
    with container:
        rate = float(stream.average_rate or 0)
    seconds = times[-1] + (1 / rate if rate else 0.0)
    places = ",".join(f"{moment:.2f}s" for moment in times)
    return (
        f"The video lasts for {seconds:.2f} seconds, and {len(times)} frames are uniformly sampled from it. "
        f"These frames are located at {places}.Please answer the following questions related to this video."
    )

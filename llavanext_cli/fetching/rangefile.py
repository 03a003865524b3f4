"""A file on a server read in parts, as far as a zip needs it: one broken picture does not cost 19 GB."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import requests

from llavanext_cli.errors import FetchError
from llavanext_cli.fetching.archive import FILE, zip_members
from llavanext_cli.fetching.manifest import Member
from llavanext_cli.fetching.net import Net, TransferBrokenError, content_range
from llavanext_cli.fetching.paths import normal, unsafe

WINDOW = 64 << 10


class RangeFile(io.RawIOBase):
    """A remote file of a known size, read by ranges. Raises `OSError` when the server does not play along."""

    def __init__(self, net: Net, url: str, size: int):
        self._net, self._url, self._size, self._position = net, url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = 0) -> int:
        start = (0, self._position, self._size)[whence]
        self._position = max(0, start + position)
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            return 0
        wanted = f"bytes={self._position}-{self._position + count - 1}"
        response = self._net.session().get(self._url, headers={"Range": wanted}, stream=True)
        if response.status_code != 206 or content_range(response) != (self._position, self._size):
            response.close()
            raise OSError("no ranges")
        data = b"".join(response.iter_content(None))[:count]
        if len(data) != count:
            raise OSError("short range")
        buffer[:count] = data
        self._position += count
        return count


def unpack_members(
    net: Net, url: str, stage: Path, size: int, into: str, members: Sequence[Member]
) -> list[Member] | None:
    """Unpack some members of a zip, of which size and digest are known, into `stage`.

    Args:
        size: bytes of the archive at `url`.
        into: what stands in front of the members' paths.

    Returns:
        The members; None when that is not possible: no zip, no ranges, or not the same bytes as before.
    """
    todo = {member.path: member for member in members}
    found = []
    try:
        with io.BufferedReader(RangeFile(net, url, size), WINDOW) as file, zipfile.ZipFile(file) as archive:
            for entry in zip_members(archive):
                if entry.kind != FILE or unsafe(entry.name):
                    continue
                name = normal(entry.name)
                member = todo.pop(f"{into}/{name}" if into else name, None)
                if member is None:
                    continue
                if entry.size != member.size:
                    return None
                with entry.open() as stream:
                    data = stream.read(member.size + 1)
                if len(data) != member.size or hashlib.sha256(data).hexdigest() != member.sha256:
                    return None
                target = stage / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                found.append(member)
    except (
        FetchError,
        TransferBrokenError,
        requests.RequestException,
        zipfile.BadZipFile,
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
    ):
        return None
    return None if todo else found

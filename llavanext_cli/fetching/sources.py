"""The servers that the user chose, asked for listings and for files. Nothing else in `fetching` uses the network."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from llavanext_cli.errors import ConfigError
from llavanext_cli.fetching.download import Download, probe_size
from llavanext_cli.fetching.hub import Hub
from llavanext_cli.fetching.modelscope import ModelScope
from llavanext_cli.fetching.network import choose_endpoint, label, open_session
from llavanext_cli.fetching.registry import ARTIFACTS, HUB, MODELSCOPE, URL, Artifact, WebFile, public_address
from llavanext_cli.fetching.remote import Digests, Listing, Origin, RemoteFile, hash_file
from llavanext_cli.fetching.request import FetchRequest


class Sources:
    """Hugging Face, ModelScope and plain addresses, as one request wants them.

    Attributes:
        stop: set to end all downloads of plain addresses.
    """

    def __init__(self, request: FetchRequest):
        """Raises `ConfigError` for an endpoint that is not an address."""
        self.request = request
        self.stop = threading.Event()
        self.session = open_session(request.retries, request.jobs)
        self.endpoints = {
            source: choose_endpoint(source, request.endpoint if source == request.source else None)
            for source in (HUB, MODELSCOPE)
        }

    @cached_property
    def hub(self) -> Hub:
        return Hub(self.endpoints[HUB], self.request.timeout, self.request.retries)

    @cached_property
    def modelscope(self) -> ModelScope:
        return ModelScope(self.session, self.endpoints[MODELSCOPE], self.request.timeout)

    def list_files(self, artifact: Artifact) -> Listing:
        """What the source offers of an artifact.

        Raises:
            ConfigError: the artifact is not at this source, or has no revisions.
            FetchError: as `Hub.list_files`.
        """
        source, revision = self.request.source, self.request.revision
        place = artifact.place(source)
        if artifact.web is not None and (source == HUB or place is None):
            if revision:
                raise ConfigError(f"{artifact.name} is one file at an address: it has no revisions", "omit --revision")
            return self._list_address(artifact.web)
        if place is None:
            names = [name for name, other in ARTIFACTS.items() if other.place(source)]
            raise ConfigError(f"{artifact.name} is not available from {source}", f"available: {', '.join(names)}")
        if source == HUB:
            return self.hub.list_files(place, revision)
        listing = self.modelscope.list_files(place, revision)
        if artifact.web is None:
            return listing
        web = artifact.web  # another home of the same file: it must have the digest that is known
        files = (
            replace(file, size=web.size, sha256=web.sha256) if file.path == web.name else file for file in listing.files
        )
        return replace(listing, files=tuple(files))

    def _list_address(self, web: WebFile) -> Listing:
        size = web.size or probe_size(self.session, web.url, web.name, self.request.timeout)
        file = RemoteFile(web.name, Origin(URL, url=web.url), size, web.sha256)
        return Listing(URL, public_address(web.url), "", web.sha256, (file,))

    def download(self, file: RemoteFile, stage: Path) -> tuple[Path, Digests]:
        """Download a file into `stage`, a folder of its own, resuming what an earlier attempt left there.

        Returns:
            Its path in `stage`, and what it is; the caller compares that with what it must be.

        Raises:
            FetchError, OSError, StoppedError: as `Hub.download` and `Download.run`.
        """
        stage.mkdir(parents=True, exist_ok=True)
        if file.origin.source == HUB:
            path = self.hub.download(file.origin, stage)
            return path, hash_file(path, git=bool(file.git_blob))
        url = self.modelscope.file_url(file.origin) if file.origin.source == MODELSCOPE else file.origin.url
        path = stage / "file"
        sha256 = Download(
            self.session,
            url,
            path,
            file.origin.path or label(url),
            size=file.size,
            pinned=bool(file.sha256),
            timeout=self.request.timeout,
            retries=self.request.retries,
            stop=self.stop,
        ).run()
        return path, Digests(path.stat().st_size, sha256)

"""The network of one run, set up: whose token goes where, and errors on their way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from llavanext_cli.errors import ConfigError
from llavanext_cli.fetching.endpoint import hub_endpoint, modelscope_endpoint
from llavanext_cli.fetching.faults import explain_other
from llavanext_cli.fetching.modelscope import modelscope_cookies
from llavanext_cli.fetching.net import Limits, Net
from llavanext_cli.fetching.redaction import no_secrets
from llavanext_cli.fetching.registry import HUB, MODELSCOPE, SOURCES


@contextmanager
def open_network(
    source: str,
    endpoint: str | None,
    limits: Limits | None,
    note: Callable[[str], None],
    folder: Path,
) -> Iterator[Net]:
    """A `Net` whose tokens go to the chosen servers only.

    What huggingface_hub, requests and the operating system raise leaves as our errors, without secrets.

    Args:
        source, endpoint: as given by the user.
        folder: named in errors about the disk.

    Raises:
        ConfigError: no such source, or an endpoint that is no address.
    """
    if source not in SOURCES:
        raise ConfigError(f"no source is called {source!r}", f"Sources are {' and '.join(SOURCES)}.")
    hub = hub_endpoint(endpoint if source == HUB else None)
    modelscope = modelscope_endpoint(endpoint if source == MODELSCOPE else None)
    net = Net(limits or Limits(), frozenset([urlsplit(hub).netloc]), modelscope_cookies(modelscope), note)
    with no_secrets(), net.entered:
        try:
            yield net
        except Exception as fault:
            error = explain_other(fault, folder)
            if error is None or error is fault:
                raise
            raise error from error.__cause__

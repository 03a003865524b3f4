"""Nothing secret leaves `fetch`: not in a message, a manifest, a log or a traceback.

Secrets are the tokens in the environment and in the Hub's token file, the user and password inside an address, and
the signature in the query of a signed one.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qsl, urlsplit

from llavanext_cli.errors import LlavaNextError

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")
_SECRET_NAME = re.compile(r"token|secret|sig|key|passw|auth|credential|session|policy|expires", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/\s@'\"]+@")
_QUERY = re.compile(r"(https?://[^\s'\"<>?#]+|(?<=[\s'\"])/[^\s'\"<>?#]*)\?[^\s'\"<>)]*")
_BEARER = re.compile(r"(?i)\b(bearer|basic|token)\s+[A-Za-z0-9._~+/=-]{8,}")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")  # theirs have 34 letters after the hf_


def redact(text: str) -> str:
    """The text without tokens, without `user:password@` in addresses, and without their queries."""
    for variable in TOKEN_VARIABLES:
        token = os.environ.get(variable, "").strip()
        if len(token) >= 4:
            text = text.replace(token, "***")
    text = _USER_INFO.sub("***@", text)
    text = _QUERY.sub(r"\1?…", text)
    text = _BEARER.sub(r"\1 ***", text)
    return _HUB_TOKEN.sub("hf_***", text)


def public_url(url: str) -> str:
    """The address as it may be written down: no user, no password, and no query that holds a secret.

    A query such as `?id=7` stays, because the file cannot be found again without it.
    """
    parts = urlsplit(url)
    query = parts.query
    if any(_SECRET_NAME.search(name) or len(value) > 40 for name, value in parse_qsl(query, keep_blank_values=True)):
        query = ""
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query, fragment="").geturl()


class Cause(Exception):
    """What another library said, redacted: the `__cause__` that `-v` shows."""


def cause_of(fault: BaseException) -> Cause:
    return Cause(redact(f"{type(fault).__name__}: {fault}"))


@contextmanager
def no_secrets() -> Iterator[None]:
    """Redact exceptions that pass through, and the log records that are written meanwhile.

    Our own errors are redacted when they are made; this is for bugs, whose traceback is shown as it is.
    """
    handlers = [*logging.getLogger().handlers, *logging.getLogger("huggingface_hub").handlers]
    screen = _Screen()
    for handler in handlers:
        handler.addFilter(screen)
    try:
        yield
    except LlavaNextError:
        raise
    except Exception as bug:
        _clean(bug, set())
        raise
    finally:
        for handler in handlers:
            handler.removeFilter(screen)


class _Screen(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        return True


def _clean(fault: BaseException | None, seen: set[int]) -> None:
    if fault is None or id(fault) in seen:
        return
    seen.add(id(fault))
    fault.args = tuple(_clean_value(value) for value in fault.args)
    _clean(fault.__cause__, seen)
    _clean(fault.__context__, seen)


def _clean_value(value: object) -> object:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, BaseException):
        _clean(value, set())
        return value
    text = repr(value)
    return value if redact(text) == text else redact(text)

"""From what requests, huggingface_hub and the operating system raise to one line and a hint."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import requests

from llavanext_cli.errors import ConfigError, FetchError, LlavaNextError
from llavanext_cli.fetching.redaction import cause_of, redact

ELSEWHERE = (
    "Check the address and the network. A repository may also be had from a mirror (HF_ENDPOINT=https://…, --endpoint) "
    "or with --source modelscope."
)

CERTIFICATES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""The variables that requests reads, in this order."""


class UnreachableError(FetchError):
    """No answer at all: the network, the name service or a proxy is to blame, not what was asked for."""


def is_lasting(fault: requests.RequestException) -> bool:
    """Whether trying again cannot help: a certificate that is not trusted, an address that is none."""
    lasting = (
        requests.exceptions.SSLError,
        requests.exceptions.InvalidURL,
        requests.exceptions.InvalidSchema,
        requests.exceptions.MissingSchema,
        requests.exceptions.InvalidProxyURL,
        requests.exceptions.InvalidHeader,
    )
    return isinstance(fault, lasting)


def explain_no_answer(fault: requests.RequestException, url: str | None) -> UnreachableError:
    """The error for a request that got no answer, or half of one."""
    parts = urlsplit(url or "")
    host = parts.hostname or "the server"
    reason = _chain(fault)
    kinds = {type(link).__name__ for link in reason}
    text = " ".join(str(link) for link in reason)
    if isinstance(fault, requests.exceptions.InvalidProxyURL | requests.exceptions.ProxyError):
        return UnreachableError(
            f"the proxy between here and {host} does not work",
            "Check HTTP_PROXY, HTTPS_PROXY and NO_PROXY.",
        )
    if isinstance(fault, requests.exceptions.InvalidSchema) and "SOCKS" in text:
        return UnreachableError("a SOCKS proxy is set, and the package for it is missing", "Run `pip install pysocks`.")
    if isinstance(fault, requests.exceptions.ChunkedEncodingError):
        return UnreachableError(f"{host} does not finish its answer: {redact(str(fault))[:200]}", ELSEWHERE)
    if isinstance(fault, requests.exceptions.SSLError):
        return UnreachableError(
            f"the certificate of {host} is not trusted",
            "Behind a company proxy, point REQUESTS_CA_BUNDLE to its certificate file. Is the clock right?",
        )
    if "NameResolutionError" in kinds or "gaierror" in kinds or "Name or service not known" in text:
        return UnreachableError(f"there is no host called {host} (DNS)", ELSEWHERE)
    if isinstance(fault, requests.Timeout):
        return UnreachableError(f"{host} does not answer", f"{ELSEWHERE} A slow line needs a larger --timeout.")
    if "refused" in text.lower():
        port = f":{parts.port}" if parts.port else ""
        return UnreachableError(f"{host}{port} refuses the connection", ELSEWHERE)
    if isinstance(fault, requests.TooManyRedirects):
        return UnreachableError(f"{host} redirects in a circle", "Use another --endpoint or source.")
    if isinstance(fault, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema):
        return UnreachableError(f"{redact(url or '')!r} is no address to download from", "Write https://host/path.")
    return UnreachableError(f"{host} cannot be reached", ELSEWHERE)


def explain_certificates() -> LlavaNextError:
    """The error for a file of certificates that requests cannot open."""
    variable = next((name for name in CERTIFICATES if os.environ.get(name)), CERTIFICATES[0])
    return ConfigError(
        f"{variable} names no file of certificates: {os.environ.get(variable, '')!r}",
        "Point it to a PEM file, or unset it.",
    )


def explain_disk(fault: OSError, path: Path | str) -> LlavaNextError:
    """The error for a file that cannot be written or read."""
    where = fault.filename2 or fault.filename or path  # of a renaming, what it was to become
    if fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return FetchError(
            f"the disk is full: {where}",
            "Make room and run the same command: what has arrived is kept.",
        )
    if fault.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FetchError(
            f"cannot write to {where}: {os.strerror(fault.errno)}", "Is it read-only? Or use another folder."
        )
    if fault.errno == errno.EFBIG:
        return FetchError(f"{where} is larger than this disk or this shell's limit allows", "See `ulimit -f`.")
    if fault.errno == errno.ENAMETOOLONG:
        return FetchError(f"a file name is too long for this disk: {str(where)[:80]}…", "Choose a shorter --to.")
    reason = os.strerror(fault.errno) if fault.errno else redact(str(fault))
    return FetchError(f"cannot use {where}: {reason}", "Check the folder and the disk.")


def explain_other(fault: Exception, path: Path | str) -> LlavaNextError | None:
    """The error for whatever reached the top of a run; None when it is a bug of ours and keeps its traceback."""
    if isinstance(fault, LlavaNextError):
        return fault
    if isinstance(fault, requests.RequestException):
        error: LlavaNextError = explain_no_answer(fault, getattr(fault.request, "url", None))
    elif isinstance(fault, OSError) and fault.errno:
        error = explain_disk(fault, path)
    elif isinstance(fault, UnicodeEncodeError) and _is_of_file_names(fault):
        error = FetchError(
            f"{str(fault.object)!a} cannot be the name of a file in this locale ({fault.encoding})",
            "Run the command with PYTHONUTF8=1, or in a UTF-8 locale such as C.UTF-8.",
        )
    else:
        return None
    error.__cause__ = cause_of(fault)
    return error


def _is_of_file_names(fault: UnicodeEncodeError) -> bool:
    """Whether the operating system's names were the matter, and not a header or a text."""
    encoding = codecs.lookup(sys.getfilesystemencoding())
    return encoding.name != "utf-8" and codecs.lookup(fault.encoding).name == encoding.name


def _chain(fault: BaseException) -> list[BaseException]:
    """The exception and all that it wraps, by cause, by context, by `reason`, or as an argument."""
    found: list[BaseException] = []
    todo: list[object] = [fault]
    while todo:
        link = todo.pop()
        if isinstance(link, BaseException) and not any(link is other for other in found):
            found.append(link)
            todo += [link.__cause__, link.__context__, getattr(link, "reason", None), *link.args]
    return found


def explain_status(response: requests.Response, url: str) -> FetchError:
    """The error for an answer that holds no file; closes it."""
    status, host = response.status_code, urlsplit(url).hostname
    response.close()
    if status in (404, 410):
        return FetchError(f"{host} has no {urlsplit(url).path}", "Is the address right?")
    if status in (401, 403, 407):
        return FetchError(
            f"{host} does not give out {file_label(url)} (HTTP {status})", "It may want a login or a token."
        )
    return FetchError(f"{host} answers HTTP {status} for {file_label(url)}", "Use another source, or try later.")


def file_label(url: str) -> str:
    """A short name for messages: no query, which may hold a signature."""
    parts = urlsplit(url)
    inside = parse_qs(parts.query).get("FilePath", [""])[0]  # ModelScope's addresses name the file there
    return inside or unquote(parts.path.rpartition("/")[2]) or url.partition("?")[0]

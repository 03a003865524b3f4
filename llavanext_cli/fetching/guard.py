"""Which address a redirect may lead to.

A server chooses where its redirects go, so they are checked: only http and https, never from https down to http, and
never from the public net to an address that only this machine or its own network can see.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

from llavanext_cli.errors import FetchError

PUBLIC, PRIVATE, UNKNOWN = "public", "private", "unknown"
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".lan", ".home.arpa")


def is_proxied(url: str) -> bool:
    """Whether the environment names a proxy for an address."""
    from requests.utils import get_environ_proxies, select_proxy

    return bool(select_proxy(url, get_environ_proxies(url)))


def check_redirect(origin: str, location: str, *, is_proxied: Callable[[str], bool]) -> None:
    """Refuse a redirect that leads where it must not.

    Args:
        origin: the address that answered with the redirect.
        location: where it points to; may be relative.
        is_proxied: whether an address is reached through a proxy, which looks its name up itself.

    Raises:
        FetchError: the redirect is refused.
    """
    source = urlsplit(origin)
    try:
        target = urlsplit(urljoin(origin, location))
        host = target.hostname
    except ValueError:
        host, target = None, urlsplit("")
    if target.scheme not in ("http", "https") or not host:
        raise FetchError(
            f"{source.hostname} redirects to an address that is not on the web ({target.scheme or 'none'}://)",
            "The server, or a proxy on the way, is misbehaving: use another --endpoint or source.",
        )
    if source.scheme == "https" and target.scheme == "http":
        raise FetchError(
            f"{source.hostname} redirects from https to http ({host})",
            "What comes over http can be changed on the way: use another --endpoint or source.",
        )
    if source.hostname == host:
        return
    if reach_of(host, resolve=not is_proxied(target.geturl())) != PRIVATE:
        return
    if reach_of(source.hostname or "", resolve=not is_proxied(origin)) != PRIVATE:
        raise FetchError(
            f"{source.hostname} is public and redirects to the private address {host}",
            "If that is your own mirror, name it directly with --endpoint.",
        )


def reach_of(host: str, *, resolve: bool) -> str:
    """PUBLIC, PRIVATE (loopback, link-local, a private or reserved range) or UNKNOWN (a name not looked up)."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(_LOCAL_SUFFIXES):
        return PRIVATE
    literal = _address(name)
    if literal is not None:
        return PRIVATE if _is_private(literal) else PUBLIC
    if not resolve:
        return UNKNOWN
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return UNKNOWN
    addresses = [_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    return PRIVATE if any(a is not None and _is_private(a) for a in addresses) else PUBLIC


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Also the spellings that only the C library knows: 127.1, 0x7f000001, 2130706433."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(text))
    except (OSError, ValueError, UnicodeError):
        return None


def _is_private(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if inner is not None:
        return _is_private(inner)
    return not address.is_global or address.is_multicast

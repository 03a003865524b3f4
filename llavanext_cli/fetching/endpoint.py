"""Which server is asked, and with which token: options and environment, checked before anything is sent."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from llavanext_cli.errors import ConfigError
from llavanext_cli.fetching import guard
from llavanext_cli.fetching.registry import HUB, MODELSCOPE

MODELSCOPE_ENDPOINT = "https://www.modelscope.cn"
VARIABLES = {HUB: "HF_ENDPOINT", MODELSCOPE: "MODELSCOPE_DOMAIN"}
"""Source → the environment variable that names its server."""
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_PROXY_SCHEMES = ("http", "https", "socks4", "socks4a", "socks5", "socks5h")


def hub_endpoint(endpoint: str | None) -> str:
    """The server to ask: the option, HF_ENDPOINT, or the Hub itself.

    Raises:
        ConfigError: it is no http(s) address.
    """
    for variable in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):  # which huggingface_hub reads when imported
        if not os.environ.get(variable, "0").strip().isdecimal():
            raise ConfigError(f"{variable} is no number of seconds", f"Unset {variable}, or write {variable}=30.")
    from huggingface_hub import constants

    return chosen_endpoint(HUB, endpoint) or checked_endpoint(constants._HF_DEFAULT_ENDPOINT)


def modelscope_endpoint(endpoint: str | None) -> str:
    """The server to ask: the option, MODELSCOPE_DOMAIN, or ModelScope itself. Raises `ConfigError`."""
    return chosen_endpoint(MODELSCOPE, endpoint) or MODELSCOPE_ENDPOINT


def chosen_endpoint(source: str, endpoint: str | None) -> str | None:
    """The server that the user wants in place of the usual one: the option, or else the environment's; None for none.

    Raises:
        ConfigError: it is no http(s) address.
    """
    address = os.environ.get(VARIABLES[source], "").strip()
    if source == MODELSCOPE and address and "://" not in address:
        address = f"https://{address}"  # the variable holds a domain
    address = endpoint or address
    return checked_endpoint(address) if address else None


def checked_endpoint(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint.strip())
        good = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment
        _ = parts.port
    except ValueError:
        good = False
    if not good:
        raise ConfigError(
            "an endpoint is an address such as https://host", "See --endpoint, HF_ENDPOINT and MODELSCOPE_DOMAIN."
        )
    if "@" in parts.netloc:
        raise ConfigError("an endpoint must not hold a user or password", "Put the token into HF_TOKEN.")
    return endpoint.strip().rstrip("/")


def check_proxy(address: str) -> None:
    """Raises `ConfigError` for a proxy that is no address, and names the variable that holds it."""
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        good = parts.scheme in _PROXY_SCHEMES and parts.hostname and address.isascii() and " " not in address
        _ = parts.port
    except ValueError:
        good = False
    if not good:
        names = [name for name, value in os.environ.items() if name.lower() in _PROXIES and value == address]
        variable = names[0] if names else "HTTPS_PROXY"
        raise ConfigError(f"{variable} holds no address of a proxy", f"Example: {variable}=http://host:3128")


def hub_token(endpoint: str) -> str | bool:
    """The token for this endpoint, or False: it is never sent in the clear to a public address."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return False
    parts = urlsplit(endpoint)
    if parts.scheme == "http" and guard.reach_of(parts.hostname or "", resolve=True) != guard.PRIVATE:
        return False
    try:
        token = get_token() or ""
    except UnicodeDecodeError:
        raise ConfigError(f"{constants.HF_TOKEN_PATH} holds no token", "Is HF_TOKEN_PATH right?") from None
    return checked_token(token, "HF_TOKEN") or False


def checked_token(token: str, variable: str) -> str:
    """Raises `ConfigError` for a token that could not be sent: something else was pasted."""
    if not (token.isascii() and token.isprintable()) or set(token) & set(' ;,"\\'):
        raise ConfigError(f"the token in {variable} holds characters that no token has", "Copy it again.")
    return token

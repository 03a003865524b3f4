"""Nothing in these tests may reach a real network, the user's token or the user's cache."""

from __future__ import annotations

import pytest

from llavanext_cli.fetching.net import Limits, Net


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path_factory):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "HF_ENDPOINT", "MODELSCOPE_DOMAIN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    home = tmp_path_factory.mktemp("hf-home")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))


@pytest.fixture
def limits() -> Limits:
    """Quick to give up, so that a test that shows how takes seconds."""
    return Limits(connect=2.0, stall=1.0, retries=2, pause=0.02, longest_wait=3.0)


@pytest.fixture
def net(limits) -> Net:
    return Net(limits)

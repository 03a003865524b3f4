"""The memory that workers of `mix` put their lines into."""

from __future__ import annotations

import os

import pytest

from llavanext_cli.mixing.spool import SLOT_BYTES, Spool, put


@pytest.mark.parametrize("has_memory", [True, False])
def test_slots_keep_what_was_put_into_them(monkeypatch, has_memory):
    if not has_memory:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    full = os.urandom(SLOT_BYTES)
    with Spool() as spool:
        assert put(spool.fd, 2, full) and put(spool.fd, 1, b"lines") and put(spool.fd, 0, b"")
        assert spool.take(1, 5) == b"lines" and spool.take(2, SLOT_BYTES) == full
        assert put(spool.fd, 2, b"others") and spool.take(2, 6) == b"others"
    with pytest.raises(OSError):
        os.fstat(spool.fd)


def test_what_does_not_fit_is_refused():
    with Spool() as spool:
        assert not put(spool.fd, 0, bytes(SLOT_BYTES + 1))
    with open(os.devnull, "rb") as unwritable:
        assert not put(unwritable.fileno(), 0, b"lines")

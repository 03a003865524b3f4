"""Sizes and times as people read them."""

import pytest

from llavanext_cli.units import format_memory, format_seconds, format_size, parse_size


def test_sizes_are_written() -> None:
    assert [format_size(n) for n in (0, 999, 386_432, 14_126_862_336)] == ["0 B", "999 B", "386 kB", "14.1 GB"]
    assert [format_size(n) for n in (999_700, 999_400, 3 * 10**12)] == ["1 MB", "999 kB", "3 TB"]


def test_times_are_written() -> None:
    assert [format_seconds(s) for s in (0.4, 59, 61, 7265)] == ["0 s", "59 s", "1 min 01 s", "2 h 01 min"]


def test_memory_of_a_device_is_written_as_mindspore_counts_it() -> None:
    assert [format_memory(n) for n in (57 << 30, 3_533_000_000, 3 << 20)] == ["57 GB", "3.29 GB", "3 MB"]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 << 29), ("2g", 2 * 10**9), ("64", 64)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 apples", "0GB", "0.1", "5GBB", "9" * 400])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write it as 5GB"):
        parse_size(text)

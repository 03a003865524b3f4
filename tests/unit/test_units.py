"""Sizes and times as people read them."""

from llavanext_cli.units import format_memory, format_seconds, format_size


def test_sizes_are_written() -> None:
    assert [format_size(n) for n in (0, 999, 386_432, 14_126_862_336)] == ["0 B", "999 B", "386 kB", "14.1 GB"]
    assert [format_size(n) for n in (999_700, 999_400, 3 * 10**12)] == ["1 MB", "999 kB", "3 TB"]


def test_times_are_written() -> None:
    assert [format_seconds(s) for s in (0.4, 59, 61, 7265)] == ["0 s", "59 s", "1 min 01 s", "2 h 01 min"]


def test_memory_of_a_device_is_written_as_mindspore_counts_it() -> None:
    assert [format_memory(n) for n in (57 << 30, 3_533_000_000, 3 << 20)] == ["57 GB", "3.29 GB", "3 MB"]

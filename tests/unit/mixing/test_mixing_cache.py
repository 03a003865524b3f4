"""Remembered results: found again while file and question are the same; a cache that fails never stops a mix."""

from __future__ import annotations

import sqlite3

import pytest

from llavanext_cli.mixing.cache import CheckCache
from llavanext_cli.mixing.check_result import CheckResult, FileState

A, B = FileState(10, 1), FileState(20, 2)
GOOD = CheckResult(size=(3, 4))
BAD = CheckResult("corrupt", "does not decode")
VIDEO = CheckResult(size=(3, 4), frames=30, seconds=1.5)


def add(cache, rows, level, frames):
    """Rows of (kind, path, state, result)."""
    cache.add([((kind, path), state, result) for kind, path, state, result in rows], level, frames)


def find(cache, kind, states, level, frames):
    """Path → result, for files of one kind."""
    found = cache.find({(kind, path): state for path, state in states.items()}, level, frames)
    return {path: result for (_, path), result in found.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl.cache"


def test_found_again(path):
    cache = CheckCache(path)
    add(cache, [("image", "/d/é 'a'.jpg", A, GOOD), ("image", "/d/b.jpg", B, BAD)], "header", 16)
    add(cache, [("video", "/d/c.mp4", A, VIDEO)], "full", 16)
    cache.close()
    cache = CheckCache(path)
    assert cache.is_kept
    assert find(cache, "image", {"/d/é 'a'.jpg": A, "/d/b.jpg": B, "/d/none.jpg": A}, "header", 16) == {
        "/d/é 'a'.jpg": GOOD,
        "/d/b.jpg": BAD,
    }
    assert find(cache, "video", {"/d/c.mp4": A}, "full", 16) == {"/d/c.mp4": VIDEO}
    cache.close()


def test_a_cache_without_results_is_removed(path):
    cache = CheckCache(path)
    add(cache, [("image", "/a", A, CheckResult("missing", "why"))], "header", 16)
    cache.close()
    assert not path.exists()
    cache = CheckCache(path)
    add(cache, [("image", "/a", A, BAD)], "header", 16)
    cache.close()
    CheckCache(path).close()
    assert path.exists()


def test_forgotten_when_the_file_or_the_question_changes(path):
    cache = CheckCache(path)
    add(cache, [("image", "/a", A, GOOD)], "header", 16)
    add(cache, [("image", "/b", A, GOOD), ("video", "/c", A, VIDEO)], "full", 16)
    assert find(cache, "image", {"/a": FileState(10, 9)}, "header", 16) == {}
    assert find(cache, "image", {"/a": FileState(9, 1)}, "header", 16) == {}
    assert find(cache, "image", {"/a": A}, "full", 16) == {}, "a header says nothing about decoding"
    assert find(cache, "video", {"/a": A}, "header", 16) == {}
    assert find(cache, "image", {"/b": A}, "header", 8) == {"/b": GOOD}, "the thorough check answers the quick one"
    assert find(cache, "video", {"/c": A}, "full", 32) == {}, "other frames of the video"
    assert find(cache, "video", {"/c": A}, "header", 32) == {"/c": VIDEO}
    add(cache, [("image", "/a", A, BAD)], "full", 16)
    assert find(cache, "image", {"/a": A}, "full", 16) == {"/a": BAD}
    cache.close()


def test_results_that_do_not_depend_on_the_content_are_not_remembered(path):
    reasons = ["missing", "unreadable", "crashed", "timeout", "corrupt", "too_large", "no_frames", "false_count"]
    cache = CheckCache(path)
    add(cache, [("image", f"/{reason}", A, CheckResult(reason, "why")) for reason in reasons], "full", 16)
    assert sorted(find(cache, "image", {f"/{reason}": A for reason in reasons}, "full", 16)) == [
        "/corrupt",
        "/false_count",
        "/no_frames",
        "/too_large",
    ]
    cache.close()


@pytest.mark.parametrize("content", ["text", "database", "database with our table's name"])
def test_a_file_of_others_is_left_alone(path, content):
    if content == "text":
        path.write_text("hello, this is not a database at all " * 100)
    else:
        database = sqlite3.connect(path)
        database.execute("CREATE TABLE media (something TEXT)" if "table" in content else "CREATE TABLE notes (t TEXT)")
        database.commit()
        database.close()
    before = path.read_bytes()
    cache = CheckCache(path)
    assert cache.is_foreign and not cache.is_kept
    add(cache, [("image", "/a", A, GOOD)], "header", 16)
    assert find(cache, "image", {"/a": A}, "header", 16) == {"/a": GOOD}, "for this run"
    cache.close()
    assert path.read_bytes() == before


def test_a_damaged_cache_is_replaced(path):
    rows = [("image", f"/{'x' * 200}/{number}", A, GOOD) for number in range(500)]
    cache = CheckCache(path)
    add(cache, rows, "header", 16)
    cache.close()
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    cache = CheckCache(path)
    assert find(cache, "image", {row[1]: A for row in rows}, "header", 16) == {}
    add(cache, [("image", "/a", A, GOOD)], "header", 16)
    cache.close()
    assert cache.is_kept
    cache = CheckCache(path)
    assert find(cache, "image", {"/a": A}, "header", 16) == {"/a": GOOD}
    cache.close()


def test_a_cache_in_use_is_left_alone(path):
    first = CheckCache(path)
    add(first, [("image", "/a", A, GOOD)], "header", 16)
    second = CheckCache(path)
    assert not second.is_kept
    add(second, [("image", "/b", A, GOOD)], "header", 16)
    assert find(second, "image", {"/a": A, "/b": A}, "header", 16) == {"/b": GOOD}
    second.close()
    first.close()
    assert find(CheckCache(path), "image", {"/a": A, "/b": A}, "header", 16) == {"/a": GOOD}


def test_a_folder_that_cannot_be_written(tmp_path):
    cache = CheckCache(tmp_path / "nowhere" / "cache")
    assert not cache.is_kept
    add(cache, [("image", "/a", A, GOOD)], "header", 16)
    assert find(cache, "image", {"/a": A}, "header", 16) == {"/a": GOOD}
    cache.close()


def test_a_full_disk_does_not_stop_a_mix(path):
    cache = CheckCache(path)
    cache._database.execute("PRAGMA max_page_count = 8")
    rows = [("image", f"/{'x' * 200}/{number}", A, GOOD) for number in range(500)]
    add(cache, rows, "header", 16)
    assert not cache.is_kept
    add(cache, [("image", "/b", A, GOOD)], "header", 16)
    assert find(cache, "image", {"/b": A}, "header", 16) == {"/b": GOOD}
    cache.close()


def test_another_version_is_forgotten(path):
    cache = CheckCache(path)
    add(cache, [("image", "/a", A, GOOD)], "header", 16)
    cache.close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.execute("DROP TABLE media")
    database.execute("CREATE TABLE media (something TEXT)")
    database.commit()
    database.close()
    cache = CheckCache(path)
    add(cache, [("image", "/a", A, GOOD)], "header", 16)
    assert cache.is_kept and find(cache, "image", {"/a": A}, "header", 16) == {"/a": GOOD}
    cache.close()

"""Remembered verdicts: found again as long as file and question are the same; a cache that fails stops nothing."""

from __future__ import annotations

import sqlite3

import pytest

from llavanext_cli.mixing.cache import VerdictCache
from llavanext_cli.mixing.media import FileState, Verdict

A, B = FileState(10, 1), FileState(20, 2)
GOOD = Verdict(size=(3, 4))
BAD = Verdict("corrupt", "does not decode")
CLIP = Verdict(size=(3, 4), frames=30, seconds=1.5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl.cache"


def test_found_again(path):
    cache = VerdictCache(path)
    cache.add([("image", "/d/é 'a'.jpg", A, GOOD), ("image", "/d/b.jpg", B, BAD)], "header", 16)
    cache.add([("video", "/d/c.mp4", A, CLIP)], "full", 16)
    cache.close()
    cache = VerdictCache(path)
    assert cache.is_kept
    assert cache.find("image", {"/d/é 'a'.jpg": A, "/d/b.jpg": B, "/d/none.jpg": A}, "header", 16) == {
        "/d/é 'a'.jpg": GOOD,
        "/d/b.jpg": BAD,
    }
    assert cache.find("video", {"/d/c.mp4": A}, "full", 16) == {"/d/c.mp4": CLIP}
    cache.close()


def test_a_cache_without_a_verdict_goes_and_another_stays(path):
    cache = VerdictCache(path)
    cache.add([("image", "/a", A, Verdict("missing", "why"))], "header", 16)
    cache.close()
    assert not path.exists()
    cache = VerdictCache(path)
    cache.add([("image", "/a", A, BAD)], "header", 16)
    cache.close()
    VerdictCache(path).close()
    assert path.exists()


def test_forgotten_when_the_file_or_the_question_changes(path):
    cache = VerdictCache(path)
    cache.add([("image", "/a", A, GOOD)], "header", 16)
    cache.add([("image", "/b", A, GOOD), ("video", "/c", A, CLIP)], "full", 16)
    assert cache.find("image", {"/a": FileState(10, 9)}, "header", 16) == {}
    assert cache.find("image", {"/a": FileState(9, 1)}, "header", 16) == {}
    assert cache.find("image", {"/a": A}, "full", 16) == {}, "a header tells nothing about decoding"
    assert cache.find("video", {"/a": A}, "header", 16) == {}
    assert cache.find("image", {"/b": A}, "header", 8) == {"/b": GOOD}, "the thorough check answers the quick one"
    assert cache.find("video", {"/c": A}, "full", 32) == {}, "other frames of the clip"
    assert cache.find("video", {"/c": A}, "header", 32) == {"/c": CLIP}
    cache.add([("image", "/a", A, BAD)], "full", 16)
    assert cache.find("image", {"/a": A}, "full", 16) == {"/a": BAD}
    cache.close()


def test_verdicts_that_do_not_lie_in_the_file_are_not_remembered(path):
    reasons = ["missing", "unreadable", "crashed", "timeout", "corrupt", "too_large", "no_frames", "false_count"]
    cache = VerdictCache(path)
    cache.add([("image", f"/{reason}", A, Verdict(reason, "why")) for reason in reasons], "full", 16)
    assert sorted(cache.find("image", {f"/{reason}": A for reason in reasons}, "full", 16)) == [
        "/corrupt",
        "/false_count",
        "/no_frames",
        "/too_large",
    ]
    cache.close()


@pytest.mark.parametrize("content", ["text", "database", "database with our table's name"])
def test_what_is_no_cache_of_ours_is_left_alone(path, content):
    if content == "text":
        path.write_text("hello, this is not a database at all " * 100)
    else:
        database = sqlite3.connect(path)
        database.execute("CREATE TABLE media (something TEXT)" if "table" in content else "CREATE TABLE notes (t TEXT)")
        database.commit()
        database.close()
    before = path.read_bytes()
    cache = VerdictCache(path)
    assert cache.is_strange and not cache.is_kept
    cache.add([("image", "/a", A, GOOD)], "header", 16)
    assert cache.find("image", {"/a": A}, "header", 16) == {"/a": GOOD}, "for this run"
    cache.close()
    assert path.read_bytes() == before


def test_a_damaged_cache_is_made_anew_whenever_that_comes_out(path):
    rows = [("image", f"/{'x' * 200}/{number}", A, GOOD) for number in range(500)]
    cache = VerdictCache(path)
    cache.add(rows, "header", 16)
    cache.close()
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    cache = VerdictCache(path)
    assert cache.find("image", {row[1]: A for row in rows}, "header", 16) == {}
    cache.add([("image", "/a", A, GOOD)], "header", 16)
    cache.close()
    assert cache.is_kept
    cache = VerdictCache(path)
    assert cache.find("image", {"/a": A}, "header", 16) == {"/a": GOOD}
    cache.close()


def test_a_cache_of_version_1_is_recognised_and_forgotten(path):
    """It had no mark, and its checks passed some clips that are damaged."""
    cache = VerdictCache(path)
    cache.add([("image", "/a", A, GOOD)], "header", 16)
    cache._database.execute("COMMIT")
    cache._database.execute("PRAGMA user_version = 1")
    cache._database.execute("PRAGMA application_id = 0")
    cache._database.close()
    cache = VerdictCache(path)
    assert cache.is_kept and cache.find("image", {"/a": A}, "header", 16) == {}
    cache.close()


def test_a_cache_in_use_is_left_alone(path):
    first = VerdictCache(path)
    first.add([("image", "/a", A, GOOD)], "header", 16)
    second = VerdictCache(path)
    assert not second.is_kept
    second.add([("image", "/b", A, GOOD)], "header", 16)
    assert second.find("image", {"/a": A, "/b": A}, "header", 16) == {"/b": GOOD}
    second.close()
    first.close()
    assert VerdictCache(path).find("image", {"/a": A, "/b": A}, "header", 16) == {"/a": GOOD}


def test_a_folder_that_cannot_be_written(tmp_path):
    cache = VerdictCache(tmp_path / "nowhere" / "cache")
    assert not cache.is_kept
    cache.add([("image", "/a", A, GOOD)], "header", 16)
    assert cache.find("image", {"/a": A}, "header", 16) == {"/a": GOOD}
    cache.close()


def test_a_full_disk_stops_nothing(path):
    cache = VerdictCache(path)
    cache._database.execute("PRAGMA max_page_count = 8")
    rows = [("image", f"/{'x' * 200}/{number}", A, GOOD) for number in range(500)]
    cache.add(rows, "header", 16)
    assert not cache.is_kept
    cache.add([("image", "/b", A, GOOD)], "header", 16)
    assert cache.find("image", {"/b": A}, "header", 16) == {"/b": GOOD}
    cache.close()


def test_an_older_form_is_forgotten(path):
    cache = VerdictCache(path)
    cache.add([("image", "/a", A, GOOD)], "header", 16)
    cache.close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.execute("DROP TABLE media")
    database.execute("CREATE TABLE media (something TEXT)")
    database.commit()
    database.close()
    cache = VerdictCache(path)
    cache.add([("image", "/a", A, GOOD)], "header", 16)
    assert cache.is_kept and cache.find("image", {"/a": A}, "header", 16) == {"/a": GOOD}
    cache.close()

"""Cutting files into chunks: nothing lost, nothing taken apart, and faults named by line and column."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavanext_cli.errors import DataError
from llavanext_cli.mixing.json_index import CHUNK_BYTES, index_chunks, record_lines, split_records

NASTY = '}, {"id": 1}, {"id": ["'
texts = st.one_of(st.text(max_size=30), st.sampled_from([NASTY, '\\"', "}\n,{", "\\", "<image>\n", "\u2028"]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
records = st.dictionaries(st.sampled_from(["id", "image", "conversations", "model"]), values, max_size=4)


def read_back(path, chunk_bytes: int) -> list:
    """Every record, through the chunks; checks on the way that chunks follow each other."""
    found, position = [], 0
    with path.open("rb") as file:
        for chunk in index_chunks(path, chunk_bytes):
            data = chunk.read(file)
            parts = split_records(data, chunk.lines)
            assert (chunk.first, len(parts)) == (len(found), chunk.count)
            assert chunk.offset >= position
            position = chunk.offset + chunk.length
            found += [json.loads(bytes(part)) for part in parts]
    return found


@given(content=st.lists(records, max_size=12), indent=st.sampled_from([None, 0, 2]), size=st.integers(16, 400))
def test_an_array_comes_back_whole(tmp_path_factory, content, indent, size):
    path = tmp_path_factory.mktemp("a") / "a.json"
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert read_back(path, size) == content


@given(content=st.lists(values, min_size=1, max_size=8), size=st.integers(16, 200))
def test_an_array_of_anything_comes_back_whole(tmp_path_factory, content, size):
    path = tmp_path_factory.mktemp("a") / "a.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_back(path, size) == content


@given(content=st.lists(records, min_size=1, max_size=12), blanks=st.integers(0, 2), size=st.integers(1, 300))
def test_lines_come_back_whole(tmp_path_factory, content, blanks, size):
    path = tmp_path_factory.mktemp("a") / "a.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) + "\n" + "\n" * blanks for record in content]
    path.write_text("".join(lines), encoding="utf-8")
    assert read_back(path, size) == content


def test_no_final_newline_windows_newlines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n\r\n{"id": 2}')
    assert read_back(path, 4) == [{"id": 1}, {"id": 2}]
    array = tmp_path / "a.json"
    array.write_bytes(b'\xef\xbb\xbf \r\n[{"id": 1},\r\n{"id": 2}]\r\n')
    assert read_back(array, 8) == [{"id": 1}, {"id": 2}]


def test_chunks_are_small_and_lines_are_counted(tmp_path):
    content = [{"id": number, "text": "word " * 40} for number in range(500)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content, indent=2))
    chunks = list(index_chunks(path, 4096))
    assert len(chunks) > 20
    assert max(chunk.length for chunk in chunks) <= 4096
    with path.open("rb") as file:
        starts = []
        for chunk in chunks:
            data = chunk.read(file)
            starts += record_lines(data, split_records(data, False), chunk.line)
    assert starts == [2 + 4 * number for number in range(500)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    one = json.dumps({"id": 7, "conversations": [{"from": "human", "value": "word " * 150}] * 3})
    lines = name == "a.jsonl"
    path = tmp_path / name
    with path.open("w") as file:
        file.write("" if lines else "[")
        for number in range(16000):
            file.write((one + "\n") if lines else ("," if number else "") + one)
        file.write("" if lines else "]")
    assert path.stat().st_size > 36e6
    tracemalloc.start()
    try:
        total = sum(chunk.count for chunk in index_chunks(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 16000
    assert peak < 5 * CHUNK_BYTES < path.stat().st_size / 3


def test_blanks_longer_than_a_chunk_before_the_list(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\n" * 150 + " " * 7 + '[{"id": 0}, {"id": 1}]')
    chunks = list(index_chunks(path, 64))
    assert read_back(path, 64) == [{"id": 0}, {"id": 1}] and chunks[0].line == 151


def test_a_record_longer_than_a_chunk(tmp_path):
    content = [{"id": 0}, {"id": 1, "text": "x" * 5000}, {"id": 2}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert read_back(path, 64) == content


def test_what_python_accepts_and_msgspec_does_not(tmp_path):
    """A lone surrogate is one record's fault, not the file's: it is found and rejected later, by its record."""
    path = tmp_path / "a.json"
    path.write_text('[{"id": 1}, {"id": "\\ud800"}, {"id": 3}]')
    assert [record["id"] for record in read_back(path, 16)] == [1, "\ud800", 3]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"id": 1}\n{"id": "\\ud800"}\n{"id": 3}\n')
    assert [record["id"] for record in read_back(lines, 16)] == [1, "\ud800", 3]


@pytest.mark.parametrize("size", [16, 64, 1 << 20])
@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", "", "the file is empty"),
        ("a.json", " \n\n ", "the file is empty"),
        ("a.jsonl", "\n\n", "the file is empty"),
        ("a.json", '[\n{"id": 1},\n{"id": 2', "line 3, column 9: the file ends in the middle"),
        ("a.json", '[\n{"id": 1},\n{"id": "tw', "line 3"),
        ("a.json", '[\n{"id": 1}', "line 2, column 10: the file ends in the middle"),
        ("a.json", '[\n{"id": 1},\n', "the file ends in the middle"),
        ("a.json", "[", "line 1, column 2: the file ends in the middle"),
        ("a.json", '[\n{"id": 1},\n{"id": 2}\n{"id": 3}]', "line 4, column 1: not valid JSON"),
        ("a.json", '[\n{"id": 1},\n{"id": 2},\n]', "line 4, column 1: not valid JSON: a record must follow the comma"),
        (
            "a.json",
            '[\n{"id": 1},\n{id: 2},\n{"id": 3}, {"id": 4}, {"id": 5}, {"id": 6}]',
            "line 3, column 2: not valid",
        ),
        ("a.json", '[{"id": 1}] x', "line 1, column 13: not valid JSON"),
        ("a.json", '[{"id": 1}]]', "line 1, column 12: not valid JSON"),
        ("a.json", '{"id": 1,\n "b": 2}', "holds one object"),
        ("a.json", '{"a": 1}\n\n', "holds one object"),
        ("a.json", "hello", "line 1, column 1: this is not JSON"),
        ("a.json", " 5\n", "a data set is a list of records"),
        ("a.jsonl", '"text"', "a data set is a list of records"),
        ("a.jsonl", '{"id": 1}\n{"id": 2\n{"id": 3}\n', "line 2, column"),
        ("a.jsonl", '{"id": 1}\n{"id": 2} {"id": 3}\n', "line 2, column 11: not valid JSON: one record a line"),
        ("a.jsonl", '{"id": 1}\n\n{"id": 2}\n{"id": "th', "line 4, column"),
        ("a.jsonl", '{"id":\n1}\n', "line 1, column"),
    ],
)
def test_faults_have_a_line_and_a_column(tmp_path, name, text, says, size):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError) as error:
        list(index_chunks(path, size))
    assert str(path) in error.value.what
    assert says in error.value.what
    assert error.value.hint


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_nested_too_deeply(tmp_path, name):
    deep = '{"id": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    path = tmp_path / name
    path.write_text(f'[{{"id": 0}},\n{deep}]' if name == "a.json" else f'{{"id": 0}}\n{deep}\n')
    with pytest.raises(DataError, match="line 2, column 1: not valid JSON: nested too deeply"):
        list(index_chunks(path))


def test_no_such_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: No such file"):
        list(index_chunks(tmp_path / "none.json"))


def test_truncation_anywhere_is_noticed(tmp_path):
    """Whatever byte a download stopped at, the file is refused and never read as a shorter one."""
    text = json.dumps([{"id": "é", "conversations": [{"from": "human", "value": NASTY}]}] * 3, indent=1).encode()
    path = tmp_path / "a.json"
    for length in range(len(text)):
        path.write_bytes(text[:length])
        with pytest.raises(DataError):
            list(index_chunks(path, 64))

"""Reading samples: random access without parsing all, roots, faults with their line, copies in other processes."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from itertools import chain
from pathlib import Path

import pytest

from llavanext_cli.errors import DataError
from llavanext_cli.mixing.samples import read_samples
from llavanext_cli.processing.processor import resolve_path
from llavanext_cli.records import build_sample

TURNS = [{"role": "user", "text": "<image>\nWhat?"}, {"role": "assistant", "text": "Un chat à midi."}]


def line(number: int, **changes) -> dict:
    media = [{"kind": "image", "path": f"coco/{number}.jpg", "size": [4, 3]}]
    return {"id": str(number), "source": "a", "media": media, "turns": TURNS} | changes


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in lines), encoding="utf-8")
    return path


HEADER = {"llavanext_mix": 1, "roots": {"a": "images", "b": "/data/b"}, "seed": 3}


def test_our_own_form(tmp_path):
    file = read_samples(write(tmp_path / "s.jsonl", HEADER, *(line(number) for number in range(300))))
    assert len(file) == 300
    assert file.header["seed"] == 3
    assert file.roots == {"a": tmp_path / "images", "b": Path("/data/b")}
    assert file[7].id == "7" and file[-1].id == "299" and [s.id for s in file[1:3]] == ["1", "2"]
    assert [sample.id for sample in file] == [str(number) for number in range(300)]
    assert file[7] == build_sample(line(7), "here")
    assert file._index.lines[0] == 2
    assert resolve_path(file[7], file[7].media[0], file.roots) == str(tmp_path / "images" / "coco" / "7.jpg")
    with pytest.raises(IndexError):
        file[300]
    with pytest.raises(IndexError):
        file[-301]


def test_without_a_header_paths_start_at_the_files_folder(tmp_path):
    file = read_samples(write(tmp_path / "s.jsonl", line(1), line(2, source="other"), line(3, source="")))
    assert len(file) == 3 and file.header == {}
    for sample in file:
        assert resolve_path(sample, sample.media[0], file.roots) == str(tmp_path / sample.media[0].path)


def test_blank_lines_and_many_chunks(tmp_path):
    path = tmp_path / "s.jsonl"
    rows = [json.dumps(line(number, note="x" * 3000)) + "\n\n" for number in range(900)]
    path.write_text(json.dumps(HEADER) + "\n" + "".join(rows))
    assert path.stat().st_size > 2 << 20
    file = read_samples(path)
    assert [file[number].id for number in (0, 450, 899)] == ["0", "450", "899"]
    assert file._index.lines[899] == 2 + 2 * 899


def test_the_originals_form(tmp_path):
    tags = "<|reserved_special_token_3|>{}<|reserved_special_token_4|>"
    records = [
        {
            "conversations": [
                {"from": "human", "value": tags.format("/d/1.jpg") + "<image>\nq"},
                {"from": "gpt", "value": "<text>a"},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": tags.format("clips/2.mp4") + "<image>\nq"},
                {"from": "gpt", "value": "<text>a"},
            ]
        },
        {"conversations": [{"from": "human", "value": tags.format("") + "q"}, {"from": "gpt", "value": "<text>a"}]},
    ]
    path = tmp_path / "processed.json"
    path.write_text(json.dumps(records, indent=2))
    file = read_samples(path)
    assert [[medium.kind for medium in sample.media] for sample in file] == [["image"], ["video"], []]
    assert file[0].turns[1].text == "a"
    assert resolve_path(file[0], file[0].media[0], file.roots) == "/d/1.jpg"
    assert resolve_path(file[1], file[1].media[0], file.roots) == str(tmp_path / "clips" / "2.mp4")
    assert file._index.lines[1] == 14


def ids(file, numbers):
    return [file[number].id for number in numbers]


def test_copies_in_other_processes(tmp_path):
    file = read_samples(write(tmp_path / "s.jsonl", HEADER, *(line(number) for number in range(50))))
    assert file[3].id == "3"  # the file is open now, and must not travel
    copy = pickle.loads(pickle.dumps(file))
    assert ids(copy, [49, 0]) == ["49", "0"]
    forked = multiprocessing.get_context("fork").Pool(2)
    with forked as pool:
        parts = pool.starmap(ids, [(file, range(first, 50, 5)) for first in range(5)])
    assert sorted(chain.from_iterable(parts), key=int) == [str(number) for number in range(50)]
    file.close()
    assert file[4].id == "4"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file is empty"),
        (json.dumps(HEADER), "the file has no samples"),
        (json.dumps(HEADER) + "\n" + json.dumps(line(1)) + '\n{"id": 2,\n', "line 3"),
        (json.dumps(HEADER) + "\n\n" + json.dumps(line(1, turns=[])) + "\n", "line 3: a sample needs a list of turns"),
        (json.dumps(HEADER) + "\n" + json.dumps(line(1, turns=TURNS[::-1])), "line 2: turn 1 must be the user's"),
        (
            json.dumps(HEADER) + "\n" + json.dumps(line(1, media=[{"kind": "sound", "path": "x"}])),
            "line 2: media[0].kind: invalid value 'sound'",
        ),
        (
            json.dumps(HEADER) + "\n" + json.dumps(line(1, source="c")),
            "line 2: source 'c' is missing in the header's roots",
        ),
        (json.dumps(HEADER) + "\n[1]\n", "line 2: a sample is an object"),
        (json.dumps(HEADER | {"llavanext_mix": 9}) + "\n", "line 1: the samples have format 9"),
        (json.dumps(HEADER | {"roots": ["a"]}) + "\n", "line 1: roots must name a folder"),
        (json.dumps({"id": 1, "image": "a", "conversations": []}) + "\n", "line 1: this is a record of a raw data set"),
        (
            '[{"id": 1, "image": "a", "conversations": [{"from": "human", "value": "x"}]}]',
            "line 1: this is a record of a raw",
        ),
        ("[]", "the file has no samples"),
    ],
)
def test_faults_name_the_file_and_the_line(tmp_path, text, says):
    path = tmp_path / "s.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        list(read_samples(path))
    assert str(path) in error.value.what and says in error.value.what


def test_no_such_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        read_samples(tmp_path / "none.jsonl")


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = write(tmp_path / "s.jsonl", HEADER, line(1))
    file = read_samples(path)
    path.write_text("x" * 400)
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        file[0]

"""YAML → values → dataclasses: what is read, and what each fault says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavanext_cli.config.documents import Document, load_yaml, parse_yaml
from llavanext_cli.config.reading import Builder, setting
from llavanext_cli.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-6", 2e-6),
        ("2.e-6", 2e-6),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-7", -7),
        ("010", 10),
        ("1_000", 1000),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        (".inf", ".inf"),
        ("2026-01-02", "2026-01-02"),
        ('"5"', "5"),
        ("", None),
        ("~", None),
        ("null", None),
        ("[vision, 2, [3.5]]", ["vision", 2, [3.5]]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_values_are_read_as_yaml_1_2(text, value):
    read = parse_yaml(text, "here")
    assert read == value
    assert type(read) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_prints_is_read_back(number):
    assert parse_yaml(repr(number), "here") == number


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1,\n", "f.yaml, line 3, column 1: "),
        ("a: 1\n\tb: 2\n", "f.yaml, line 2, column 1: "),
        ("a: &x 1\nb: *x\n", "f.yaml, line 1, column 4: anchors and aliases are not read here"),
        ("a: 1\n---\nb: 2\n", "f.yaml, line 2, column 1: "),
        ("a: !!python/object:os.system 1\n", "f.yaml, line 1: a: the tag"),
        ("a: !!int x\n", "f.yaml, line 1: a: the tag"),
        ("[1]: 2\n", "f.yaml, line 1: a key must be a word"),
        ("a: " + "[" * 100, "nested deeper than 20 levels"),
        ("a: \x00", "f.yaml: not YAML"),
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "a mapping of keys to values is expected"),
    ],
)
def test_what_cannot_be_read_says_where(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "f.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(ConfigError) as caught:
        load_yaml(path.relative_to(tmp_path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a: &x 1\nb: *x\n", "write the value out in each place"),
        ("a: *.jpg\n", "begins with * needs quotes"),
        ("a: & b\n", "begins with & needs quotes"),
        ("a: " + "[" * 100, "close every bracket and quote"),
        ("a: b: c\n", "needs quotes"),
        ("a: [1,\n", "close every bracket and quote"),
        ("a: 1\n\tb: 2\n", "indent with spaces"),
    ],
)
def test_text_that_is_not_read_has_a_hint(text, hint):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f.yaml")
    assert hint in caught.value.hint


def test_a_key_given_twice_is_an_error_with_both_lines(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text("train:\n  epochs: 1\n  seed: 2\n  epochs: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    (line,) = caught.value.details
    assert line == f"{path}, line 2, and {path}, line 4: train.epochs is given twice"


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_yaml(path)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_yaml(tmp_path)


@dataclass(frozen=True)
class Inner:
    size: int = setting(3, doc="pixels", least=1)


@dataclass(frozen=True)
class Outer:
    needed: float = setting(doc="a needed number", above=0)
    inner: Inner = Inner()
    kind: Literal["one", "two"] = setting("one", doc="which")
    names: tuple[str, ...] = setting((), doc="names")
    pair: tuple[int, int] = setting((1, 2), doc="a pair", least=0)
    maybe: int | None = setting(None, doc="perhaps", most=9)
    flag: bool = setting(False, doc="yes or no")


def build(**values):
    builder = Builder(Document(values, {}), "f.yaml")
    return builder.build(Outer, values), [str(problem) for problem in builder.problems]


def test_a_sound_mapping_becomes_dataclasses():
    values = {"needed": 1, "inner": {"size": 4}, "kind": "two", "names": ["a"], "pair": [0, 5], "maybe": None}
    made, problems = build(**values)
    assert problems == []
    assert made == Outer(needed=1.0, inner=Inner(4), kind="two", names=("a",), pair=(0, 5))
    assert type(made.needed) is float


def test_every_problem_is_reported_at_once():
    made, problems = build(
        inner={"sise": 1, "size": 0}, kind="three", names="a", pair=[1, 2, 3], maybe=10, flag="yes", neded=1
    )
    assert problems == [
        "f.yaml: neded: unknown key; did you mean needed?",
        "f.yaml: needed: missing: a needed number",
        "f.yaml: inner.sise: unknown key; did you mean inner.size?",
        "f.yaml: inner.size: must be at least 1, got 0 (pixels)",
        "f.yaml: kind: expected one of one, two, not 'three'",
        "f.yaml: names: expected a list, each text, not 'a'",
        "f.yaml: pair: expected a list of 2, each a whole number, not [1, 2, 3]",
        "f.yaml: maybe: must be at most 9, got 10 (perhaps)",
        "f.yaml: flag: expected true or false, not 'yes'",
    ]
    assert made.inner == Inner(3)


@pytest.mark.parametrize("wrong", [True, "1", [1], {"a": 1}, float("inf")])
def test_a_number_is_nothing_else(wrong):
    _, problems = build(needed=wrong)
    assert len(problems) == 1
    assert problems[0].startswith("f.yaml: needed: expected a number")


def test_a_section_that_is_no_mapping():
    _, problems = build(needed=1, inner=5)
    assert problems == ["f.yaml: inner: expected a mapping of keys to values, not 5"]

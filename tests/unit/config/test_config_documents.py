"""YAML 1.2 → values with the line of every key: what is supported, and what each error says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavanext_cli.config.documents import load_yaml, parse_yaml
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
        ("a: &x 1\nb: *x\n", "f.yaml, line 1, column 4: anchors and aliases are not supported"),
        ("a: 1\n---\nb: 2\n", "f.yaml, line 2, column 1: "),
        (
            "a: !!python/object:os.system 1\n",
            "f.yaml, line 1: a: the tag tag:yaml.org,2002:python/object:os.system is not supported",
        ),
        ("a: !!int x\n", "f.yaml, line 1: a: the tag tag:yaml.org,2002:int is not supported"),
        ("[1]: 2\n", "f.yaml, line 1: a key must be a word"),
        ("a: " + "[" * 100, "nested deeper than 20 levels"),
        ("a: \x00", "f.yaml: invalid YAML"),
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ("- a\n- b\n", "f.yaml: expected a mapping of keys to values, not ['a', 'b']"),
    ],
)
def test_what_cannot_be_read_says_where(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "f.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_yaml(path.relative_to(tmp_path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a: &x 1\nb: *x\n", "write the value out in each place"),
        ("a: *.jpg\n", "put text that begins with * in quotes"),
        ("a: & b\n", "put text that begins with & in quotes"),
        ("a: " + "[" * 100, "close every bracket and quote"),
        ("a: b: c\n", "put text with a colon and a space in quotes"),
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


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_yaml(tmp_path)

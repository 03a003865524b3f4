"""Values → dataclasses: what a field takes, and what each problem says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from llavanext_cli.config.validation import build, setting


@dataclass(frozen=True)
class Inner:
    size: int = setting(3, doc="pixels", least=1)


@dataclass(frozen=True)
class Scaling:
    factor: float = setting(doc="how much", least=1)


@dataclass(frozen=True)
class Outer:
    needed: float = setting(doc="a needed number", above=0)
    inner: Inner = Inner()
    scaling: Scaling | None = None
    kind: Literal["one", "two", "three"] = setting("one", doc="which")
    names: tuple[str, ...] = setting((), doc="names")
    pairs: tuple[tuple[int, int], ...] = setting(((1, 2),), doc="pairs", least=0)
    maybe: int | None = setting(None, doc="perhaps", most=9)
    flag: bool = setting(False, doc="yes or no")


def problems_of(values, known=("needed", "inner.size")):
    problems = []
    built = build(Outer, values, problems, known=known)
    return built, [f"{key}: {text}" for key, text in problems]


def test_a_valid_mapping_becomes_dataclasses():
    values = {"needed": 1, "inner": {"size": 4}, "kind": "two", "names": ["a"], "pairs": [[0, 5]], "maybe": None}
    built, problems = problems_of(values | {"scaling": {"factor": 2}})
    assert problems == []
    assert built == Outer(1.0, Inner(4), Scaling(2.0), "two", ("a",), ((0, 5),))
    assert type(built.needed) is float


def test_every_problem_is_reported_at_once():
    built, problems = problems_of(
        {
            "inner": {"sise": 1, "size": 0},
            "scaling": {"factor": 0.5},
            "kind": "four",
            "names": "a",
            "pairs": [[1, 2, 3]],
            "maybe": 10,
            "flag": "yes",
            "neded": 1,
        }
    )
    assert problems == [
        "neded: unknown key; did you mean needed?",
        "needed: missing: a needed number",
        "inner.sise: unknown key; did you mean inner.size?",
        "inner.size: must be at least 1, not 0 (pixels)",
        "scaling.factor: must be at least 1, not 0.5 (how much)",
        "kind: expected one of one, two, three, not 'four'",
        "names: expected a list, each text, not 'a'",
        "pairs: expected a list of 2, each a whole number, not [1, 2, 3]",
        "maybe: must be at most 9, not 10 (perhaps)",
        "flag: expected true or false, not 'yes'",
    ]
    assert (built.inner, built.scaling) == (Inner(3), None)


@pytest.mark.parametrize("value", [True, "1", [1], {"a": 1}, float("inf"), float("nan"), None, 10**400, 10**4000])
def test_only_a_finite_number_is_a_number(value):
    _, (problem,) = problems_of({"needed": value})
    assert problem.startswith("needed: expected a number, not ") and len(problem) < 100


@pytest.mark.parametrize("value", [5, [], "size: 1"])
def test_a_section_is_a_mapping(value):
    assert problems_of({"needed": 1, "inner": value})[1] == [
        f"inner: expected a mapping of keys to values, not {value!r}"
    ]


def test_unknown_keys_can_be_ignored():
    built, problems = problems_of({"needed": 1, "other": 2, "inner": {"other": 3}}, known=None)
    assert (built, problems) == (Outer(1.0), [])

"""Sampling: what each strategy takes, exactly; the same on every machine; what is refused."""

from __future__ import annotations

from array import array
from collections import Counter
from decimal import ROUND_CEILING, Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavanext_cli.mixing.sampling import draw, parse_strategy, within

totals = st.integers(0, 3000)
kinds = st.sampled_from(["first", "end", "random"])


def take(text: str, total: int, seed: str = "0/a") -> list[int]:
    return list(parse_strategy(text).select(total, seed))


def test_what_the_original_readme_shows():
    assert take("all", 5) == [0, 1, 2, 3, 4]
    assert take("first:2", 5) == [0, 1]
    assert take("end:2", 5) == [3, 4]
    assert take("first:50%", 5) == [0, 1, 2]
    assert take("end:50%", 5) == [2, 3, 4]
    assert take(" first : 10 % ", 20) == [0, 1]


def test_end_of_nothing_is_nothing():
    """In the original `data[-0:]` keeps everything."""
    assert take("end:0", 5) == []
    assert take("end:0%", 5) == []


@pytest.mark.parametrize(
    ("text", "total", "count"),
    [
        ("first:12.5%", 8, 1),
        ("first:12.5%", 9, 2),
        ("first:0.1%", 1000, 1),
        ("first:0.1%", 1001, 2),
        ("first:29%", 100, 29),
    ],
)
def test_percentages_are_exact(text, total, count):
    """29 % of 100 is 29.000000000000004 in floating point, which the original rounds up to 30."""
    assert len(take(text, total)) == count


@given(kind=kinds, amount=st.integers(0, 4000), total=totals)
def test_counts(kind, amount, total):
    chosen = take(f"{kind}:{amount}", total)
    assert len(chosen) == min(amount, total)
    assert chosen == sorted(set(chosen)) and all(0 <= number < total for number in chosen)
    if kind == "first":
        assert chosen == list(range(total))[:amount]
    if kind == "end":
        assert chosen == list(range(total))[total - min(amount, total) :]


@given(kind=kinds, percent=st.decimals(0, 100, places=3), total=totals)
def test_shares(kind, percent, total):
    exact = (percent * total / 100).to_integral_value(ROUND_CEILING)
    assert len(take(f"{kind}:{percent:f}%", total)) == int(exact)
    assert Decimal(len(take(f"{kind}:{percent:f}%", total))) * 100 >= percent * total


@given(total=st.integers(1, 400), seed=st.integers(0, 2**64))
def test_random_depends_on_the_seed_and_on_nothing_else(total, seed):
    first, again = take("random:50%", total, f"{seed}/a"), take("random:50%", total, f"{seed}/a")
    assert first == again
    if total >= 64:
        assert first != take("random:50%", total, f"{seed + 1}/a")
        assert first != take("random:50%", total, f"{seed}/b")


def test_random_is_the_same_on_every_machine():
    """Fixed numbers: whoever changes the drawing changes the data of every published mix."""
    assert list(draw(10, 100, "0/mix665k")) == [20, 24, 38, 39, 50, 60, 67, 78, 91, 98]
    assert sum(draw(66530, 665298, "7/mix665k")) == 22121993962


def test_random_favours_nobody():
    """Every number is drawn about as often as any other: 4 000 draws of 5 out of 20, 1 000 expected, sigma 27."""
    counts = Counter(number for seed in range(4000) for number in draw(5, 20, str(seed)))
    assert sum(counts.values()) == 20_000
    assert all(abs(counts[number] - 1000) < 5 * 27.4 for number in range(20))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("last:10", "unknown strategy 'last:10'"),
        ("first", "needs an amount"),
        ("all:10", "takes no amount"),
        ("random:-5", "not negative"),
        ("random:-5%", "not negative"),
        ("first:101%", "more than 100 %"),
        ("first:1.5", "a count such as"),
        ("first:ten", "a count such as"),
        ("first:1e3", "a count such as"),
        ("first:" + "9" * 20, "at most 18 digits"),
        ("first:" + "9" * 5000, "a count such as"),
        ("", "unknown strategy"),
        (10, "not 10"),
        (None, "not None"),
    ],
)
def test_refused(text, says):
    with pytest.raises(ValueError) as error:
        parse_strategy(text)
    assert says in str(error.value)


@given(
    chosen=st.lists(st.integers(0, 200), unique=True).map(sorted),
    cuts=st.lists(st.integers(0, 201), max_size=6).map(lambda cuts: sorted({0, 201, *cuts})),
)
def test_chunks_share_a_selection_without_loss(chosen, cuts):
    found = [low + position for low, high in pairwise(cuts) for position in within(array("q", chosen), low, high - low)]
    assert found == chosen


@given(start=st.integers(0, 50), length=st.integers(0, 60), first=st.integers(0, 100), count=st.integers(1, 30))
def test_a_range_within_a_chunk(start, length, first, count):
    expected = [n - first for n in range(start, start + length) if first <= n < first + count]
    assert list(within(range(start, start + length), first, count)) == expected

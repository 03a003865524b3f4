"""Which records of a data set are taken: `all`, `first:N`, `end:N`, `random:N`, with N a count or a percentage.

    all            every record                    first:25%    the first quarter
    first:1000     the first thousand              end:12.5%    the last eighth
    end:1000       the last thousand               random:1%    a hundredth, spread over the file

Percentages are exact and rounded up to whole records; more than there are means all. Records keep the file's order.
"""

from __future__ import annotations

import hashlib
import random
import re
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

KINDS = ("all", "first", "end", "random")
_AMOUNT = re.compile(r"(\d{1,18})|(\d{1,18}(?:\.\d{1,18})?)\s*%")


@dataclass(frozen=True)
class Strategy:
    """A parsed sampling strategy. `amount` is a count of records, or a share of them (0 to 1) when `is_share`."""

    kind: str = "all"
    amount: Fraction = Fraction(1)
    is_share: bool = True

    def count(self, total: int) -> int:
        """Records taken of `total`: a share is rounded up, a count is limited to what there is."""
        if not self.is_share:
            return min(int(self.amount), total)
        return -(-self.amount.numerator * total // self.amount.denominator)

    def select(self, total: int, seed: str) -> Sequence[int]:
        """Numbers of the records taken of `total`, ascending. `seed` matters to `random` only."""
        wanted = self.count(total)
        if self.kind == "random":
            return draw(wanted, total, seed)
        return range(total - wanted, total) if self.kind == "end" else range(wanted)


def parse_strategy(text: object) -> Strategy:
    """Read a strategy as a mix file spells it.

    Raises:
        ValueError: with a message in the user's terms; the reader of the mix file collects it.
    """
    if not isinstance(text, str):
        raise ValueError(f"a strategy is a word such as all or random:10%, not {text!r}")
    kind, colon, amount = (part.strip() for part in text.partition(":"))
    if kind not in KINDS:
        raise ValueError(
            f"unknown strategy {text!r}; known: all, first:N, end:N, random:N (N is a count or a percentage)"
        )
    if kind == "all":
        if colon:
            raise ValueError(f"'all' takes no amount, got {text!r}")
        return Strategy()
    if not amount:
        raise ValueError(f"{text!r} needs an amount: {kind}:1000 or {kind}:10%")
    found = _AMOUNT.fullmatch(amount)
    if not found:
        raise ValueError(
            f"{text[:40]!r}: the amount is a count such as 1000 or a percentage such as 12.5%, not negative, and of at "
            "most 18 digits"
        )
    if found.group(1):
        return Strategy(kind, Fraction(found.group(1)), is_share=False)
    share = Fraction(found.group(2)) / 100
    if share > 1:
        raise ValueError(f"{text!r} is more than 100 %")
    return Strategy(kind, share)


def draw(wanted: int, total: int, seed: str) -> array:
    """Draw `wanted` of `total` numbers without replacement, ascending, every subset equally likely.

    The same seed gives the same numbers on every machine and Python: only `Random.random()` is used, whose sequence for
    an integer seed Python promises to keep, while `sample` and `shuffle`, and numpy's generators, may change.

    Source: Knuth, The Art of Computer Programming 2, 3.4.2, algorithm S.
    """
    generator = random.Random(int.from_bytes(hashlib.sha256(seed.encode()).digest(), "big"))
    uniform, left = generator.random, wanted
    drawn = array("q")
    for number in range(total):
        if left and uniform() * (total - number) < left:
            drawn.append(number)
            left -= 1
    return drawn


def within(selected: Sequence[int], first: int, count: int) -> Sequence[int]:
    """The part of an ascending selection that lies in `first .. first + count - 1`, as positions from `first`."""
    if isinstance(selected, range):
        return range(max(selected.start, first) - first, max(first, min(selected.stop, first + count)) - first)
    low = bisect_left(selected, first)
    high = bisect_left(selected, first + count, lo=low)
    return array("q", (number - first for number in selected[low:high]))

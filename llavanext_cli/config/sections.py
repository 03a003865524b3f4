"""Takes typed values out of one section of a Hugging Face config.json, and collects what is wrong with them.

Used by `hf_config`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

MOST = 2**31 - 1
MOST_LAYERS = 1000
"""Beyond this a file is damaged; the names of that many layers alone would fill the memory."""

Value = TypeVar("Value")


class SectionReader:
    """Takes typed values out of one section of a config.json and collects what is wrong with them."""

    def __init__(self, section: dict[str, Any], name: str, faults: list[str]):
        self.section, self.name, self.faults = section, name, faults

    def fault(self, key: str, message: str) -> None:
        self.faults.append(f"{self.name}{key}: {message}")

    def is_sound(self, *keys: str) -> bool:
        """Whether nothing was found wrong with these values, nor with the sections that they are in: what follows from
        a wrong value is not said as well."""
        wrong = {fault.partition(":")[0] for fault in self.faults}
        names = [f"{self.name}{key}" for key in keys]
        return wrong.isdisjoint([*names, *(name.rpartition(".")[0] for name in names)])

    def _take(self, key: str, default: Value, fits: Callable[[Any], bool], wanted: str) -> Value:
        value: Value | None = self.section.get(key)
        if value is None:
            return default
        if fits(value):
            return value
        self.fault(key, f"must be {wanted}, not {value!r}")
        return default

    def count(self, key: str, default: int, least: int = 1, most: int = MOST) -> int:
        wanted = f"a whole number of at least {least}"
        value = self.section.get(key)
        if is_int(value) and value > most:
            wanted = f"a whole number of at most {most}"
        return self._take(key, default, lambda v: is_int(v) and least <= v <= most, wanted)

    def positive(self, key: str, default: float) -> float:
        return float(self._take(key, default, lambda v: is_number(v) and v > 0, "a positive number"))

    def flag(self, key: str, default: bool) -> bool:
        return self._take(key, default, lambda v: isinstance(v, bool), "true or false")

    def choice(self, key: str, default: str, supported: tuple[str, ...]) -> str:
        value = self.section.get(key)
        if value is None:
            return default
        if isinstance(value, str) and value in supported:
            return value
        self.fault(key, f"{value!r} is not supported; supported: {', '.join(supported)}")
        return default

    def names(self, key: str, supported: tuple[str, ...]) -> None:
        """A list of names, none of which may be another."""
        value = self.section.get(key)
        if value is not None and not (isinstance(value, list) and all(name in supported for name in value)):
            self.fault(key, f"{value!r} is not supported; supported: {', '.join(supported)}")

    def must_be(self, key: str, supported: Any) -> None:
        """A key whose other values the model cannot compute."""
        if self.section.get(key) not in (None, supported):
            self.fault(key, f"{self.section[key]!r} is not supported; supported: {supported!r}")


def is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # no nan, no infinity, and no whole number that a float cannot hold

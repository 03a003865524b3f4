"""What a config.json says about rotary positions: their base, and how they are scaled.

Two spellings: `rope_theta` and `rope_scaling` side by side, or `rope_parameters` with both, as transformers 5 writes.
"""

from __future__ import annotations

from typing import Any

from llavanext_cli.config.sections import SectionReader

ROPE_TYPES = ("linear", "default")


def parse_rope_theta(reader: SectionReader) -> float:
    key, rope = _rope(reader) if isinstance(reader.section.get("rope_parameters"), dict) else ("", {})
    if rope.get("rope_theta") is not None:
        return SectionReader(rope, f"{reader.name}{key}.", reader.faults).positive("rope_theta", 10000.0)
    return reader.positive("rope_theta", 10000.0)


def parse_rope_scaling(reader: SectionReader) -> dict[str, Any] | None:
    """Only `type`/`rope_type` and `factor` have an effect; other keys found on early revisions have none."""
    key, rope = _rope(reader)
    inner = SectionReader(rope, f"{reader.name}{key}.", reader.faults)
    spelling = "rope_type" if rope.get("rope_type") is not None else "type"
    if rope.get(spelling) is None and rope.get("factor") is not None:
        inner.fault("type", f"is missing beside a factor; supported: {', '.join(ROPE_TYPES)}")
        return None
    if not rope or inner.choice(spelling, "default", ROPE_TYPES) == "default":
        return None
    inner.must_be("partial_rotary_factor", 1.0)
    factor = inner.positive("factor", 0.0)
    if inner.is_sound("factor") and factor < 1:
        inner.fault("factor", f"linear scaling needs a number of at least 1, not {rope.get('factor')!r}")
    return {"type": "linear", "factor": factor}


def _rope(reader: SectionReader) -> tuple[str, dict[str, Any]]:
    """The key and content of whichever of the two spellings is there."""
    for key in ("rope_parameters", "rope_scaling"):
        value = reader.section.get(key)
        if isinstance(value, dict):
            return key, value
        if value is not None:
            reader.fault(key, f"must be an object or null, not {value!r}")
    return "rope_scaling", {}

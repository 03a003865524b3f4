"""The stages that are compared, in the order of the data; how far they may differ; and the table of how far they do."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

INTEGER_STAGES = ("ids", "labels")

TOLERANCES: dict[str, dict[str, float]] = {
    # relative Frobenius error a stage may have, by the type of the products
    "float32": {
        "pixels": 1e-6,
        "tower": 2e-6,
        "pooled": 2e-6,
        "projected": 2e-6,
        "fused": 2e-6,
        "layer": 5e-6,
        "norm": 5e-6,
        "logits": 5e-6,
        "loss": 1e-5,
        "gradients": 1e-4,
    },
    "float16": {
        "pixels": 1e-6,
        "tower": 5e-3,
        "pooled": 5e-3,
        "projected": 5e-3,
        "fused": 5e-3,
        "layer": 1e-2,
        "norm": 1e-2,
        "logits": 1e-2,
    },
}
"""In one place, so that a tolerance is loosened in sight of all others. ids and labels are equal."""


def tolerance(stage: str, dtype: str = "float32") -> float:
    return TOLERANCES[dtype][stage.split()[0]]


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """||ours - theirs|| / ||theirs||, over all elements; infinite where the numbers of elements differ."""
    if ours.size != theirs.size:
        return float("inf")
    wide = np.asarray(theirs, np.float64).ravel()
    off = float(np.linalg.norm(np.asarray(ours, np.float64).ravel() - wide))
    return off / float(np.linalg.norm(wide)) if off else 0.0


class Table:
    """stage x case → error, of everything that was compared in this run."""

    def __init__(self) -> None:
        self.errors: dict[str, dict[str, float]] = {}

    def add(self, case: str, stage: str, error: float) -> None:
        row = self.errors.setdefault(case, {})
        row[stage] = max(error, row.get(stage, 0.0))

    def lines(self) -> list[str]:
        """One row a case, one column a stage; the language model's layers share one."""
        rows = {case: self._by_kind(row) for case, row in self.errors.items()}
        known = (*INTEGER_STAGES, *TOLERANCES["float32"])
        stages = [stage for stage in known if any(stage in row for row in rows.values())]
        width = max((len(case) for case in rows), default=4)
        head = f"{'case':{width}}  " + "  ".join(f"{stage:>9}" for stage in stages)
        return [
            head,
            *[f"{case:{width}}  " + "  ".join(_cell(row.get(stage)) for stage in stages) for case, row in rows.items()],
        ]

    @staticmethod
    def _by_kind(row: Mapping[str, float]) -> dict[str, float]:
        worst: dict[str, float] = {}
        for stage, error in row.items():
            kind = stage.split()[0]
            worst[kind] = max(error, worst.get(kind, 0.0))
        return worst


def _cell(error: float | None) -> str:
    text = "-" if error is None else f"{error:.0e}" if error else "0"
    return f"{text:>9}"


TABLE = Table()


def check_stages(
    case: str,
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    dtype: str = "float32",
    suffix: str = "",
) -> None:
    """Compare what both have, in the order of the data, and name the first stage that differs.

    Every error goes to the table first, so that it shows the whole path also when a stage fails.
    """
    errors = {}
    for stage in ours:
        if stage not in theirs:
            continue
        equal = stage in INTEGER_STAGES
        errors[stage] = (
            float(not np.array_equal(ours[stage], theirs[stage]))
            if equal
            else relative_error(ours[stage], theirs[stage])
        )
        TABLE.add(case, stage, errors[stage])
    assert errors, f"{case}: nothing was compared"
    for stage, error in errors.items():
        limit = 0.0 if stage in INTEGER_STAGES else tolerance(stage, dtype)
        assert error <= limit, f"{case}: {stage} is the first stage that differs, by {error:.2e} (at most {limit:.0e})"


GRADIENT_FLOOR = 1e-3
"""Share of the largest gradient below which one counts as zero: that of a key's bias is zero but for rounding, since
softmax does not see what is added to all scores."""


def gradient_errors(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Relative error of each gradient; of near-zero ones, relative to `GRADIENT_FLOOR` of the largest."""
    floor = GRADIENT_FLOOR * max(float(np.linalg.norm(value)) for value in theirs.values())
    return {
        name: float(np.linalg.norm(ours[name] - theirs[name])) / max(float(np.linalg.norm(theirs[name])), floor)
        for name in ours
    }

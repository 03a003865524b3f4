"""Score the demo's answers: accuracy of each kind of question beside that of the best constant answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llavanext_cli.demo.questions import CONTROL_KIND, IMAGE_KINDS, VIDEO_KINDS

LEAST_ACCURACY = {"images": 0.95, "videos": 0.85}
"""What the full demo must reach over all questions ..."""
LEAST_RATIO = 2.0
"""... and how many times better than the best constant answer each kind must be."""
MOST_CONTROL = 0.5
"""Without the tag's detail, more than this share of right answers means that the tiles were not needed."""


@dataclass(frozen=True)
class Row:
    """One line of the report. `constant` is the accuracy of always giving the most frequent answer of each kind."""

    kind: str
    asked: int
    right: int
    constant: float

    @property
    def accuracy(self) -> float:
        return self.right / self.asked if self.asked else 0.0


@dataclass(frozen=True)
class Scored:
    """One answer; `medium` is the id of the question's record."""

    medium: str
    kind: str
    question: str
    expected: str
    answer: str

    @property
    def is_right(self) -> bool:
        return self.answer.strip() == self.expected


def read_answers(answers: Path, kinds: Path) -> list[Scored]:
    """Join `ask --batch`'s output with the kinds of its questions."""
    kind_of = json.loads(kinds.read_text(encoding="utf-8"))
    scored = []
    for line in answers.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        name, text = record["id"], record.get("question", "").split("\n")[-1]
        answer = record.get("answer", f"(failed: {record.get('error')})")
        scored.append(Scored(name, kind_of[name], text, record.get("reference", ""), answer))
    return scored


def score(scored: Sequence[Scored], kinds: Sequence[str], name: str) -> Row:
    """Accuracy over all questions of `kinds`."""
    mine = [s for s in scored if s.kind in kinds]
    constant = sum(max(Counter(s.expected for s in mine if s.kind == kind).values(), default=0) for kind in kinds)
    return Row(name, len(mine), sum(s.is_right for s in mine), constant / len(mine) if mine else 0.0)


def build_rows(scored: Sequence[Scored]) -> list[Row]:
    """A row for each kind and for the control, then one for all images without the control, and one for all videos."""
    rows = [score(scored, [kind], kind) for kind in (*IMAGE_KINDS, CONTROL_KIND, *VIDEO_KINDS)]
    return [*rows, score(scored, IMAGE_KINDS, "images"), score(scored, VIDEO_KINDS, "videos")]


def find_shortfalls(rows: Sequence[Row]) -> list[str]:
    """A line for each result below what the full demo must reach."""
    faults = []
    for row in rows:
        if row.kind == CONTROL_KIND:
            if row.accuracy > MOST_CONTROL:
                faults.append(f"{row.kind}: accuracy {row.accuracy:.3f}, expected at most {MOST_CONTROL}")
            continue
        if row.accuracy < (least := LEAST_ACCURACY.get(row.kind, 0.0)):
            faults.append(f"{row.kind}: accuracy {row.accuracy:.3f}, expected at least {least}")
        if row.accuracy < LEAST_RATIO * row.constant:
            faults.append(
                f"{row.kind}: {row.accuracy:.3f} is less than twice the best constant answer's {row.constant:.3f}"
            )
    return faults


def report_to_dict(rows: Sequence[Row], commands: Sequence[str], seconds: float) -> dict:
    """The content of report.json."""
    return {
        "accuracy": {row.kind: round(row.accuracy, 4) for row in rows if row.kind in LEAST_ACCURACY},
        "kinds": [
            {
                "kind": row.kind,
                "asked": row.asked,
                "right": row.right,
                "accuracy": round(row.accuracy, 4),
                "best_constant_answer": round(row.constant, 4),
            }
            for row in rows
        ],
        "commands": list(commands),
        "seconds": round(seconds, 1),
    }

"""Score the demo's answers: accuracy of each kind of question beside that of the best constant answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llavanext_cli.demo.questions import CLIP_KINDS, CONTROL_KIND, PICTURE_KINDS

LEAST_PICTURES, LEAST_CLIPS = 0.95, 0.85
"""Accuracies that the full demo must reach ..."""
LEAST_RATIO = 2.0
"""... and how many times better than the best constant answer every one of them must be."""
MOST_CONTROL = 0.5
"""With the tag's detail squashed away, more than this share of right answers means that a tile was not needed."""


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
    """One answer: `medium` is the id of what was asked about."""

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
    """A row for each kind and for the control, then one for all pictures and one for all clips, without the control."""
    rows = [score(scored, [kind], kind) for kind in (*PICTURE_KINDS, CONTROL_KIND, *CLIP_KINDS)]
    return [*rows, score(scored, PICTURE_KINDS, "pictures"), score(scored, CLIP_KINDS, "clips")]


def find_shortfalls(rows: Sequence[Row]) -> list[str]:
    """What the full demo should have reached and did not, a line each."""
    least = {"pictures": LEAST_PICTURES, "clips": LEAST_CLIPS}
    faults = []
    for row in rows:
        if row.kind == CONTROL_KIND:
            if row.accuracy > MOST_CONTROL:
                faults.append(f"{row.kind}: accuracy {row.accuracy:.3f}, expected at most {MOST_CONTROL}")
            continue
        if row.accuracy < least.get(row.kind, 0.0):
            faults.append(f"{row.kind}: accuracy {row.accuracy:.3f}, expected at least {least[row.kind]}")
        if row.accuracy < LEAST_RATIO * row.constant:
            faults.append(
                f"{row.kind}: {row.accuracy:.3f} is less than twice the best constant answer's {row.constant:.3f}"
            )
    return faults


def report_to_dict(rows: Sequence[Row], commands: Sequence[str], seconds: float) -> dict:
    """What goes into report.json."""
    return {
        "accuracy": {row.kind: round(row.accuracy, 4) for row in rows if row.kind in ("pictures", "clips")},
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

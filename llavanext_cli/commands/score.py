"""`llavanext score`: how good answers are."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llavanext_cli import console, options
from llavanext_cli.files import check_target

if TYPE_CHECKING:
    from llavanext_cli.scoring.score import Group, ScoreReport

METRICS_HELP = (
    "exact, vqa (soft, several references), anls, choice (letters), yesno (POPE), relaxed (numbers within 5 %), "
    "f1 (words), rouge (ROUGE-L)."
)


class MetricName(str, Enum):
    """The metrics of scoring/metrics.py, named here so that help need not import them."""

    exact = "exact"
    vqa = "vqa"
    anls = "anls"
    choice = "choice"
    yesno = "yesno"
    relaxed = "relaxed"
    f1 = "f1"
    rouge = "rouge"


def score(
    answers: Annotated[Path, typer.Argument(help="Answers, as `llavanext ask --batch` or LLaVA's scripts write them.")],
    references: Annotated[
        Path | None,
        typer.Option(
            "--references", "-r", help="References, joined by id.", show_default="those that the answers came with"
        ),
    ] = None,
    metric: Annotated[
        MetricName | None,
        typer.Option("--metric", "-m", help=METRICS_HELP, show_default="chosen by the references"),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Write a page with the scores and the wrong answers.", show_default=False),
    ] = None,
    seed: options.Seed = 0,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Score answers against references: overall, by source and by kind of question, with 95 % intervals.

    A file of references is JSON Lines or a JSON list. Each record has an id (id, question_id, questionId or qid) and
    one or more references (reference, references, answer, answers, label, captions). Options and a kind are read too.

    Example:
      llavanext score answers.jsonl

    More:
      llavanext score answers.jsonl --references val.json --metric vqa
      llavanext score answers.jsonl --report score.html

    Next: look at the wrong answers in score.html.
    """
    from llavanext_cli.scoring.report import write_score_report
    from llavanext_cli.scoring.score import ScoreRequest, run_score

    if report is not None:
        inputs = [answers, *([references] if references else [])]
        check_target(report, kind="a page", is_ours=_is_page, force=force, option="--report", inputs=inputs)
    found = run_score(ScoreRequest(answers, references, metric.value if metric else None, seed))
    if report is not None:
        with console.progress("Writing the report"):
            write_score_report(report, found)
    if json:
        console.out_json(found.summary())
        return
    show(found)
    if report is not None:
        console.say(f"Report: {report}")


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(15).lower() == b"<!doctype html>"


def show(found: ScoreReport) -> None:
    """Print a report: a table of the groups, and what was left out."""
    reason = f": {found.reason}" if found.reason else ""
    console.say(f"Metric: {found.metric}{reason}.")
    groups = [found.overall, *found.by_source, *found.by_kind]
    console.table(("", "answers", "score", "95 % interval"), [_row(group) for group in groups])
    if found.details:
        console.fields(found.details)
    if found.failed:
        console.warn(f"{found.failed} questions could not be asked; they count as wrong")
    if found.without_reference:
        console.warn(f"{found.without_reference} answers have no reference and are left out")
    if found.without_answer:
        console.warn(f"{found.without_answer} references have no answer")


def _row(group: Group) -> tuple[str, int, float, str]:
    return group.name, group.answers, round(group.score, 4), f"{group.low:.3f} to {group.high:.3f}"

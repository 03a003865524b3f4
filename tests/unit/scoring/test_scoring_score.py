"""Files of answers and references to scores: what is joined, which metric is chosen, and what is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llavanext_cli.app import app
from llavanext_cli.commands.score import MetricName
from llavanext_cli.errors import ConfigError, DataError
from llavanext_cli.scoring.answers import Answer, read_answers
from llavanext_cli.scoring.metrics import METRICS
from llavanext_cli.scoring.score import ScoreRequest, choose_metric, run_score, score_answers


def write_lines(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def answers_of(*pairs: tuple[str, str]) -> list[Answer]:
    return [Answer(str(number), "", said, (right,)) for number, (said, right) in enumerate(pairs)]


def test_our_answers_with_their_references(tmp_path):
    file = write_lines(
        tmp_path / "answers.jsonl",
        {"index": 0, "id": "1", "question": "What?", "answer": "A cat.", "reference": "cat", "source": "one"},
        {"index": 1, "id": "2", "question": "What?", "answer": "dog", "reference": "cat", "source": "two"},
        {"index": 2, "id": "3", "error": "no such file", "reference": "cat", "source": "two"},
        {"index": 3, "id": "4", "question": "What?", "answer": "dog", "reference": None},
    )
    report = run_score(ScoreRequest(file))
    assert report.metric == "exact"
    assert report.overall.answers == 3
    assert report.overall.score == pytest.approx(1 / 3)
    assert [(group.name, group.answers, group.score) for group in report.by_source] == [
        ("one", 1, 1.0),
        ("two", 2, 0.0),
    ]
    assert (report.failed, report.without_reference, report.without_answer) == (1, 1, 0)
    assert [item.answer.id for item in report.wrong] == ["2", "3"]


@pytest.mark.parametrize(
    "references",
    [
        '{"question_id": 1, "answer": "cat", "category": "animal"}\n{"question_id": 2, "answer": "two"}\n',
        '[{"id": "1", "label": "cat", "category": "animal"}, {"id": "2", "references": ["two", "2"]}]',
        '{"annotations": [{"question_id": 1, "answers": [{"answer": "cat"}], "category": "animal"},'
        ' {"question_id": 2, "answers": [{"answer": "two"}, {"answer": "2"}]}]}',
    ],
)
def test_llava_answers_are_joined_with_references_by_id(tmp_path, references):
    answers = write_lines(
        tmp_path / "answers.jsonl",
        {"question_id": 2, "prompt": "How many?", "text": "Two", "answer_id": "x"},
        {"question_id": 1, "prompt": "What?", "text": "cat", "answer_id": "y"},
    )
    (tmp_path / "right.json").write_text(references, encoding="utf-8")
    found = read_answers(answers, tmp_path / "right.json")
    assert [(item.id, item.text, item.references[0], item.kind) for item in found.items] == [
        ("2", "Two", "two", ""),
        ("1", "cat", "cat", "animal"),
    ]


@pytest.mark.parametrize(
    ("records", "metric"),
    [
        ([{"answer": "B", "reference": "B", "options": ["x", "y"]}], "choice"),
        ([{"answer": "B", "reference": "(B)"}, {"answer": "A", "reference": "C"}], "choice"),
        ([{"answer": "Yes", "reference": "yes"}, {"answer": "No", "reference": "No."}], "yesno"),
        ([{"answer": "cat", "references": ["cat"] * 10}], "vqa"),
        ([{"answer": "x", "reference": "A long description of everything in the image"}], "rouge"),
        ([{"answer": "x", "reference": "red"}, {"answer": "x", "reference": "yes"}], "exact"),
    ],
)
def test_the_metric_is_chosen_by_the_references(tmp_path, records, metric):
    file = write_lines(tmp_path / "a.jsonl", *({"id": str(number), **r} for number, r in enumerate(records)))
    assert choose_metric(read_answers(file).items)[0] == metric


def test_yesno_has_precision_recall_f1_and_the_share_of_yes():
    pairs = [("Yes", "yes")] * 3 + [("Yes", "no")] * 2 + [("No", "yes")] * 1 + [("No", "no")] * 4
    report = score_answers(answers_of(*pairs))
    assert report.overall.score == pytest.approx(0.7)
    assert report.details == pytest.approx({"precision": 3 / 5, "recall": 3 / 4, "f1": 2 / 3, "share of yes": 0.5})


def test_choice_counts_ambiguous_answers():
    report = score_answers(answers_of(("A", "A"), ("A or B", "A"), ("none of them", "B")))
    assert report.overall.score == pytest.approx(1 / 3)
    assert report.details == {"ambiguous": 1, "no option": 1}


def test_the_interval_holds_the_mean_of_the_population():
    """95 % intervals of many draws of a coin of 0.3 cover 0.3 about 95 times of 100."""
    rng, covered = random.Random(0), 0
    for trial in range(200):
        pairs = [("a" if rng.random() < 0.3 else "b", "a x") for _ in range(100)]
        group = score_answers(answers_of(*((said + " x", right) for said, right in pairs)), "exact", trial).overall
        covered += group.low <= 0.3 <= group.high
    assert 180 <= covered <= 199


def test_the_command_and_its_page(tmp_path):
    from PIL import Image

    Image.new("RGB", (400, 300), "red").save(tmp_path / "red.png")
    file = write_lines(
        tmp_path / "answers.jsonl",
        {
            "id": "<1>",
            "question": "What colour?",
            "answer": "blue",
            "reference": "red",
            "media": [str(tmp_path / "red.png")],
        },
        {
            "id": "2",
            "question": "What colour?",
            "answer": "red",
            "reference": "red",
            "media": [str(tmp_path / "no.png")],
        },
        {"id": "3", "question": "What colour?", "answer": "x", "reference": "red", "media": [str(tmp_path / "no.png")]},
    )
    page = tmp_path / "score.html"
    done = CliRunner().invoke(app, ["score", str(file), "--report", str(page)])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[1].split()[:3] == ["all", "3", "0.3333"]
    assert "Metric: exact: references are short texts." in done.stderr
    text = page.read_text(encoding="utf-8")
    assert text.count('class="card"') == 2
    assert text.count("data:image/jpeg;base64,") == 1 and "no.png cannot be read" in text
    assert "&lt;1&gt;" in text and "<1>" not in text
    again = CliRunner().invoke(app, ["score", str(file), "--report", str(page)])
    assert again.exit_code == 1 and "already holds a page" in again.stderr
    found = json.loads(CliRunner().invoke(app, ["score", str(file), "--json"]).stdout)
    assert found["overall"]["score"] == pytest.approx(1 / 3) and found["wrong"] == 2


@pytest.mark.parametrize(
    ("answers", "references", "metric", "message"),
    [
        ('{"id": "1", "answer": "x"}', None, None, "no answer has a reference"),
        ('{"id": "1", "answer": "x", "reference": " "}', None, None, "no answer has a reference"),
        ("", None, None, "no answers"),
        ("not json", None, None, "a.jsonl, line 1: not valid JSON"),
        ("[1]", None, None, "a.jsonl, record 1: not a JSON object"),
        ('{"id": "1"}', None, None, "a.jsonl, line 1: no answer"),
        ('{"answer": "x"}', '{"id": "1", "reference": "x"}', None, "a.jsonl, line 1: the answer has no id"),
        (
            '{"id": "1", "answer": "x"}',
            '{"id": "2", "reference": "x"}',
            None,
            "none of its 1 ids is the id",
        ),
        ('{"id": "1", "answer": "x"}', '{"reference": "x"}', None, "r.jsonl, line 1: no id"),
        ('{"id": "1", "answer": "x"}', '{"id": "1"}\n{"id": "1"}', None, "r.jsonl, line 2: id '1' is given twice"),
        ('{"id": "1", "answer": "x", "reference": "red"}', None, "yesno", "reference 'red' is not yes or no"),
        ('{"id": "1", "answer": "x", "reference": "red"}', None, "choice", "reference 'red' is not one of its options"),
    ],
)
def test_refusals(tmp_path, answers, references, metric, message):
    (tmp_path / "a.jsonl").write_text(answers, encoding="utf-8")
    right = None
    if references is not None:
        right = tmp_path / "r.jsonl"
        right.write_text(references, encoding="utf-8")
    with pytest.raises((DataError, ConfigError)) as fault:
        run_score(ScoreRequest(tmp_path / "a.jsonl", right, metric))
    assert message in fault.value.what
    assert fault.value.hint


def test_records_without_a_partner_are_counted(tmp_path):
    answers = write_lines(tmp_path / "a.jsonl", {"id": "1", "answer": "x"}, {"id": "2", "answer": "x"})
    right = write_lines(tmp_path / "r.jsonl", {"id": "2", "reference": "x"}, {"id": "3", "reference": "x"})
    report = run_score(ScoreRequest(answers, right))
    assert (report.overall.answers, report.without_reference, report.without_answer) == (1, 1, 1)


def test_the_command_names_all_metrics():
    assert [name.value for name in MetricName] == list(METRICS)


def test_scoring_loads_neither_mindspore_nor_the_readers_of_media(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", *({"id": str(n), "answer": "x", "reference": "x"} for n in range(2000)))
    code = (
        "import sys; from pathlib import Path\n"
        "from llavanext_cli.scoring.score import ScoreRequest, run_score\n"
        "run_score(ScoreRequest(Path(sys.argv[1])))\n"
        "print(sorted({'mindspore', 'mindformers', 'PIL', 'av', 'scipy', 'pandas', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

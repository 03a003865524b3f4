"""Answers and their references, read from the files in which people have them and joined by id.

answers      `ask --batch`: {"id", "question", "answer", "reference", ...}; LLaVA's scripts: {"question_id", "text"}
references   JSON Lines, a JSON list, or VQA's {"annotations": [...]}: an id, references, and perhaps options and a kind
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from llavanext_cli.errors import DataError

ID_KEYS = ("id", "question_id", "questionId", "qid")
ANSWER_KEYS = ("answer", "text")
REFERENCE_KEYS = ("references", "reference", "answers", "gt_answers", "answer", "label", "captions", "caption")
OPTION_KEYS = ("options", "candidates", "choices")
KIND_KEYS = ("kind", "category", "question_type", "type")
LIST_KEYS = ("annotations", "data", "questions")
"""Keys of a JSON object that holds the list of records."""


@dataclass(frozen=True)
class Answer:
    """One answer with what is right.

    Attributes:
        text: the answer; empty where the question could not be asked.
        references: right answers, one or more; empty where none is known.
        options: texts of the options of a multiple-choice question, in order.
        source: name of its data set.
        kind: kind of its question.
        media: absolute paths of the images and videos that it is about.
        error: why the question could not be asked.
    """

    id: str
    question: str
    text: str
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    source: str = ""
    kind: str = ""
    media: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Answers:
    """Answers that have references, and how many records had no partner."""

    items: tuple[Answer, ...]
    without_reference: int = 0
    without_answer: int = 0


def read_answers(path: Path, references: Path | None = None) -> Answers:
    """Read answers, and join them with the references of a second file where one is given.

    Raises:
        DataError: a file cannot be read, an id is missing or given twice, or no answer has a reference.
    """
    answers = [_read_answer(record, where) for record, where in read_records(path)]
    if not answers:
        raise DataError(f"{path}: no answers", "give the file that `llavanext ask --batch` wrote")
    missing = 0
    if references is not None:
        right = _read_references(references)
        ids = {answer.id for answer, _ in answers}
        if unnamed := next((where for answer, where in answers if not answer.id), None):
            raise DataError(
                f"{unnamed}: the answer has no id", "give each answer the id of its reference in --references"
            )
        if not ids & set(right):
            raise DataError(
                f"{references}: none of its {len(right)} ids is the id of an answer in {path}",
                f"compare an id of each: {next(iter(right))!r} and {answers[0][0].id!r}",
            )
        missing = len(set(right) - ids)
        answers = [(_join(answer, right.get(answer.id)), where) for answer, where in answers]
    known = tuple(answer for answer, _ in answers if answer.references)
    if not known:
        raise DataError(
            f"{path}: no answer has a reference", "give --references FILE, or ask a file of samples with answers"
        )
    return Answers(known, len(answers) - len(known), missing)


def read_records(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Records of JSON Lines, of a JSON list, or of an object with such a list; each with its place for messages.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise DataError(f"{path}: {fault.strerror}", "name a file of JSON Lines or a JSON list") from fault
    try:
        whole = msgspec.json.decode(data)
    except msgspec.DecodeError:
        whole = None
    if isinstance(whole, dict) and (key := next((key for key in LIST_KEYS if key in whole), None)):
        whole = whole[key]
    if isinstance(whole, list):
        records = [(record, f"{path.name}, record {number}") for number, record in enumerate(whole, start=1)]
    else:
        records = []
        for number, line in enumerate(data.splitlines(), start=1):
            if line.strip():
                where = f"{path.name}, line {number}"
                try:
                    records.append((msgspec.json.decode(line), where))
                except (msgspec.DecodeError, UnicodeDecodeError) as fault:
                    raise DataError(
                        f"{where}: not valid JSON: {fault}", "write one JSON object on each line, or a JSON list"
                    ) from fault
    for record, where in records:
        if not isinstance(record, dict):
            raise DataError(f"{where}: not a JSON object", 'write records like {"id": "1", "answer": "a cat"}')
    return records


def _read_answer(record: dict[str, Any], where: str) -> tuple[Answer, str]:
    if "answer" not in record and "text" not in record and "error" not in record:
        raise DataError(f"{where}: no answer", f"give each answer the key {' or '.join(ANSWER_KEYS)}")
    text = _first(record, ("text", "answer") if "question_id" in record else ANSWER_KEYS)
    media = record.get("media") or ()
    answer = Answer(
        id=_text(_first(record, ID_KEYS)),
        question=_text(_first(record, ("question", "prompt"))),
        text=_text(text),
        references=_references(record, ("references", "reference")),
        options=_options(record),
        source=_text(record.get("source")),
        kind=_text(_first(record, KIND_KEYS)),
        media=tuple(map(_text, media)) if isinstance(media, list) else (),
        error=_text(record.get("error")),
    )
    return answer, where


def _read_references(path: Path) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    for record, where in read_records(path):
        name = _text(_first(record, ID_KEYS))
        if not name:
            raise DataError(f"{where}: no id", f"give each reference an id under one of the keys {', '.join(ID_KEYS)}")
        if name in found:
            raise DataError(f"{where}: id {name!r} is given twice", "put all references of a question into one record")
        found[name] = Answer(
            id=name,
            question="",
            text="",
            references=_references(record, REFERENCE_KEYS),
            options=_options(record),
            source=_text(record.get("source")),
            kind=_text(_first(record, KIND_KEYS)),
        )
    if not found:
        raise DataError(f"{path}: no references", 'write records like {"id": "1", "reference": "a cat"}')
    return found


def _join(answer: Answer, right: Answer | None) -> Answer:
    if right is None:
        return replace(answer, references=())
    return replace(
        answer,
        references=right.references,
        options=right.options or answer.options,
        source=right.source or answer.source,
        kind=right.kind or answer.kind,
    )


def _first(record: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _references(record: dict[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    value = _first(record, keys)
    values = value if isinstance(value, list) else [value]
    # VQA's annotations: [{"answer": "cat", "answer_confidence": "yes"}, ...]
    texts = (_text(item.get("answer") if isinstance(item, dict) else item) for item in values)
    return tuple(text for text in texts if text.strip())


def _options(record: dict[str, Any]) -> tuple[str, ...]:
    value = _first(record, OPTION_KEYS)
    if isinstance(value, dict):  # {"A": "a cat", "B": "a dog"}
        value = [value[key] for key in sorted(value)]
    return tuple(map(_text, value)) if isinstance(value, list) else ()


def _text(value: Any) -> str:
    return "" if value is None else str(value)

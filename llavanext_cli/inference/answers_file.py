"""The file of a batch's answers: one JSON line for each question, in the order of the questions.

A line is an answer, {"index", "id", "question", "answer", "reference", "source", "media", "prompt_tokens",
"answer_tokens", "finish", "made_with"}, or an error, {"index", "id", "error", ...}; `llavanext score` reads both.
Lines are appended as answers come, so a killed run leaves a file whose last line may be cut off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavanext_cli.errors import DataError
from llavanext_cli.files import check_target, write_whole
from llavanext_cli.inference.inputs import Input

FIRST_BYTES = b'{"index": '
"""How every file of answers begins."""


def check_out(out: Path, questions: Path) -> None:
    """Check that answers may be written to `out`: a new file, or one that holds answers."""
    if str(out) == "-":
        raise DataError("answers go to a file, not to stdout", "use --out answers.jsonl")
    # A file of answers is continued or replaced later, when it is known what it answers.
    check_target(out, kind="a file of answers", is_ours=_holds_answers, force=True, inputs=[questions])


def _holds_answers(out: Path) -> bool:
    with out.open("rb") as file:
        return FIRST_BYTES.startswith(file.read(len(FIRST_BYTES)))


def read_answers(out: Path, inputs: Sequence[Input], made_with: str) -> tuple[int, list[int]]:
    """What an earlier run wrote. A last line that was cut off is removed from the file.

    Args:
        made_with: digest of what answers depend on beside the question.

    Returns:
        The number of lines, and the indices of those that are errors.

    Raises:
        DataError: the file holds answers of another run.
    """
    data = out.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    errors = []
    for number, line in enumerate(complete.splitlines()):
        answer = _parse(line)
        item = inputs[number] if number < len(inputs) else None
        asked = item.sample.turns[-1].text if item and item.sample else None
        problem = ""
        if item is None or (answer.get("index"), answer.get("id")) != (number, item.id):
            name = f" ({answer['id']})" if isinstance(answer.get("id"), str) else ""
            problem = f"is not an answer to a question of this run{name}"
        elif answer.get("question", asked) != asked:
            problem = f"answers another question: {answer['question']!r}"
        elif answer.get("made_with", made_with) != made_with:
            problem = "was made with another checkpoint, other --frames or other sampling options"
        if problem:
            raise DataError(f"{out}: line {number + 1} {problem}", "use another --out, or --force to replace the file")
        if "error" in answer:
            errors.append(number)
    if len(complete) < len(data):
        with out.open("r+b") as file:
            file.truncate(len(complete))
    return complete.count(b"\n"), errors


def replace_lines(out: Path, lines: Mapping[int, dict[str, Any]]) -> None:
    """Replace the lines at these indices, all or none of them."""
    target = out.resolve()
    kept = target.read_bytes().splitlines(keepends=True)
    for index, line in lines.items():
        kept[index] = format_line(line)
    write_whole(target, b"".join(kept))


def format_line(line: dict[str, Any]) -> bytes:
    """One line of JSON. A file's name may hold bytes that are not UTF-8: they are written as JSON escapes."""
    return json.dumps(line, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"


def _parse(line: bytes) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}

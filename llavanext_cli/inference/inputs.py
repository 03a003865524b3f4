"""What a batch asks: a file of questions, or a folder of media and one question.

    {"id": "1", "question": "What is it?", "image": "a.jpg"}             image, images, video or videos; or none
    {"id": ..., "media": [...], "turns": [...]}                          a sample, as mix writes it, header and all

A line that cannot be used is an input with a fault: it becomes one error record and does not end the batch. A file
without a single line of JSON is no file of questions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from llavanext_cli.errors import DataError, LlavaNextError
from llavanext_cli.inference.ask import build_question
from llavanext_cli.mixing.samples import HEADER_KEY, header_roots, read_header, read_samples
from llavanext_cli.processing.formats import CLIP_FORMATS, PICTURE_FORMATS, guess_kind
from llavanext_cli.processing.processor import Roots
from llavanext_cli.records import Medium, Sample, Turn, build_sample

KEYS = ("id", "image", "images", "question", "video", "videos")
"""Of a line with a question."""
AS_LINE = 'a line is like {"question": "What is it?", "image": "a.jpg"}'


@dataclass(frozen=True)
class Input:
    """One question.

    Attributes:
        id: the record's own, or the file's name within the folder.
        sample: the conversation up to its last question; None where there is a fault.
        reference: the answer that a training sample came with.
        fault: why it cannot be asked.
    """

    id: str
    sample: Sample | None
    reference: str | None = None
    fault: str = ""


@dataclass(frozen=True)
class Inputs:
    """All questions, where their media lie, and the number of a folder's files that are neither pictures nor clips."""

    items: tuple[Input, ...]
    roots: Roots
    skipped: int = 0


def read_inputs(path: Path, question: str | None) -> Inputs:
    """Read a file of questions, or pair every picture and clip below a folder with one question.

    Raises:
        DataError: there is nothing to ask, or the question is missing or one too many.
    """
    if path.is_dir():
        if not question:
            raise DataError(f"{path}: a folder needs a question", f'llavanext ask "What is it?" --batch {path} ...')
        return _read_folder(path, question)
    if question:
        raise DataError(
            "--batch FILE takes its questions from the file", "leave the question out, or name a folder of media"
        )
    if path.is_char_device() or path.is_block_device():
        raise DataError(f"{path}: is no file", "name a file of questions or a folder of media")
    try:
        text = path.read_text("utf-8-sig", errors="replace")
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}", "name a file of questions or a folder of media"
        ) from error
    if text.lstrip().startswith("["):
        file = read_samples(path)
        return Inputs(tuple(_split(sample) for sample in file), file.roots)
    return _read_lines(path, text)


def _read_folder(path: Path, question: str) -> Inputs:
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    kinds = [(file, guess_kind(file)) for file in files]
    items = tuple(
        Input(
            str(file.relative_to(path)),
            Sample(str(file.relative_to(path)), "", (Medium(kind, str(file)),), (Turn("user", question),)),
        )
        for file, kind in kinds
        if kind
    )
    if not items:
        formats = (*PICTURE_FORMATS.values(), *CLIP_FORMATS.values())
        endings = " ".join(endings[0] for endings in formats if endings)
        raise DataError(f"{path}: no pictures or clips", f"known endings: {endings} ...")
    return Inputs(items, {}, len(files) - len(items))


def _read_lines(path: Path, text: str) -> Inputs:
    header: tuple[str, int] | None = None
    items = []
    is_json = False
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        data: Any = None
        try:
            data = json.loads(line)
            is_json = True
            if isinstance(data, dict) and HEADER_KEY in data and not items:
                header = (line, number)
                continue
            items.append(_split(_to_sample(data, where, path.parent.absolute())))
        except (ValueError, RecursionError):
            items.append(Input("", None, fault=f"{where}: not valid JSON"))
        except LlavaNextError as error:
            name = str(data.get("id", "")) if isinstance(data, dict) else ""
            items.append(Input(name, None, fault=error.what))
    if not items or not is_json:
        what = "no line of it is valid JSON" if items else "no questions"
        raise DataError(f"{path}: {what}", AS_LINE)
    roots: dict[str, Any] = header_roots(path, read_header(path, header[0].encode(), header[1])) if header else {}
    for item in items:
        if item.sample and item.sample.source not in roots:
            roots[item.sample.source] = path.parent.absolute()
    return Inputs(tuple(items), roots)


def _to_sample(data: Any, where: str, folder: Path) -> Sample:
    if not isinstance(data, dict) or "question" not in data or "turns" in data:
        return build_sample(data, where)
    if not isinstance(data["question"], str):
        raise DataError(f"{where}: question must be text", AS_LINE)
    if not data["question"].strip():
        raise DataError(f"{where}: the question is empty", AS_LINE)
    if unknown := sorted(set(data) - set(KEYS)):
        raise DataError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(KEYS)}", AS_LINE)
    images, videos = (
        [folder / name for key in (kind, f"{kind}s") for name in _paths(data, key, where)]
        for kind in ("image", "video")
    )
    return replace(build_question(data["question"], images, videos), id=str(data.get("id", "")))


def _paths(data: dict[str, Any], key: str, where: str) -> Sequence[str]:
    value = data.get(key, [])
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: {key} must be a path or a list of paths", AS_LINE)
    return names


def _split(sample: Sample) -> Input:
    """A training sample's last answer is set aside as the reference."""
    if sample.turns[-1].role == "user":
        return Input(sample.id, sample)
    return Input(sample.id, Sample(sample.id, sample.source, sample.media, sample.turns[:-1]), sample.turns[-1].text)

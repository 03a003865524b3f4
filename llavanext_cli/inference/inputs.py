"""What a batch asks: a file of questions, or a folder of media and one question.

    {"id": "1", "question": "What is it?", "image": "a.jpg"}             image, images, video, videos, or no media
    {"id": ..., "media": [...], "turns": [...]}                          a sample as mix writes it; also with its header

A line that cannot be used is an input with an error: its answer is one error line, and the batch continues. A file
without a single line of JSON is not a file of questions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavanext_cli.errors import DataError, LlavaNextError
from llavanext_cli.inference.questions import build_question
from llavanext_cli.mixing.samples import HEADER_KEY, header_roots, read_header, read_samples
from llavanext_cli.processing.formats import IMAGE_FORMATS, VIDEO_FORMATS, guess_kind
from llavanext_cli.processing.processor import Roots
from llavanext_cli.records import Medium, Sample, Turn, build_sample

KEYS = ("id", "image", "images", "question", "video", "videos")
"""Keys of a line with a question."""
LINE_HINT = 'a line is like {"question": "What is it?", "image": "a.jpg"}'


@dataclass(frozen=True)
class Input:
    """One question.

    Attributes:
        id: of the record, or the file's name within the folder.
        sample: the conversation up to its last question; None when there is an error.
        reference: the answer in a training sample.
        error: why it cannot be asked.
    """

    id: str
    sample: Sample | None
    reference: str | None = None
    error: str = ""


@dataclass(frozen=True)
class Inputs:
    """All questions, the media folder of each source, and how many files of a folder are neither images nor videos."""

    items: tuple[Input, ...]
    roots: Roots
    skipped: int = 0


def read_inputs(path: Path, question: str | None) -> Inputs:
    """Read a file of questions, or pair every image and video below a folder with one question.

    Raises:
        DataError: there is nothing to ask; or a folder comes without a question, or a file with one.
    """
    if path.is_dir():
        if not question:
            raise DataError(f"{path}: a folder needs a question", f'llavanext ask "What is it?" --batch {path} ...')
        return _read_folder(path, question)
    if question:
        raise DataError(
            "--batch FILE reads its questions from the file", "omit the question, or name a folder of images and videos"
        )
    other = "name a file of questions, or a folder of images and videos"
    if path.is_char_device() or path.is_block_device():
        raise DataError(f"{path} is a device, not a file", other)
    try:
        text = path.read_text("utf-8-sig", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", other) from error
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
    items = []
    for file in files:
        if kind := guess_kind(file):
            name = str(file.relative_to(path))
            items.append(Input(name, Sample(name, "", (Medium(kind, str(file)),), (Turn("user", question),))))
    if not items:
        formats = (*IMAGE_FORMATS.values(), *VIDEO_FORMATS.values())
        suffixes = " ".join(suffixes[0] for suffixes in formats if suffixes)
        raise DataError(f"{path}: no images or videos", f"known suffixes: {suffixes} ...")
    return Inputs(tuple(items), {}, len(files) - len(items))


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
            items.append(Input("", None, error=f"{where}: not valid JSON"))
        except LlavaNextError as error:
            name = str(data.get("id", "")) if isinstance(data, dict) else ""
            items.append(Input(name, None, error=error.what))
    if not items or not is_json:
        what = "no line is valid JSON" if items else "the file has no questions"
        raise DataError(f"{path}: {what}", LINE_HINT)
    roots: dict[str, Any] = header_roots(path, read_header(path, header[0].encode(), header[1])) if header else {}
    for item in items:
        if item.sample and item.sample.source not in roots:
            roots[item.sample.source] = path.parent.absolute()
    return Inputs(tuple(items), roots)


def _to_sample(data: Any, where: str, folder: Path) -> Sample:
    if not isinstance(data, dict) or "question" not in data or "turns" in data:
        return build_sample(data, where)
    if not isinstance(data["question"], str):
        raise DataError(f"{where}: question must be text", LINE_HINT)
    if not data["question"].strip():
        raise DataError(f"{where}: the question is empty", LINE_HINT)
    if unknown := sorted(set(data) - set(KEYS)):
        raise DataError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(KEYS)}", LINE_HINT)
    images, videos = (
        [folder / name for key in (kind, f"{kind}s") for name in _paths(data, key, where)]
        for kind in ("image", "video")
    )
    return build_question(data["question"], images, videos, str(data.get("id", "")))


def _paths(data: dict[str, Any], key: str, where: str) -> Sequence[str]:
    value = data.get(key, [])
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: {key} must be a path or a list of paths", LINE_HINT)
    return names


def _split(sample: Sample) -> Input:
    """The last answer of a training sample becomes the reference."""
    if sample.turns[-1].role == "user":
        return Input(sample.id, sample)
    return Input(sample.id, Sample(sample.id, sample.source, sample.media, sample.turns[:-1]), sample.turns[-1].text)

"""Answer many questions: one line an input, in the order of the input, appended as they come.

    inputs    0 1 2 3 4 5 6 7 | 8 9 ...        windows of a few batches, in order
    groups    (1 4 6 7) (0 2 3 5) | ...        within a window: batches of like length
    output    0 1 2 3 ...                      a line as soon as all before it are there

Which questions share a batch, and to what length they are padded, follows from the input alone. So a run that was
killed computes the batches of its missing lines just as the undisturbed run would, and writes the same answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavanext_cli.errors import DataError, LlavaNextError
from llavanext_cli.inference.ask import build_sampling, check_media, open_session, prepare
from llavanext_cli.inference.inputs import Input, Inputs, read_inputs
from llavanext_cli.processing.processor import Processor, Roots
from llavanext_cli.records import EncodedSample

WINDOW = 4
"""Batches whose questions are sorted by length together. A kill loses less than this."""
BUCKET = 128
"""Prompts are padded to a multiple of this many tokens: few graphs for many lengths."""


@dataclass(frozen=True)
class BatchReport:
    """What a batch did: inputs, answers written now, failed inputs, lines that were there before, and files of the
    folder that are neither pictures nor clips."""

    questions: int
    answered: int
    failed: int
    kept: int
    skipped: int
    seconds: float
    out: Path


def run_batch(
    questions: Path,
    out: Path,
    checkpoint: Path,
    *,
    question: str | None = None,
    preset_name: str | None = None,
    overrides: Sequence[str] = (),
    devices: int | None = None,
    frames: int | None = None,
    batch_size: int = 8,
    changes: dict[str, Any] | None = None,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    verbose: bool = False,
) -> BatchReport:
    """Answer every question; a run that was interrupted goes on where it stopped.

    Args:
        questions: a file of questions (see inputs.py), or a folder of pictures and clips.
        out: JSON Lines `{"index", "id", "question", "answer", "reference", "prompt_tokens", "answer_tokens",
            "finish"}`, or `{"index", "id", "error"}` where a question could not be asked. Complete lines that are
            there are kept.
        question: what to ask about each file of a folder.
        batch_size: questions answered at once.
        force: begin anew.
        progress: called with (inputs done, all inputs, rate and time left).

    Raises:
        LlavaNextError: input, checkpoint or preset cannot be used.
    """
    started = time.monotonic()
    inputs = read_inputs(questions, question)
    wants_video = any(m.kind == "video" for item in inputs.items if item.sample for m in item.sample.media)
    opened, preset, processor = prepare(checkpoint, preset_name, overrides, devices, frames, wants_video=wants_video)
    sampling = build_sampling(preset, changes or {})
    total = len(inputs.items)
    _check_out(out, questions)
    kept = 0 if force or not out.exists() else count_answers(out, inputs)
    failed = 0
    if kept < total:
        assert preset.ask is not None, "an ask preset"
        shapes = {"batch_size": batch_size, "bucket": BUCKET}
        with (
            open_session(opened, preset, preset.ask.cache_tokens, verbose=verbose, **shapes) as session,
            # a file's name may hold bytes that are no UTF-8: JSON's own escapes keep them
            out.open("w" if force else "a", encoding="utf-8", errors="backslashreplace") as stream,
        ):
            begun = time.monotonic()
            groups = plan_groups(inputs, processor, batch_size, kept)
            pending: dict[int, dict[str, Any]] = {}
            written = kept
            for lines in answer_groups(groups, inputs, session, sampling, processor, preset):
                pending |= {index: line for index, line in lines.items() if index >= kept}
                while written in pending:
                    line = pending.pop(written)
                    failed += "error" in line
                    stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                    written += 1
                stream.flush()
                if progress:
                    done = written + len(pending)
                    progress(done, total, _pace(done - kept, total - done, time.monotonic() - begun))
    return BatchReport(total, total - kept - failed, failed, kept, inputs.skipped, time.monotonic() - started, out)


def plan_groups(inputs: Inputs, processor: Processor, batch_size: int, kept: int) -> Iterator[list[int]]:
    """Indices of each batch, the same whatever `kept` is; batches whose lines are all there are left out."""
    window = WINDOW * batch_size
    for begin in range(kept // window * window, len(inputs.items), window):
        members = range(begin, min(begin + window, len(inputs.items)))
        ordered = sorted(members, key=lambda index: (_length(inputs.items[index], processor, inputs.roots), index))
        groups = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
        yield from sorted((group for group in groups if max(group) >= kept), key=min)


def answer_groups(
    groups: Iterator[list[int]], inputs: Inputs, session: Any, sampling: Any, processor: Processor, preset: Any
) -> Iterator[dict[int, dict[str, Any]]]:
    """Index → output line, batch by batch. The media of the next batch are read while this one is computed."""

    def encode(group: list[int]) -> list[tuple[int, EncodedSample | str]]:
        return [(index, _encode(inputs.items[index], session, processor, preset, inputs.roots)) for index in group]

    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for group in groups:
            coming = reader.submit(encode, group)
            if waiting is not None:
                yield _answer(waiting.result(), inputs, session, sampling)
            waiting = coming
        if waiting is not None:
            yield _answer(waiting.result(), inputs, session, sampling)


def _encode(item: Input, session: Any, processor: Processor, preset: Any, roots: Roots) -> EncodedSample | str:
    """The encoded question, or what is wrong with it."""
    if item.sample is None:
        return item.fault
    try:
        check_media(item.sample, preset)
        encoded = processor.encode_question(item.sample, roots)
        session.check_room(encoded)
    except LlavaNextError as fault:
        return fault.what
    return encoded


def _answer(
    group: list[tuple[int, EncodedSample | str]], inputs: Inputs, session: Any, sampling: Any
) -> dict[int, dict[str, Any]]:
    """Output lines of one batch; a fault is that question's alone."""
    lines: dict[int, dict[str, Any]] = {}
    ready = []
    for index, encoded in group:
        if isinstance(encoded, str):
            lines[index] = {"index": index, "id": inputs.items[index].id, "error": encoded}
        else:
            ready.append((index, encoded))
    answers = session.answer([encoded for _, encoded in ready], sampling) if ready else []
    for (index, _), answer in zip(ready, answers, strict=True):
        item = inputs.items[index]
        assert item.sample is not None, "it was encoded"
        lines[index] = {
            "index": index,
            "id": item.id,
            "question": item.sample.turns[-1].text,
            "answer": answer.text,
            "reference": item.reference,
            "prompt_tokens": answer.prompt_tokens,
            "answer_tokens": len(answer.tokens),
            "finish": answer.finish,
        }
    return lines


def _length(item: Input, processor: Processor, roots: Roots) -> int:
    """Prompt tokens from headers; 0 where the question has a fault of its own, which is reported when it is asked."""
    try:
        return processor.count_question(item.sample, roots) if item.sample else 0
    except LlavaNextError:
        return 0


def _pace(done: int, left: int, seconds: float) -> str:
    """ "0.8 a second, 2 min left"."""
    if not done or not seconds:
        return ""
    rate, rest = done / seconds, left * seconds / done
    spelled = f"{rest:.0f} s" if rest < 90 else f"{rest / 60:.0f} min" if rest < 5400 else f"{rest / 3600:.1f} h"
    return f"{rate:.2g} a second, {spelled} left" if rate >= 0.1 else f"{60 * rate:.2g} a minute, {spelled} left"


def _check_out(out: Path, questions: Path) -> None:
    """Refuse what cannot be written, before a model is loaded."""
    if out.is_dir():
        raise DataError(f"{out}: is a folder, and answers go to a file", f"use --out {out / 'answers.jsonl'}")
    if not out.parent.is_dir():
        raise DataError(f"{out.parent}: no such folder", f"mkdir -p {out.parent}")
    if out.exists() and questions.exists() and out.samefile(questions):
        raise DataError(f"{out}: the answers would go into the file of the questions", "use another --out")


def count_answers(out: Path, inputs: Inputs) -> int:
    """Answers to the first of the inputs that an earlier run wrote; a line cut off by its end is removed.

    Raises:
        DataError: the file holds something else.
    """
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.splitlines()
    for number, line in enumerate(lines):
        if number >= len(inputs.items) or not _is_answer(line, number, inputs.items[number].id):
            raise DataError(
                f"{out}: line {number + 1} is no answer to a question of this run",
                "use another --out, or --force to begin anew",
            )
    if len(whole) < len(data):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return len(lines)


def _is_answer(line: bytes, index: int, name: str) -> bool:
    try:
        data = json.loads(line)
    except ValueError:
        return False
    return isinstance(data, dict) and (data.get("index"), data.get("id")) == (index, name)

"""Answer many questions: one line for each, in the order of the input, appended as answers come.

    inputs    0 1 2 3 4 5 6 7 | 8 9 ...        windows of a few batches, in order
    groups    (1 4 6 7) (0 2 3 5) | ...        within a window: batches of similar length
    output    0 1 2 3 ...                      a line as soon as all lines before it are written

Which questions share a batch, and to what length they are padded, depends on the input alone. So a run that was killed
computes the batches of its missing lines just as an undisturbed run would, and writes the same answers. Lines with an
`error` are tried again; the file is then replaced by one with their answers, so that it is complete at any moment.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llavanext_cli.errors import LlavaNextError
from llavanext_cli.files import claim
from llavanext_cli.inference.answers_file import check_out, format_line, read_answers, replace_lines
from llavanext_cli.inference.inputs import Inputs, read_inputs
from llavanext_cli.inference.prepare import Prepared, open_session, prepare
from llavanext_cli.inference.questions import check_media
from llavanext_cli.inference.request import AskRequest
from llavanext_cli.inference.session import check_room, load_eos_token_ids
from llavanext_cli.inference.step import BATCH_BUCKET
from llavanext_cli.processing.processor import resolve_path
from llavanext_cli.records import EncodedSample

WINDOW = 4
"""Batches whose questions are sorted by length together. A kill loses less than this."""


@dataclass(frozen=True)
class BatchReport:
    """What a batch did: number of inputs, answers written now, inputs that failed, answers that were there before, and
    files of the folder that are neither images nor videos."""

    questions: int
    answered: int
    failed: int
    kept: int
    skipped: int
    seconds: float
    out: Path


def run_batch(request: AskRequest, progress: Callable[[int, int], None] | None = None) -> BatchReport:
    """Answer every question. A run that was interrupted resumes where it stopped.

    Args:
        request: with `batch` and `out`.
        progress: called with (inputs done, all inputs).

    Raises:
        LlavaNextError: input, checkpoint or preset cannot be used, or the output is that of another run.
    """
    assert request.batch is not None and request.out is not None, "a batch"
    started, out = time.monotonic(), request.out
    inputs = read_inputs(request.batch, request.question)
    has_videos = any(m.kind == "video" for item in inputs.items if item.sample for m in item.sample.media)
    prepared = prepare(request, has_videos=has_videos)
    check_out(out, request.batch)
    batch = _Batch(inputs, prepared, request.batch_size)
    total = len(inputs.items)
    with claim(out):
        is_resumed = out.exists() and not request.force
        written, errors = read_answers(out, inputs.items, batch.made_with) if is_resumed else (0, [])
        retried = {index for index in errors if not isinstance(batch.encode(index), str)}
        todo = retried | set(range(written, total))
        kept, failed = written - len(errors), len(errors) - len(retried)
        if todo:
            shapes = {"batch_size": request.batch_size, "bucket": BATCH_BUCKET}
            cache = prepared.settings.cache_tokens
            with open_session(prepared, cache, verbose=request.verbose, **shapes) as session:
                if request.force:
                    out.write_bytes(b"")
                left = len(todo)
                for lines in batch.answer(session, todo, out, written):
                    failed += sum("error" in line for line in lines.values())
                    left -= len(lines)
                    if progress:
                        progress(total - left, total)
    return BatchReport(total, total - kept - failed, failed, kept, inputs.skipped, time.monotonic() - started, out)


class _Batch:
    """The questions of one run and what answers them."""

    def __init__(self, inputs: Inputs, prepared: Prepared, batch_size: int):
        self.items, self.roots, self.prepared, self.batch_size = inputs.items, inputs.roots, prepared, batch_size
        self.made_with = describe_run(prepared)

    def answer(self, session: Any, todo: set[int], out: Path, written: int) -> Iterator[dict[int, dict[str, Any]]]:
        """Write the lines of the questions in `todo`; yields index → line, batch by batch.

        Args:
            written: lines that `out` holds already.
        """
        waiting: dict[int, dict[str, Any]] = {}
        first = written
        for group in self._encoded(todo):
            lines = {index: line for index, line in self._answer_group(session, group).items() if index in todo}
            if replaced := {index: line for index, line in lines.items() if index < first}:
                replace_lines(out, replaced)
            waiting |= {index: line for index, line in lines.items() if index >= first}
            with out.open("ab") as stream:
                while written in waiting:
                    stream.write(format_line(waiting.pop(written)))
                    written += 1
            yield lines

    def groups(self, todo: set[int]) -> Iterator[list[int]]:
        """Indices of each batch that has some of `todo`. Which questions form a batch does not depend on `todo`."""
        window = WINDOW * self.batch_size
        for begin in range(0, len(self.items), window):
            members = range(begin, min(begin + window, len(self.items)))
            if todo.isdisjoint(members):
                continue
            ordered = sorted(members, key=lambda index: (self._length(index), index))
            groups = [ordered[at : at + self.batch_size] for at in range(0, len(ordered), self.batch_size)]
            yield from sorted((group for group in groups if not todo.isdisjoint(group)), key=min)

    def encode(self, index: int) -> EncodedSample | str:
        """The encoded question, or what is wrong with it."""
        item, prepared = self.items[index], self.prepared
        if item.sample is None:
            return item.error
        try:
            check_media(item.sample, prepared.preset)
            encoded = prepared.processor.encode_question(item.sample, self.roots)
            check_room(encoded, prepared.settings.cache_tokens)
        except LlavaNextError as fault:
            return fault.what
        return encoded

    def _encoded(self, todo: set[int]) -> Iterator[dict[int, EncodedSample | str]]:
        """Each batch, encoded. The media of the next batch are read while this one is computed."""

        def encode(group: list[int]) -> dict[int, EncodedSample | str]:
            return {index: self.encode(index) for index in group}

        with ThreadPoolExecutor(1) as reader:
            waiting = None
            for group in self.groups(todo):
                coming = reader.submit(encode, group)
                if waiting is not None:
                    yield waiting.result()
                waiting = coming
            if waiting is not None:
                yield waiting.result()

    def _answer_group(self, session: Any, group: dict[int, EncodedSample | str]) -> dict[int, dict[str, Any]]:
        """Output lines of one batch; a question that cannot be asked does not affect the others."""
        ready = {index: encoded for index, encoded in group.items() if not isinstance(encoded, str)}
        lines = {
            index: {"index": index, "id": self.items[index].id, "error": error, **self._about(index)}
            for index, error in group.items()
            if index not in ready
        }
        answers = session.answer(list(ready.values()), self.prepared.sampling) if ready else []
        for index, answer in zip(ready, answers, strict=True):
            item = self.items[index]
            assert item.sample is not None, "it was encoded"
            lines[index] = {
                "index": index,
                "id": item.id,
                "question": item.sample.turns[-1].text,
                "answer": answer.text,
                "reference": None,
                **self._about(index),
                "prompt_tokens": answer.prompt_tokens,
                "answer_tokens": len(answer.tokens),
                "finish": answer.finish,
                "made_with": self.made_with,
            }
        return lines

    def _about(self, index: int) -> dict[str, Any]:
        """What `score` needs beside an answer, as far as it is known: reference, source, and the files of the media."""
        item = self.items[index]
        if item.sample is None:
            return {}
        try:
            media = [os.path.abspath(resolve_path(item.sample, medium, self.roots)) for medium in item.sample.media]
        except LlavaNextError:  # no root: the error of this question says so
            media = []
        about = {"reference": item.reference, "source": item.sample.source, "media": media}
        return {name: value for name, value in about.items() if value}

    def _length(self, index: int) -> int:
        """Prompt tokens, from image headers; 0 for a question that cannot be asked, which is reported later."""
        sample = self.items[index].sample
        try:
            return self.prepared.processor.count_question(sample, self.roots) if sample else 0
        except LlavaNextError:
            return 0


def describe_run(prepared: Prepared) -> str:
    """A digest of what an answer depends on beside its question."""
    checkpoint, preset = prepared.checkpoint, prepared.preset
    ends = sorted(load_eos_token_ids(checkpoint.folder, prepared.processor.tokenizer.eos_id))
    parts = (
        checkpoint.digest,
        preset.data.frames,
        preset.runtime.compute_dtype,
        asdict(prepared.sampling),
        ends,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

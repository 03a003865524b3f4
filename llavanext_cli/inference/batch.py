"""Answer a file of questions: one answer a line, in the order of the input, appended as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavanext_cli.errors import DataError, LlavaNextError
from llavanext_cli.inference.ask import build_sampling, check_media, open_session, prepare
from llavanext_cli.mixing.samples import read_samples
from llavanext_cli.processing.processor import Processor, Roots
from llavanext_cli.records import EncodedSample, Sample


@dataclass(frozen=True)
class BatchReport:
    """What a batch did: lines of the input, answers written now, failed inputs, lines that were answered before."""

    questions: int
    answered: int
    failed: int
    kept: int
    out: Path


@dataclass(frozen=True)
class Question:
    """One line of the input: the conversation up to the last question, and the answer it came with, if any."""

    sample: Sample
    reference: str | None


def run_batch(
    questions: Path,
    out: Path,
    checkpoint: Path,
    *,
    preset_name: str | None = None,
    overrides: Sequence[str] = (),
    frames: int | None = None,
    batch_size: int = 8,
    changes: dict[str, float | int] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    verbose: bool = False,
) -> BatchReport:
    """Answer every question of a file; a run that was interrupted goes on where it stopped.

    Args:
        questions: samples as `mix` writes them. A last turn of the assistant is kept as `reference`, not shown.
        out: JSON Lines `{"index", "id", "question", "answer", "reference", "prompt_tokens", "answer_tokens",
        "finish"}`,
            or `{"index", "id", "error"}` where a question could not be asked. Complete lines that are there are kept.
        batch_size: questions answered at once.
        force: begin anew.

    Raises:
        LlavaNextError: the file, the checkpoint or the preset cannot be used.
    """
    file = read_samples(questions)
    wants_video = any(medium.kind == "video" for sample in file for medium in sample.media)
    opened, preset, processor = prepare(checkpoint, preset_name, overrides, frames, wants_video=wants_video)
    sampling = build_sampling(preset, changes or {})
    kept = 0 if force else _complete_lines(out)
    if kept > len(file):
        raise DataError(f"{out} holds {kept} answers, more than {questions} has questions", hint="use another --out")
    asked = [split_question(sample) for sample in file]
    need = max((_room(q, processor, file.roots) for q in asked[kept:]), default=0)
    failed = 0
    if kept < len(asked):
        assert preset.ask is not None, "an ask preset"
        tokens = min(need + sampling.max_new_tokens + 1, preset.ask.cache_tokens)
        with (
            open_session(opened, preset, tokens, batch_size=batch_size, verbose=verbose) as session,
            out.open("w" if force else "a", encoding="utf-8") as stream,
        ):
            for begin in range(kept, len(asked), batch_size):
                group = list(enumerate(asked[begin : begin + batch_size], begin))
                lines = dict(_answer_group(group, session, sampling, processor, preset, file.roots))
                for index, _ in group:
                    failed += "error" in lines[index]
                    stream.write(json.dumps(lines[index], ensure_ascii=False) + "\n")
                stream.flush()
                if progress:
                    progress(min(begin + batch_size, len(asked)), len(asked))
    return BatchReport(len(asked), len(asked) - kept - failed, failed, kept, out)


def split_question(sample: Sample) -> Question:
    """A training sample's last answer is set aside as the reference."""
    if sample.turns[-1].role == "user":
        return Question(sample, None)
    turns = sample.turns[:-1]
    return Question(Sample(sample.id, sample.source, sample.media, turns), sample.turns[-1].text)


def _answer_group(
    group: list[tuple[int, Question]], session: Any, sampling: Any, processor: Processor, preset: Any, roots: Roots
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, output line) of each question; a fault is that question's alone."""
    ready: list[tuple[int, Question, EncodedSample]] = []
    for index, question in group:
        try:
            check_media(question.sample, preset)
            encoded = processor.encode_question(question.sample, roots)
            session.check_room(encoded)
            ready.append((index, question, encoded))
        except LlavaNextError as fault:
            yield index, {"index": index, "id": question.sample.id, "error": fault.what}
    if not ready:
        return
    answers = session.answer([encoded for _, _, encoded in ready], sampling)
    for (index, question, _), answer in zip(ready, answers, strict=True):
        yield (
            index,
            {
                "index": index,
                "id": question.sample.id,
                "question": question.sample.turns[-1].text,
                "answer": answer.text,
                "reference": question.reference,
                "prompt_tokens": answer.prompt_tokens,
                "answer_tokens": len(answer.tokens),
                "finish": answer.finish,
            },
        )


def _room(question: Question, processor: Processor, roots: Roots) -> int:
    """Prompt tokens from headers; 0 where the question has a fault of its own, which is reported when it is asked."""
    try:
        return processor.count_question(question.sample, roots)
    except LlavaNextError:
        return 0


def _complete_lines(out: Path) -> int:
    """Answers that an earlier run wrote; a line cut off by its end is removed."""
    if not out.exists():
        return 0
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return whole.count(b"\n")

"""Answer many questions: one line an input, in the order of the input, appended as they come.

    inputs    0 1 2 3 4 5 6 7 | 8 9 ...        windows of a few batches, in order
    groups    (1 4 6 7) (0 2 3 5) | ...        within a window: batches of like length
    output    0 1 2 3 ...                      a line as soon as all before it are there

Which questions share a batch, and to what length they are padded, follows from the input alone. So a run that was
killed computes the batches of its missing lines just as the undisturbed run would, and writes the same answers. Lines
with an `error` are tried again; the file is replaced by one with their answers, so that it is whole at any moment.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli.errors import DataError, LlavaNextError
from llavanext_cli.files import write_whole
from llavanext_cli.inference.ask import build_sampling, check_media, open_session, prepare
from llavanext_cli.inference.engines import BATCH_BUCKET
from llavanext_cli.inference.inputs import Input, Inputs, read_inputs
from llavanext_cli.inference.session import check_room, load_eos_token_ids
from llavanext_cli.processing.processor import Processor, Roots
from llavanext_cli.records import EncodedSample
from llavanext_cli.units import format_seconds

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset
    from llavanext_cli.inference.sampling import Sampling
    from llavanext_cli.weights.checkpoint import Checkpoint

FIRST_BYTES = b'{"index": '
"""What every file of answers begins with."""

WINDOW = 4
"""Batches whose questions are sorted by length together. A kill loses less than this."""


@dataclass(frozen=True)
class BatchReport:
    """What a batch did: inputs, answers written now, failed inputs, answers that were there before, and files of the
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
            "finish", "made_with"}`, or `{"index", "id", "error"}` where a question could not be asked. Answers that
            are there are kept.
        question: what to ask about each file of a folder.
        batch_size: questions answered at once.
        force: begin anew.
        progress: called with (inputs done, all inputs, rate and time left).

    Raises:
        LlavaNextError: input, checkpoint or preset cannot be used, or the output is that of another run.
    """
    started = time.monotonic()
    inputs = read_inputs(questions, question)
    wants_video = any(m.kind == "video" for item in inputs.items if item.sample for m in item.sample.media)
    opened, preset, processor = prepare(checkpoint, preset_name, overrides, devices, frames, wants_video=wants_video)
    sampling = build_sampling(preset, changes or {})
    total = len(inputs.items)
    _check_out(out, questions, force)
    made_with = describe_run(opened, processor, preset, sampling)
    with _claim(out):
        there, faults = read_answers(out, inputs, made_with) if out.exists() and not force else (0, [])
        assert preset.ask is not None, "an ask preset"
        cache = preset.ask.cache_tokens
        mended = {
            at
            for at in faults
            if not isinstance(_encode(inputs.items[at], cache, processor, preset, inputs.roots), str)
        }
        todo = mended | set(range(there, total))
        failed = len(faults) - len(mended)
        if todo:
            with open_session(
                opened, preset, cache, verbose=verbose, batch_size=batch_size, bucket=BATCH_BUCKET
            ) as session:
                if force:
                    out.write_bytes(b"")
                begun, left = time.monotonic(), len(todo)
                groups = plan_groups(inputs, processor, batch_size, todo)
                pending: dict[int, dict[str, Any]] = {}
                written = there
                for lines in answer_groups(groups, inputs, session, sampling, processor, preset, made_with):
                    new = {index: lines[index] for index in lines.keys() & todo}
                    if replaced := {index: line for index, line in new.items() if index < there}:
                        replace_lines(out, replaced)
                    pending |= {index: line for index, line in new.items() if index >= there}
                    with out.open("ab") as stream:
                        while written in pending:
                            stream.write(_spell(pending.pop(written)))
                            written += 1
                    failed += sum("error" in line for line in new.values())
                    left -= len(new)
                    if progress:
                        progress(total - left, total, _pace(len(todo) - left, left, time.monotonic() - begun))
    kept = there - len(faults)
    return BatchReport(total, total - kept - failed, failed, kept, inputs.skipped, time.monotonic() - started, out)


def describe_run(checkpoint: Checkpoint, processor: Processor, preset: Preset, sampling: Sampling) -> str:
    """A digest of what an answer depends on beside its question."""
    ends = sorted(load_eos_token_ids(checkpoint.folder, processor.tokenizer.eos_id))
    parts = (checkpoint.digest, preset.data.frames, preset.runtime.compute_dtype, asdict(sampling), ends)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def plan_groups(inputs: Inputs, processor: Processor, batch_size: int, todo: set[int]) -> Iterator[list[int]]:
    """Indices of each batch, the same whatever is to be done; batches without an index in `todo` are left out."""
    window = WINDOW * batch_size
    for begin in range(0, len(inputs.items), window):
        members = range(begin, min(begin + window, len(inputs.items)))
        if todo.isdisjoint(members):
            continue
        ordered = sorted(members, key=lambda index: (_length(inputs.items[index], processor, inputs.roots), index))
        groups = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
        yield from sorted((group for group in groups if not todo.isdisjoint(group)), key=min)


def answer_groups(
    groups: Iterator[list[int]],
    inputs: Inputs,
    session: Any,
    sampling: Any,
    processor: Processor,
    preset: Any,
    made_with: str,
) -> Iterator[dict[int, dict[str, Any]]]:
    """Index → output line, batch by batch. The media of the next batch are read while this one is computed."""

    def encode(group: list[int]) -> list[tuple[int, EncodedSample | str]]:
        cache = preset.ask.cache_tokens
        return [(index, _encode(inputs.items[index], cache, processor, preset, inputs.roots)) for index in group]

    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for group in groups:
            coming = reader.submit(encode, group)
            if waiting is not None:
                yield _answer(waiting.result(), inputs, session, sampling, made_with)
            waiting = coming
        if waiting is not None:
            yield _answer(waiting.result(), inputs, session, sampling, made_with)


def _encode(item: Input, cache_tokens: int, processor: Processor, preset: Any, roots: Roots) -> EncodedSample | str:
    """The encoded question, or what is wrong with it."""
    if item.sample is None:
        return item.fault
    try:
        check_media(item.sample, preset)
        encoded = processor.encode_question(item.sample, roots)
        check_room(encoded, cache_tokens)
    except LlavaNextError as fault:
        return fault.what
    return encoded


def _answer(
    group: list[tuple[int, EncodedSample | str]], inputs: Inputs, session: Any, sampling: Any, made_with: str
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
            "made_with": made_with,
        }
    return lines


def _length(item: Input, processor: Processor, roots: Roots) -> int:
    """Prompt tokens from headers; 0 where the question has a fault of its own, which is reported when it is asked."""
    try:
        return processor.count_question(item.sample, roots) if item.sample else 0
    except LlavaNextError:
        return 0


def _pace(done: int, left: int, seconds: float) -> str:
    """ "0.8 a second, 2 min 05 s left"."""
    if not done or not seconds:
        return ""
    rate = done / seconds
    number, unit = (rate, "second") if rate >= 0.1 else (60 * rate, "minute")
    return f"{f'{number:.0f}' if number >= 100 else f'{number:.2g}'} a {unit}, {format_seconds(left / rate)} left"


def _check_out(out: Path, questions: Path, force: bool) -> None:
    """Refuse what cannot be written, before a model is loaded."""
    if str(out) == "-":
        raise DataError("answers go to a file, not to stdout", "use --out answers.jsonl")
    if out.is_dir():
        raise DataError(f"{out}: is a folder, and answers go to a file", f"use --out {out / 'answers.jsonl'}")
    if out.exists() and not out.is_file():
        raise DataError(f"{out}: is no file that answers can be kept in", "use --out answers.jsonl")
    if not out.parent.is_dir():
        raise DataError(f"{out.parent}: no such folder", f"mkdir -p {out.parent}")
    if out.exists() and questions.exists() and out.samefile(questions):
        raise DataError(f"{out}: the answers would go into the file of the questions", "use another --out")
    if force and out.exists():
        with out.open("rb") as file:
            start = file.read(len(FIRST_BYTES))
        if not FIRST_BYTES.startswith(start):
            raise DataError(f"{out}: holds no answers, so --force does not replace it", "use another --out")


@contextmanager
def _claim(out: Path) -> Iterator[None]:
    """Hold `out`: two runs would each append what the other appends too.

    Raises:
        LlavaNextError: another run holds it.
    """
    from filelock import FileLock, Timeout

    target = out.resolve()
    lock = FileLock(target.with_name(f".{target.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as fault:
        hint = "wait until it has ended, or use another --out"
        raise LlavaNextError(f"{out} is in use by another llavanext ask", hint) from fault
    except OSError as fault:
        raise DataError(f"{out} cannot be written: {fault.strerror}", "use --out in another folder") from fault
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def read_answers(out: Path, inputs: Inputs, made_with: str) -> tuple[int, list[int]]:
    """What an earlier run wrote about the first of the inputs; a line cut off by its end is removed.

    Returns:
        The number of lines, and which of them are faults.

    Raises:
        DataError: the file holds something else.
    """
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    faults = []
    for number, line in enumerate(whole.splitlines()):
        answer = _read_answer(line)
        item = inputs.items[number] if number < len(inputs.items) else None
        asked = item.sample.turns[-1].text if item and item.sample else None
        problem = ""
        if item is None or (answer.get("index"), answer.get("id")) != (number, item.id):
            asked_before = f" ({answer['id']})" if isinstance(answer.get("id"), str) else ""
            problem = f"is no answer to a question of this run{asked_before}"
        elif answer.get("question", asked) != asked:
            problem = f"answers another question: {answer['question']!r}"
        elif answer.get("made_with", made_with) != made_with:
            problem = "was made with another checkpoint, --frames or way of drawing tokens"
        if problem:
            raise DataError(f"{out}: line {number + 1} {problem}", "use another --out, or --force to begin anew")
        if "error" in answer:
            faults.append(number)
    if len(whole) < len(data):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return whole.count(b"\n"), faults


def replace_lines(out: Path, lines: dict[int, dict[str, Any]]) -> None:
    """Put lines in the place of those of the same index, in all or in none."""
    target = out.resolve()
    kept = target.read_bytes().splitlines(keepends=True)
    for index, line in lines.items():
        kept[index] = _spell(line)
    write_whole(target, b"".join(kept))


def _spell(line: dict[str, Any]) -> bytes:
    """A file's name may hold bytes that are no UTF-8: JSON's own escapes keep them."""
    return json.dumps(line, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"


def _read_answer(line: bytes) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}

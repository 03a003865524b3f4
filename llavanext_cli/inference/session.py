"""A loaded model that answers: built once, then any number of questions, alone or in batches.

    prefill   all tokens of the prompt at once, media fused in    → logits of the last one, cache filled
    decode    one token of each answer                            → logits of the next, cache grown by one

The device is an engine's business (cpu.py, ascend.py); here tokens are chosen, answers ended and pieces of text handed
out as they are complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llavanext_cli.config.hf_config import REFETCH
from llavanext_cli.config.sections import is_int
from llavanext_cli.errors import CheckpointError, DataError
from llavanext_cli.inference.engines import BUCKET, CACHE_STEP, build_engine
from llavanext_cli.inference.sampling import Sampling, next_token
from llavanext_cli.inference.writing import Writer
from llavanext_cli.processing.tokens import load_tokenizer
from llavanext_cli.records import EncodedSample
from llavanext_cli.weights.headers import read_object, short

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset
    from llavanext_cli.weights.checkpoint import Checkpoint

TextCallback = Callable[[int, str], None]
"""Called with (row of the batch, piece of text) as answers grow."""


@dataclass(frozen=True)
class Answer:
    """One answer and what it took.

    Attributes:
        text: without special tokens, and without the stop string that ended it.
        tokens: ids of the answer; the one that ends it is not among them.
        prompt_tokens: length of the prompt, media included.
        cached_tokens: how many of them the cache held already.
        media_tokens: positions of the prompt that media take.
        tiles, frames: picture tiles (base tiles included) and frames that were looked at.
        finish: "stop" when the model or a stop string ended it, "length" when a limit did.
        seconds_to_first: from the call to its first token, compiling included.
        tokens_per_second: of the tokens after the first; 0 when there are none.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    media_tokens: int
    tiles: int
    frames: int
    finish: str
    seconds_to_first: float
    tokens_per_second: float


class Session:
    """The model of one checkpoint on one device.

    Args:
        checkpoint: opened checkpoint folder.
        preset: an ask preset.
        folder: for what the libraries write.
        batch_size: answers computed at once.
        cache_tokens: most room for prompt and answer of each; the preset's when None.
        bucket, cache_step: prompts and caches are as long as multiples of these (CPU). Coarse ones are compiled less
            often, fine ones compute less.
        graphs: folder in which compiled graphs are kept from one run to the next (CPU); None: they are not.
        verbose: leave the libraries' warnings on the terminal.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        preset: Preset,
        folder: Path,
        *,
        batch_size: int = 1,
        cache_tokens: int | None = None,
        bucket: int = BUCKET,
        cache_step: int = CACHE_STEP,
        graphs: Path | None = None,
        verbose: bool = False,
    ):
        assert preset.ask is not None, "a session needs an ask preset"
        self.arch = checkpoint.architecture
        self.tokenizer = load_tokenizer(checkpoint.folder)
        self.ends = load_eos_token_ids(checkpoint.folder, self.tokenizer.eos_id)
        self.batch_size = batch_size
        self.cache_tokens = cache_tokens or preset.ask.cache_tokens
        self.engine, self.network = build_engine(
            checkpoint,
            preset,
            folder,
            batch_size=batch_size,
            cache_tokens=self.cache_tokens,
            bucket=bucket,
            cache_step=cache_step,
            graphs=graphs,
            verbose=verbose,
        )
        self.remembers = preset.runtime.target == "CPU" and batch_size == 1
        self.before: tuple[EncodedSample, np.ndarray] | None = None

    def answer(
        self, samples: Sequence[EncodedSample], sampling: Sampling, on_text: TextCallback | None = None
    ) -> list[Answer]:
        """Answer up to `batch_size` encoded questions at once. A session of one question at a time keeps its cache,
        and computes of the next prompt only what differs.

        Raises:
            DataError: a prompt leaves no room for an answer; how many tokens it has and how many fit.
        """
        started = time.monotonic()
        for sample in samples:
            self.check_room(sample)
        generators = [np.random.default_rng(sampling.seed) for _ in samples]
        answers: list[list[int]] = [[] for _ in samples]
        finished = ["" for _ in samples]
        lengths = np.array([sample.length for sample in samples] + [1] * (self.batch_size - len(samples)))
        writers = [Writer(self.tokenizer, sampling.stop, _to_row(on_text, row)) for row in range(len(samples))]
        room = int(lengths.max()) + sampling.max_new_tokens
        past = self._cached(samples[0], room) if self.remembers else 0
        self.before = None  # until this one is through: an interrupt leaves the cache half written
        step = self.engine.start(samples, room, self.cache_tokens, past)
        first = time.monotonic() - started
        while True:
            logits = None if sampling.is_greedy else step.logits()
            tokens = np.zeros(self.batch_size, np.int32)
            for row, sample in enumerate(samples):
                if finished[row]:
                    continue
                token = int(step.tokens[row])
                if logits is not None:
                    seen = [*sample.input_ids.tolist(), *answers[row]] if sampling.repetition_penalty != 1 else ()
                    token = next_token(logits[row], seen, sampling, generators[row])
                if token in self.ends:
                    finished[row] = "stop"
                    continue
                answers[row].append(token)
                tokens[row] = token
                if writers[row].push(token):
                    finished[row] = "stop"
                elif len(answers[row]) == sampling.max_new_tokens or lengths[row] == self.cache_tokens:
                    finished[row] = "length"
            if all(finished):
                break
            lengths = np.minimum(lengths + 1, self.cache_tokens)
            step = self.engine.step(tokens, lengths)
        seconds = time.monotonic() - started - first
        if self.remembers:
            held = [*samples[0].input_ids.tolist(), *answers[0]][: int(lengths[0])]
            self.before = (samples[0], np.array(held, np.int32))
        media_ids = (self.arch.image_token_index, self.arch.video_token_index)
        return [
            Answer(
                text=writer.close().strip(),
                tokens=tuple(ids),
                prompt_tokens=sample.length,
                cached_tokens=past,
                media_tokens=int(np.isin(sample.input_ids, media_ids).sum()),
                tiles=len(sample.tiles),
                frames=len(sample.frames),
                finish=reason,
                seconds_to_first=first,
                tokens_per_second=(len(ids) - 1) / seconds if len(ids) > 1 and seconds > 0 else 0.0,
            )
            for sample, ids, reason, writer in zip(samples, answers, finished, writers, strict=True)
        ]

    def check_room(self, sample: EncodedSample) -> None:
        """Raise a `DataError` when the prompt fills the cache."""
        check_room(sample, self.cache_tokens)

    def _cached(self, sample: EncodedSample, room: int) -> int:
        """How many tokens of a prompt the cache holds from the conversation before; at least one is left to compute."""
        if self.before is None or self.engine.cache_length(room, self.cache_tokens) != self.engine.length:
            return 0
        old, held = self.before
        for new, cached in ((sample.tiles, old.tiles), (sample.frames, old.frames)):
            if len(new) < len(cached) or not np.array_equal(new[: len(cached)], cached):
                return 0
        size = min(len(held), sample.length - 1)
        differ = np.flatnonzero(held[:size] != sample.input_ids[:size])
        return int(differ[0]) if len(differ) else size


def load_eos_token_ids(folder: Path, eos_id: int) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's, and what generation_config.json names, as in transformers'
    `generate`.

    Raises:
        CheckpointError: the file cannot be read, or names something else than ids.
    """
    path = folder / "generation_config.json"
    named = read_object(path).get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(map(is_int, ids)):
        raise CheckpointError(f"{path}: eos_token_id must be one id or a list of ids, not {short(named)}", REFETCH)
    return frozenset([eos_id, *ids])


def check_room(sample: EncodedSample, cache_tokens: int, hint: str = "use fewer frames or pictures") -> None:
    """Raise a `DataError` when a prompt leaves no room for an answer in a cache of so many tokens."""
    if sample.length >= cache_tokens:
        name = f"question {sample.id}" if sample.id else "the question"
        raise DataError(f"{name} has {sample.length} tokens, media included; {cache_tokens - 1} fit", hint)


def _to_row(on_text: TextCallback | None, row: int) -> Callable[[str], None] | None:
    return (lambda text: on_text(row, text)) if on_text else None

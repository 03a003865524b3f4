"""A loaded model that answers: built once, then asked any number of questions, alone or in batches.

    prefill   all tokens of the prompt at once, media included    → logits of the last one, cache filled
    decode    one token of each answer                            → logits of the next one, cache grown by one

The engine computes (cpu.py, ascend.py). The session chooses tokens, ends answers and passes on text as it is complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llavanext_cli.config.model_folder import REFETCH, read_optional
from llavanext_cli.config.validation import is_int
from llavanext_cli.errors import CheckpointError, DataError
from llavanext_cli.inference.engines import build_engine
from llavanext_cli.inference.sampling import Sampling, next_token
from llavanext_cli.inference.step import BUCKET, CACHE_STEP
from llavanext_cli.inference.streaming import TextStreamer
from llavanext_cli.processing.tokenizer import Tokenizer, load_tokenizer
from llavanext_cli.records import EncodedSample
from llavanext_cli.weights.untrusted import short

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
        tokens: ids of the answer, without the one that ends it.
        prompt_tokens: length of the prompt, media included.
        cached_tokens: how many of them were in the cache already.
        media_tokens: positions of the prompt that media take.
        tiles, frames: tiles of images (base tiles included) and frames of videos.
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
        bucket, cache_step: prompts and caches are as long as multiples of these (CPU). Large steps compile less often,
            small ones compute less.
        verbose: leave the libraries' warnings on the terminal.

    Attributes:
        cached: the last question and the tokens that the cache holds of it and its answer; None when it holds nothing
            that may be used again.
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
        verbose: bool = False,
    ):
        assert preset.ask is not None, "a session needs an ask preset"
        self.arch = checkpoint.architecture
        self.tokenizer = load_tokenizer(checkpoint.folder)
        self.ends = load_eos_token_ids(checkpoint.folder, self.tokenizer.eos_id)
        self.batch_size = batch_size
        self.cache_tokens = cache_tokens or preset.ask.cache_tokens
        self.engine = build_engine(
            checkpoint,
            preset,
            folder,
            batch_size=batch_size,
            cache_tokens=self.cache_tokens,
            bucket=bucket,
            cache_step=cache_step,
            verbose=verbose,
        )
        self.keeps_cache = preset.runtime.target == "CPU" and batch_size == 1
        self.cached: tuple[EncodedSample, np.ndarray] | None = None

    def answer(
        self, samples: Sequence[EncodedSample], sampling: Sampling, on_text: TextCallback | None = None
    ) -> list[Answer]:
        """Answer up to `batch_size` encoded questions at once. A session that answers one question at a time keeps its
        cache, and computes only the part of the next prompt that differs.

        Raises:
            DataError: a prompt leaves no room for an answer.
        """
        started = time.monotonic()
        for sample in samples:
            check_room(sample, self.cache_tokens)
        rows = [
            _Row(sample, sampling, self.tokenizer, _to_row(on_text, number)) for number, sample in enumerate(samples)
        ]
        lengths = np.array([sample.length for sample in samples] + [1] * (self.batch_size - len(samples)))
        room = int(lengths.max()) + sampling.max_new_tokens
        past = self._count_cached(samples[0], room) if self.keeps_cache else 0
        self.cached = None  # until this answer is complete: after an interrupt the cache is half written
        step = self.engine.prefill(samples, room, self.cache_tokens, past)
        first = time.monotonic() - started
        while True:
            logits = None if sampling.is_greedy else step.logits()
            tokens = np.zeros(self.batch_size, np.int32)
            for number, row in enumerate(rows):
                if not row.finish:
                    is_full = lengths[number] == self.cache_tokens
                    token = row.choose(int(step.tokens[number]), None if logits is None else logits[number])
                    tokens[number] = row.add(token, self.ends, is_full)
            if all(row.finish for row in rows):
                break
            lengths = np.minimum(lengths + 1, self.cache_tokens)
            step = self.engine.decode(tokens, lengths)
        seconds = time.monotonic() - started - first
        if self.keeps_cache:
            held = [*samples[0].input_ids.tolist(), *rows[0].tokens][: int(lengths[0])]
            self.cached = (samples[0], np.array(held, np.int32))
        media_ids = (self.arch.image_token_index, self.arch.video_token_index)
        return [
            Answer(
                text=row.streamer.close().strip(),
                tokens=tuple(row.tokens),
                prompt_tokens=row.sample.length,
                cached_tokens=past,
                media_tokens=int(np.isin(row.sample.input_ids, media_ids).sum()),
                tiles=len(row.sample.tiles),
                frames=len(row.sample.frames),
                finish=row.finish,
                seconds_to_first=first,
                tokens_per_second=(len(row.tokens) - 1) / seconds if len(row.tokens) > 1 and seconds > 0 else 0.0,
            )
            for row in rows
        ]

    def _count_cached(self, sample: EncodedSample, room: int) -> int:
        """How many tokens of a prompt the cache holds from the conversation so far; at least one is left to compute."""
        if self.cached is None or self.engine.cache_length(room, self.cache_tokens) != self.engine.length:
            return 0
        old, held = self.cached
        for new, cached in ((sample.tiles, old.tiles), (sample.frames, old.frames)):
            if len(new) < len(cached) or not np.array_equal(new[: len(cached)], cached):
                return 0
        size = min(len(held), sample.length - 1)
        differ = np.flatnonzero(held[:size] != sample.input_ids[:size])
        return int(differ[0]) if len(differ) else size


class _Row:
    """One answer of a batch while it grows; `finish` is empty until it ends."""

    def __init__(
        self, sample: EncodedSample, sampling: Sampling, tokenizer: Tokenizer, on_text: Callable[[str], None] | None
    ):
        self.sample, self.sampling = sample, sampling
        self.tokens: list[int] = []
        self.finish = ""
        self.streamer = TextStreamer(tokenizer, sampling.stop, on_text)
        self._generator = np.random.default_rng(sampling.seed)

    def choose(self, likeliest: int, logits: np.ndarray | None) -> int:
        """The next token; `logits` are `float32[V]`, or None when the likeliest token is taken anyway."""
        if logits is None:
            return likeliest
        seen = [*self.sample.input_ids.tolist(), *self.tokens] if self.sampling.repetition_penalty != 1 else ()
        return next_token(logits, seen, self.sampling, self._generator)

    def add(self, token: int, ends: frozenset[int], is_full: bool) -> int:
        """Add a token and notice whether the answer ends with it; the token to go on with, 0 after an end."""
        if token in ends:
            self.finish = "stop"
            return 0
        self.tokens.append(token)
        if self.streamer.push(token):
            self.finish = "stop"
        elif is_full or len(self.tokens) == self.sampling.max_new_tokens:
            self.finish = "length"
        return token


def load_eos_token_ids(folder: Path, eos_id: int) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's, and those in generation_config.json, as in transformers' `generate`.

    Raises:
        CheckpointError: the file cannot be read, or has something else than ids there.
    """
    path = folder / "generation_config.json"
    named = read_optional(folder, path.name).get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(map(is_int, ids)):
        raise CheckpointError(f"{path}: eos_token_id must be one id or a list of ids, not {short(named)}", REFETCH)
    return frozenset([eos_id, *ids])


def check_room(sample: EncodedSample, cache_tokens: int, hint: str = "use fewer frames or images") -> None:
    """Raise a `DataError` when a prompt leaves no room for an answer in a cache of so many tokens."""
    if sample.length >= cache_tokens:
        name = f"question {sample.id}" if sample.id else "the question"
        what = f"{name} has {sample.length} tokens, media included, but at most {cache_tokens - 1} fit"
        raise DataError(what, hint)


def _to_row(on_text: TextCallback | None, number: int) -> Callable[[str], None] | None:
    return (lambda text: on_text(number, text)) if on_text else None

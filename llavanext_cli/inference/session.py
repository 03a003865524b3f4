"""A loaded model that answers: built once, then any number of questions, alone or in batches.

    prefill   all tokens of the prompt at once, media fused in    → logits of the last one, cache filled
    decode    one token of each answer                            → logits of the next, cache grown by one

Both are graphs of static shapes. A prompt is padded to a bucket, and a bucket is compiled when it is first needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llavanext_cli.errors import DataError
from llavanext_cli.inference.sampling import Sampling, next_token
from llavanext_cli.processing.packing import collate
from llavanext_cli.processing.tokens import load_tokenizer
from llavanext_cli.records import Batch, EncodedSample

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset
    from llavanext_cli.weights.checkpoint import Checkpoint

BUCKET = 64
"""Prompts are padded to a multiple of this many tokens."""

TokenCallback = Callable[[int, int], None]
"""Called with (row of the batch, token) as answers grow."""


@dataclass(frozen=True)
class Answer:
    """One answer and what it took.

    Attributes:
        text: without special tokens.
        tokens: ids of the answer; the end-of-sequence id is not among them.
        prompt_tokens: length of the prompt, media included.
        media_tokens: positions of the prompt that media take.
        tiles, frames: picture tiles (base tiles included) and frames that were looked at.
        finish: "stop" when the model ended it, "length" when a limit did.
        seconds_to_first: from the call to its first token, compiling included.
        tokens_per_second: of the tokens after the first; 0 when there are none.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
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
        cache_tokens: room for prompt and answer of each; the preset's when None.
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
        verbose: bool = False,
    ):
        from llavanext_cli.model.runtime import load_libraries

        assert preset.ask is not None, "a session needs an ask preset"
        load_libraries(folder, preset.runtime.target, threads=preset.runtime.threads, verbose=verbose)
        from llavanext_cli.model.config import LlavaNextConfig
        from llavanext_cli.model.llava_next import LlavaNext
        from llavanext_cli.weights.checkpoint import load_into

        self.arch = checkpoint.architecture
        self.tokenizer = load_tokenizer(checkpoint.folder)
        self.batch_size = batch_size
        self.cache_tokens = cache_tokens or preset.ask.cache_tokens
        self.on_cpu = preset.runtime.target == "CPU"
        self.block_size = preset.ask.block_size
        self.blocks = -(-self.cache_tokens // self.block_size)
        self.network = LlavaNext(
            LlavaNextConfig(
                architecture=checkpoint.architecture,
                target=preset.runtime.target,
                batch_size=batch_size,
                seq_length=self.cache_tokens,
                tiles=preset.data.tiles,
                frames=preset.data.frame_budget,
                compute_dtype=preset.runtime.compute_dtype,
                param_init_type=preset.runtime.parameter_dtype,
                use_flash_attention=preset.runtime.flash_attention,
                use_past=True,
                num_blocks=self.blocks * batch_size,
                block_size=self.block_size,
            )
        )
        load_into(self.network, checkpoint)
        self.network.set_train(False)
        self.shapes: set[tuple[int, int, int]] = set()

    def answer(
        self, samples: Sequence[EncodedSample], sampling: Sampling, on_token: TokenCallback | None = None
    ) -> list[Answer]:
        """Answer up to `batch_size` encoded questions at once.

        Raises:
            DataError: a prompt leaves no room for an answer; how many tokens it has and how many fit.
        """
        started = time.monotonic()
        for sample in samples:
            self.check_room(sample)
        batch, frames = self._pad(samples)
        generators = [np.random.default_rng(sampling.seed) for _ in samples]
        answers: list[list[int]] = [[] for _ in samples]
        finished = ["" for _ in samples]
        lengths = batch.lengths.copy()
        logits = self._prefill(batch, frames)
        first = time.monotonic() - started
        while True:
            tokens = np.zeros((self.batch_size, 1), np.int32)
            for row, sample in enumerate(samples):
                if finished[row]:
                    continue
                seen = [*sample.input_ids.tolist(), *answers[row]] if sampling.repetition_penalty != 1 else ()
                token = next_token(logits[row], seen, sampling, generators[row])
                if token == self.tokenizer.eos_id:
                    finished[row] = "stop"
                    continue
                answers[row].append(token)
                tokens[row] = token
                if on_token:
                    on_token(row, token)
                if len(answers[row]) == sampling.max_new_tokens or lengths[row] == self.cache_tokens:
                    finished[row] = "length"
            if all(finished):
                break
            lengths = np.minimum(lengths + 1, self.cache_tokens)
            logits = self._decode(tokens, lengths)
        seconds = time.monotonic() - started - first
        media_ids = (self.arch.image_token_index, self.arch.video_token_index)
        return [
            Answer(
                text=self.tokenizer.decode(ids).strip(),
                tokens=tuple(ids),
                prompt_tokens=sample.length,
                media_tokens=int(np.isin(sample.input_ids, media_ids).sum()),
                tiles=len(sample.tiles),
                frames=len(sample.frames),
                finish=reason,
                seconds_to_first=first,
                tokens_per_second=(len(ids) - 1) / seconds if len(ids) > 1 and seconds > 0 else 0.0,
            )
            for sample, ids, reason in zip(samples, answers, finished, strict=True)
        ]

    def check_room(self, sample: EncodedSample) -> None:
        """Raise a `DataError` when the prompt fills the cache."""
        if sample.length >= self.cache_tokens:
            name = f"question {sample.id}" if sample.id else "the question"
            raise DataError(
                f"{name} has {sample.length} tokens, media included; {self.cache_tokens - 1} fit",
                hint=f"use fewer frames or pictures, or --set ask.cache_tokens={sample.length + 256}",
            )

    def _pad(self, samples: Sequence[EncodedSample]) -> tuple[Batch, int]:
        """To the smallest compiled shape that holds the batch without doubling its work, else to a new bucket.

        Returns:
            The batch, and how many of its tiles are frames.
        """
        length = max(sample.length for sample in samples)
        tiles = max(len(sample.tiles) for sample in samples)
        frames = max(len(sample.frames) for sample in samples)
        fitting = [s for s in self.shapes if s[0] >= length and s[1] >= tiles and s[2] >= frames]
        near = [s for s in fitting if s[0] <= 2 * length and s[1] + s[2] <= 2 * max(1, tiles + frames)]
        bucket = min(-(-length // BUCKET) * BUCKET, self.cache_tokens)
        shape = min(near, default=(bucket, tiles, frames))
        self.shapes.add(shape)
        rows = [*samples, *[samples[0]] * (self.batch_size - len(samples))]
        return collate(rows, seq_length=shape[0], tiles=shape[1], frames=shape[2], arch=self.arch), shape[2]

    def _prefill(self, batch: Batch, frames: int) -> np.ndarray:
        """`float32[B, V]`: logits of each prompt's last token."""
        from mindspore import Tensor

        self.network.language_model.add_flags_custom(is_first_iteration=True)
        # One graph a shape. MindSpore keys graphs by phase alone when it is called "prefill" or "increment".
        self.network.phase = f"prefill {batch.input_ids.shape} {batch.tiles.shape[1]} {frames}"
        media: tuple = (None, None)
        if batch.tiles.shape[1]:
            media = (Tensor(batch.tiles), Tensor(batch.feature_index))
        return self._call(Tensor(batch.input_ids), *media, lengths=batch.lengths, frames=frames)

    def _decode(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """`float32[B, V]`: logits after one more token `int32[B, 1]` of each answer; `lengths` count it."""
        from mindspore import Tensor

        self.network.language_model.add_flags_custom(is_first_iteration=False)
        self.network.phase = "decode"
        return self._call(Tensor(tokens), None, None, lengths=lengths, frames=0)

    def _call(self, input_ids, tiles, feature_index, *, lengths: np.ndarray, frames: int) -> np.ndarray:
        from mindspore import Tensor

        logits = self.network(
            input_ids, tiles, feature_index, None, Tensor(lengths.astype(np.int32)), None, None, frames
        )
        return logits.asnumpy().reshape(self.batch_size, -1)

"""The Ascend engine's bookkeeping, on a network of a few lines that keeps its tokens in a paged cache: prompts of mixed
lengths, padded, must not see each other, nor the padding."""

from types import SimpleNamespace

import numpy as np
import pytest

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.records import EncodedSample

BLOCK, VOCAB = 4, 97


class PagedSum:
    """Its logits point at the sum of all tokens so far, read back from the slots they were written to."""

    def __init__(self, slots: int):
        self.cache = np.full(slots, 1000, np.int64)
        self.phase = ""
        self.calls: list[str] = []
        self.language_model = SimpleNamespace(add_flags_custom=self.flag)

    def flag(self, is_first_iteration: bool) -> None:
        self.first = is_first_iteration

    def __call__(self, ids, tiles, index, labels, lengths, tables, slots, frames):
        from mindspore import Tensor

        self.calls.append(self.phase)
        ids, lengths, tables, slots = (value.asnumpy() for value in (ids, lengths, tables, slots))
        assert tiles is None and index is None and labels is None and frames == 0
        assert ids.shape[0] == (1 if self.first else len(tables))
        self.cache[slots[slots >= 0]] = ids.reshape(-1)[slots >= 0]
        logits = np.zeros((len(lengths), VOCAB), np.float32)
        for row, length in enumerate(lengths):
            places = np.arange(length)
            seen = self.cache[tables[row][places // BLOCK] * BLOCK + places % BLOCK]
            logits[row, seen.sum() % VOCAB] = 1
        return Tensor(logits)


def question(ids: list[int]) -> EncodedSample:
    row = np.array(ids, np.int32)
    empty = np.zeros((0, 3, 336, 336), np.float32)
    return EncodedSample("", row, row, empty, empty, np.full(len(ids), 1, np.int32))


@pytest.mark.parametrize("asked", [3, 2])
def test_a_batch_answers_as_each_question_alone(mindspore_cpu, asked):
    from llavanext_cli.inference.ascend import AscendEngine

    batch, cache = 3, 150
    blocks = -(-cache // BLOCK)
    network = PagedSum(batch * blocks * BLOCK)
    engine = AscendEngine(network, Architecture(), batch, cache, BLOCK)
    prompts = [[1, 5, 9], [1, *range(2, 90)], [1, 7]][:asked]
    expected = [list(prompt) for prompt in prompts]
    step = engine.prefill([question(prompt) for prompt in prompts], room=120, limit=cache)
    lengths = np.array([len(prompt) for prompt in prompts] + [1] * (batch - asked))
    for _ in range(12):
        assert step.tokens[:asked].tolist() == [sum(tokens) % VOCAB for tokens in expected]
        for tokens, token in zip(expected, step.tokens, strict=False):
            tokens.append(int(token))
        lengths = lengths + 1
        step = engine.decode(step.tokens, lengths)
    assert len({phase for phase in network.calls if phase.startswith("prefill")}) == 2  # 64 and 128 tokens
    assert step.logits().shape == (batch, VOCAB)


def test_a_prompt_is_padded_alike_whatever_was_asked_before():
    from llavanext_cli.inference.ascend import AscendEngine, padded_length

    def shape(engine, length, tiles, frames):
        row, zeros = np.ones(length, np.int32), np.zeros((tiles + frames, 3, 336, 336), np.float32)
        batch, count = engine._pad(EncodedSample("", row, row, zeros[:tiles], zeros[tiles:], row))
        return batch.input_ids.shape[1], batch.tiles.shape[1] - count, count

    fresh, used = (AscendEngine(None, Architecture(), 1, 4096, 16) for _ in range(2))
    shape(used, 1900, 5, 4)
    for question, padded in {
        (1000, 3, 0): (1024, 5, 0),
        (1948, 4, 0): (2048, 5, 0),
        (2060, 6, 2): (2560, 10, 2),
        (4090, 0, 0): (4096, 0, 0),
    }.items():
        assert shape(fresh, *question) == shape(used, *question) == padded
    lengths = [padded_length(length) for length in range(1, 8193)]
    assert all(length <= padded <= max(64, 1.25 * length + 64) for length, padded in enumerate(lengths, 1))
    assert len(set(lengths)) == 24

"""Slots of the paged cache: every token of every sequence has one of its own, in a block of its sequence."""

import numpy as np

from llavanext_cli.inference.paging import block_tables, next_slots, prompt_slots

BLOCK, BLOCKS = 4, 3


def test_prompts_and_answers_fill_the_blocks_of_their_sequence():
    tables = block_tables(2, BLOCKS)
    assert tables.tolist() == [[0, 1, 2], [3, 4, 5]]
    lengths = np.array([5, 2], np.int32)
    slots = prompt_slots(lengths, 6, BLOCK * BLOCKS).reshape(2, 6)
    assert slots.tolist() == [[0, 1, 2, 3, 4, -1], [12, 13, -1, -1, -1, -1]]
    answers = [next_slots(lengths + step, BLOCK * BLOCKS).tolist() for step in (1, 2)]
    assert answers == [[5, 14], [6, 15]]
    for row, table in enumerate(tables):
        used = [*slots[row][slots[row] >= 0], *(answer[row] for answer in answers)]
        assert [slot // BLOCK for slot in used] == [table[position // BLOCK] for position in range(len(used))]

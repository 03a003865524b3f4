"""Ids, labels and the gather index: against a table filled by hand, the drawn numbers, and batches of every mixture."""

import dataclasses

import numpy as np
import pytest

from llavanext_cli.config.architecture import Architecture, TextArchitecture, VisionArchitecture
from llavanext_cli.errors import DataError
from llavanext_cli.processing.geometry import plan_tiles
from llavanext_cli.processing.prompt import END, MEDIUM, TEXT, Segment, build_training_prompt
from llavanext_cli.processing.sample_layout import VideoPlan, collate, count_medium, index_media, lay_out, measure
from llavanext_cli.processing.tokenizer import load_tokenizer
from llavanext_cli.records import IGNORE_INDEX, EncodedSample, Medium, Sample, Turn

ARCH = Architecture()
SMALL = Architecture(  # 2 x 2 patches a tile, 1 a frame
    vision=VisionArchitecture(image_size=28, patch_size=14),
    text=TextArchitecture(pad_token_id=0),
    image_grid_pinpoints=((28, 56), (56, 28), (56, 56)),
    image_token_index=901,
    video_token_index=900,
)


@pytest.fixture
def tokenizer(make_tokenizer_folder):
    return load_tokenizer(make_tokenizer_folder())


def unpadded(plan, arch, tile_base) -> list:
    """Rows of one image, found by laying tiles out as images and cutting: no index formula involved."""
    side, q = arch.vision.patches, arch.tile_features
    tiles = np.arange(plan.tiles * q).reshape(plan.tiles, q) + tile_base * q
    grid = np.block(
        [
            [tiles[1 + row * plan.columns + column].reshape(side, side) for column in range(plan.columns)]
            for row in range(plan.rows)
        ]
    )
    cut = grid[
        plan.patch_top : grid.shape[0] - plan.patch_top if plan.patch_top else None,
        plan.patch_left : grid.shape[1] - plan.patch_left if plan.patch_left else None,
    ]
    rows = list(tiles[0])
    for row in cut:
        rows += [*row, "newline"]
    return rows


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (672, 672), (100, 2000), (2000, 100), (336, 336), (423, 752)])
def test_the_index_is_the_grid_cut_up(size):
    plan = plan_tiles(size, ARCH)
    (rows,) = index_media([plan], ARCH)
    newline = plan.tiles * 576
    expected = [newline if row == "newline" else row for row in unpadded(plan, ARCH, 0)]
    assert rows.dtype == np.int32
    assert rows.tolist() == expected
    assert len(rows) == plan.tokens


def test_the_drawn_numbers():
    (rows,) = index_media([plan_tiles((480, 640), ARCH)], ARCH)
    assert rows[:576].tolist() == list(range(576))
    row = rows[576 : 576 + 49].tolist()
    assert row == [*range(720, 744), *range(1296, 1320), 2880]
    row_24 = rows[576 + 18 * 49 : 576 + 19 * 49].tolist()
    assert row_24 == [*range(1728, 1752), *range(2304, 2328), 2880]


def test_the_class_token_stays_in_the_base_tile_alone():
    arch = dataclasses.replace(ARCH, vision_feature_select_strategy="full")
    plan = plan_tiles((672, 672), arch)
    (rows,) = index_media([plan], arch)
    assert rows[:577].tolist() == list(range(577))
    assert rows[577] == 577 + 1  # the first patch of tile 1 stands after its class token
    assert set(rows.tolist()).isdisjoint(577 * np.arange(1, 5))
    assert len(rows) == count_medium(plan, arch) == 2929


def test_images_and_videos_share_one_table():
    plans = [plan_tiles((28, 56), SMALL), VideoPlan(2), plan_tiles((56, 56), SMALL), VideoPlan(1)]
    rows = index_media(plans, SMALL)
    newline = (3 + 5) * 4 + 3
    assert rows[1].tolist() == [32, 33]
    assert rows[3].tolist() == [34]
    for number, tile_base in ((0, 0), (2, 3)):
        expected = [newline if r == "newline" else r for r in unpadded(plans[number], SMALL, tile_base)]
        assert rows[number].tolist() == expected
    used = np.concatenate(rows)
    assert sorted(set(used.tolist())) == list(range(newline + 1))  # every feature is used, and the newline


def conversation(texts, media=(), sample_id="s") -> Sample:
    roles = ("user", "assistant")
    return Sample(sample_id, "", tuple(media), tuple(Turn(roles[i % 2], t) for i, t in enumerate(texts)))


def test_ids_labels_and_rows_of_a_sample(tokenizer):
    plans = [plan_tiles((28, 56), SMALL)]
    segments = build_training_prompt(
        conversation(["<image>\nwhat?", "a cat", "and?", "a ball"], [Medium("image", "x")])
    )
    layout = lay_out(segments, plans, tokenizer, SMALL, "s")
    assert len(layout.input_ids) == len(layout.labels) == len(layout.feature_index)
    assert {a.dtype for a in (layout.input_ids, layout.labels, layout.feature_index)} == {np.dtype(np.int32)}
    assert measure(segments, plans, tokenizer, SMALL).tokens == len(layout.input_ids)

    is_medium = layout.input_ids == 901
    assert is_medium.sum() == plans[0].tokens
    newline, text = 3 * 4, 3 * 4 + 1
    assert (layout.feature_index[~is_medium] == text).all()
    assert layout.feature_index[is_medium].tolist() == index_media(plans, SMALL)[0].tolist()
    assert newline in layout.feature_index[is_medium]

    learned = layout.labels != IGNORE_INDEX
    assert not (learned & is_medium).any()
    assert (layout.labels[learned] == layout.input_ids[learned]).all()
    eos = tokenizer.eos_id
    answers = [[*tokenizer.encode_more(f" {answer}"), eos] for answer in ("a cat", "a ball")]
    assert layout.labels[learned].tolist() == answers[0] + answers[1]
    assert layout.input_ids[0] == tokenizer.bos_id
    assert layout.labels[-1] == tokenizer.eos_id


def test_a_text_only_sample(tokenizer):
    layout = lay_out(build_training_prompt(conversation(["q", "a"])), [], tokenizer, SMALL, "s")
    assert (layout.feature_index == 1).all()  # no features, so newline is row 0 and text row 1


def test_without_bos(make_tokenizer_folder):
    with_bos = load_tokenizer(make_tokenizer_folder())
    without = load_tokenizer(make_tokenizer_folder(name="bare", add_bos_token=False))
    segments = build_training_prompt(conversation(["q", "a"]))
    assert lay_out(segments, [], with_bos, SMALL, "s").input_ids[1:].tolist() == (
        lay_out(segments, [], without, SMALL, "s").input_ids.tolist()
    )


def test_media_are_counted_before_they_are_placed(tokenizer):
    segments = [Segment(TEXT, "a"), Segment(MEDIUM, medium=0), Segment(END, supervised=True)]
    with pytest.raises(DataError, match="sample row-9: 1 media in the prompt, but 2 were read") as caught:
        lay_out(segments, [VideoPlan(1), VideoPlan(1)], tokenizer, SMALL, "row-9")
    assert "report this" in caught.value.hint


def test_rows_and_tokens_are_compared(tokenizer, monkeypatch):
    segments = [Segment(TEXT, "a"), Segment(MEDIUM, medium=0)]
    plan = dataclasses.replace(plan_tiles((28, 56), SMALL), base_tokens=3)
    monkeypatch.setattr("llavanext_cli.processing.sample_layout.count_medium", lambda *_: 99)
    with pytest.raises(DataError, match=r"sample row-9: image or video 1 has 99 tokens, but \d+ features"):
        lay_out(segments, [plan], tokenizer, SMALL, "row-9")


def encoded(tokenizer, plans, texts, kinds, sample_id) -> EncodedSample:
    """A sample whose pixels say which tile they are."""
    segments = build_training_prompt(conversation(texts, [Medium(k, "x") for k in kinds], sample_id))
    layout = lay_out(segments, plans, tokenizer, SMALL, sample_id)
    tiles = sum(p.tiles for p in plans if not isinstance(p, VideoPlan))
    frames = sum(p.frames for p in plans if isinstance(p, VideoPlan))

    def paint(count: int, start: int) -> np.ndarray:
        return np.arange(start, start + count, dtype=np.float32)[:, None, None, None] * np.ones(
            (1, 3, 28, 28), np.float32
        )

    return EncodedSample(
        sample_id, layout.input_ids, layout.labels, paint(tiles, 1), paint(frames, 100), layout.feature_index
    )


def gathered(pixels, frames_at, index, arch) -> list:
    """What each position gets, by name: (tile's paint, patch), "newline" or "text"."""
    q, qv = arch.tile_features, arch.frame_features
    names = [(float(tile[0, 0, 0]), p) for tile in pixels[:frames_at] for p in range(q)]
    names += [(float(frame[0, 0, 0]), p) for frame in pixels[frames_at:] for p in range(qv)]
    return [[*names, "newline", "text"][row] for row in index]


@pytest.fixture
def mixture(tokenizer):
    image, wide = plan_tiles((56, 56), SMALL), plan_tiles((28, 90), SMALL)
    return [
        encoded(tokenizer, [image, VideoPlan(2)], ["<image> <video>", "a"], ["image", "video"], "both"),
        encoded(tokenizer, [wide, wide], ["<image> <image> q", "b c"], ["image", "image"], "two"),
        encoded(tokenizer, [], ["q", "a longer answer about nothing"], [], "text"),
        encoded(tokenizer, [VideoPlan(3)], ["<video>\nq", "a"], ["video"], "video"),
    ]


@pytest.mark.parametrize(("tiles", "frames"), [(6, 3), (9, 5)])
def test_a_batch_points_at_the_same_features(mixture, tiles, frames):
    batch = collate(mixture, 200, tiles, frames, SMALL)
    assert batch.input_ids.shape == batch.labels.shape == batch.feature_index.shape == (4, 200)
    assert batch.tiles.shape == (4, tiles + frames, 3, 28, 28)
    assert batch.tiles.dtype == np.float32
    text_row = tiles * 4 + frames + 1
    for row, sample in enumerate(mixture):
        own = np.concatenate([sample.tiles, sample.frames])
        expected = gathered(own, len(sample.tiles), sample.feature_index, SMALL)
        assert gathered(batch.tiles[row], tiles, batch.feature_index[row, : sample.length], SMALL) == expected
        assert (batch.feature_index[row, sample.length :] == text_row).all()
        assert batch.input_ids[row, : sample.length].tolist() == sample.input_ids.tolist()
        assert (batch.input_ids[row, sample.length :] == 0).all()
        assert not batch.tiles[row, len(sample.tiles) : tiles].any()
    assert batch.lengths.tolist() == [sample.length for sample in mixture]
    assert batch.lengths.dtype == batch.feature_index.dtype == np.int32


def test_labels_are_shifted(mixture):
    batch = collate(mixture, 200, 6, 3, SMALL)
    for row, sample in enumerate(mixture):
        assert batch.labels[row, : sample.length - 1].tolist() == sample.labels[1:].tolist()
        assert (batch.labels[row, sample.length - 1 :] == IGNORE_INDEX).all()
        assert (batch.labels[row] != IGNORE_INDEX).sum() == (sample.labels != IGNORE_INDEX).sum() > 0


def test_a_sample_that_fits_exactly(mixture):
    longest = max(sample.length for sample in mixture)
    assert collate(mixture, longest, 6, 3, SMALL).input_ids.shape == (4, longest)


@pytest.mark.parametrize(
    ("seq_length", "tiles", "frames", "words", "key"),
    [
        (40, 6, 3, r"sample both: \d+ tokens, but 40 fit", "data.seq_length to at least"),
        (200, 5, 3, "sample two: 6 image tiles, but 5 fit", "data.tiles to at least 6"),
        (200, 6, 2, "sample video: 3 frames, but 2 fit", "data.videos (videos per sample) or lower data.frames"),
    ],
)
def test_what_does_not_fit_says_what_to_change(mixture, seq_length, tiles, frames, words, key):
    with pytest.raises(DataError, match=words) as caught:
        collate(mixture, seq_length, tiles, frames, SMALL)
    assert key in caught.value.hint

"""The contact sheet shows the pixels that the model sees, where the plan puts them."""

from __future__ import annotations

import numpy as np
import pytest

from llavanext_cli.config.presets import load_preset
from llavanext_cli.errors import DataError
from llavanext_cli.inference.contact_sheet import COLUMNS, draw_contact_sheet, write_contact_sheet
from llavanext_cli.processing.geometry import plan_tiles
from llavanext_cli.processing.processor import Media
from llavanext_cli.processing.sample_layout import VideoPlan

ARCH = load_preset("tiny-ask").model
SIDE = ARCH.vision.image_size


def colour(number: int) -> tuple[int, int, int]:
    return number, 0, 200  # no grey: captions have every shade of it


def flat(count: int, first: int) -> np.ndarray:
    """Tiles of one colour each: of `first`, `first + 1`, ..."""
    colours = np.array([colour(first + number) for number in range(count)], np.uint8).reshape(count, 3, 1, 1)
    return np.tile(colours, (1, 1, SIDE, SIDE))


def positions(sheet: np.ndarray, number: int) -> tuple[int, int, int]:
    """How many pixels have a colour, and the top left one of them."""
    rows, columns = np.where((sheet == colour(number)).all(axis=2))
    return len(rows), int(rows.min()), int(columns.min())


def test_every_tile_and_frame_is_there_in_its_place():
    plan = plan_tiles((SIDE * 2, SIDE * 2), ARCH)
    frames = COLUMNS + 2
    times = (tuple(n / 2 for n in range(frames)),)
    media = Media((plan, VideoPlan(frames)), flat(plan.tiles, 100), flat(frames, 150), times)
    sheet = np.asarray(draw_contact_sheet(media, ARCH, ["a.png", "b.mp4"]))
    places = {value: positions(sheet, value) for value in [*range(100, 100 + plan.tiles), *range(150, 150 + frames)]}
    assert len({count for count, _, _ in places.values()}) == 1  # each whole, and of one size
    assert places[100][0] % SIDE**2 == 0
    (_, top, left), (_, top_right, right), (_, below, left_below) = places[101], places[102], places[101 + plan.columns]
    assert top == top_right and left < right and below > top and left_below == left
    assert places[100][2] < left and places[150][1] > below
    assert places[150 + COLUMNS][1] > places[150][1] and places[150 + COLUMNS][2] == places[150][2]


def test_text_alone_is_an_empty_sheet():
    assert draw_contact_sheet(Media((), flat(0, 0), flat(0, 0)), ARCH, []).size == (24, 12)


def test_it_is_written_whole_or_not_at_all(tmp_path):
    nothing = Media((), flat(0, 0), flat(0, 0))
    write_contact_sheet(tmp_path / "sheet.png", nothing, ARCH, [])
    for path in (tmp_path / "sheet.text", tmp_path / "none" / "sheet.png"):
        with pytest.raises(DataError, match="cannot be written"):
            write_contact_sheet(path, nothing, ARCH, [])
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]

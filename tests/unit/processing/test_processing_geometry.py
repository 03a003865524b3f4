"""Anyres integers: the documented examples, the drawn example, invariants over random sizes, and refusals."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavanext_cli.config.architecture import Architecture, VisionArchitecture
from llavanext_cli.errors import CheckpointError
from llavanext_cli.processing.geometry import (
    count_video_tokens,
    plan_tiles,
    select_best_resolution,
)

ARCH = Architecture()

# height, width, tokens: worked out by hand from the formula, and seen in transformers
EXAMPLES = [
    (336, 336, 1176),
    (672, 672, 2928),
    (480, 640, 2340),
    (640, 480, 2352),
    (427, 640, 2144),
    (1080, 1920, 1948),
    (100, 2000, 868),
    (423, 752, 1948),  # 1850 with float rounding that truncates too far
]


@pytest.mark.parametrize(("height", "width", "tokens"), EXAMPLES)
def test_tokens_of_documented_sizes(height, width, tokens):
    assert plan_tiles((height, width), ARCH).tokens == tokens


def test_the_drawn_plan():
    plan = plan_tiles((480, 640), ARCH)
    assert (plan.grid, plan.rows, plan.columns, plan.tiles) == ((672, 672), 2, 2, 5)
    assert (plan.resized, plan.padding_top, plan.padding_left) == ((504, 672), 84, 0)
    assert (plan.patch_top, plan.patch_left, plan.patch_height, plan.patch_width) == (6, 0, 36, 48)


def test_odd_padding_goes_to_the_bottom_and_right():
    plan = plan_tiles((401, 500), ARCH)
    below = plan.grid[0] - plan.padding_top - plan.resized[0]
    assert plan.resized[0] % 2 == 1
    assert below == plan.padding_top + 1


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((336, 336), (336, 672)),  # all fit, several waste equally little: the first
        ((672, 1344), (336, 672)),
        ((1344, 672), (672, 336)),
        ((1000, 1000), (672, 672)),
        ((2000, 300), (1008, 336)),
        ((300, 2000), (336, 1008)),
        ((1009, 1), (336, 672)),  # no grid keeps a row of pixels
        ((2, 3000), (336, 672)),
        ((1133, 567), (672, 336)),  # a tie only because transformers' scale is a rounded double
    ],
)
def test_best_resolution(size, grid):
    assert select_best_resolution(size, ARCH.image_grid_pinpoints) == grid


def test_the_resized_size_repeats_the_double_of_transformers():
    # 19 * (336 / 19) = 336.00000000000006: rounded up it is 337, with exact integers it would be 336
    assert plan_tiles((19, 19), ARCH).resized == (336, 337)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (3, 2000), (2, 40000)])
def test_extreme_sizes_have_a_plan(size):
    plan = plan_tiles(size, ARCH)
    assert min(plan.resized) >= 1
    assert plan.tokens == 576 + plan.patch_height * (plan.patch_width + 1) >= 576


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_the_image_lies_inside_its_grid(height, width):
    plan = plan_tiles((height, width), ARCH)
    assert plan.grid in ARCH.image_grid_pinpoints
    for axis, padding in ((0, plan.padding_top), (1, plan.padding_left)):
        assert 0 <= padding <= (plan.grid[axis] - plan.resized[axis]) / 2
    assert plan.resized[0] == plan.grid[0] or plan.resized[1] == plan.grid[1]
    assert 2 * plan.patch_top + plan.patch_height == 24 * plan.rows
    assert 2 * plan.patch_left + plan.patch_width == 24 * plan.columns
    assert 0 in (plan.patch_top, plan.patch_left)
    assert 576 <= plan.tokens <= 2928


def test_other_tiles_and_pinpoints():
    arch = Architecture(
        vision=VisionArchitecture(image_size=56, patch_size=14), image_grid_pinpoints=((56, 112), (112, 56), (112, 168))
    )
    plan = plan_tiles((100, 140), arch)
    assert (plan.grid, plan.rows, plan.columns) == ((112, 168), 2, 3)
    assert plan.resized == (112, 157)
    assert plan.tokens == 16 + 8 * plan.patch_width + 8


def test_the_class_token_is_counted_once_under_full():
    arch = dataclasses.replace(ARCH, vision_feature_select_strategy="full")
    assert plan_tiles((480, 640), arch).tokens == 2340 + 1


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_no_image_takes_more_than_the_greatest(strategy):
    arch = dataclasses.replace(ARCH, vision_feature_select_strategy=strategy)
    largest = max(plan_tiles(size, arch).tokens for size in [*arch.image_grid_pinpoints, (1000, 1000), (2000, 300)])
    assert arch.max_image_tokens == largest == 2928 + (strategy == "full")


@pytest.mark.parametrize(("frames", "tokens"), [(1, 144), (16, 2304), (32, 4608)])
def test_tokens_of_videos(frames, tokens):
    assert count_video_tokens(frames, ARCH) == tokens


def test_a_pinpoint_of_broken_tiles_is_refused_by_name():
    arch = dataclasses.replace(ARCH, image_grid_pinpoints=((336, 500),))
    with pytest.raises(CheckpointError, match=r"image_grid_pinpoints: \[336, 500\]") as caught:
        plan_tiles((100, 100), arch)
    assert "config.json" in caught.value.hint


def test_no_pixels_is_a_bug():
    with pytest.raises(ValueError, match="at least one pixel"):
        plan_tiles((0, 10), ARCH)

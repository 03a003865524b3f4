"""Plots: what is drawn is what was given, and is whole HTML."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from llavanext_cli import plots


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def test_a_falling_curve_falls_and_fills_the_width():
    svg = plots.curve("loss", {"loss": [(1, 4.0), (2, 2.0), (3, 1.0)]})
    (line,) = points_of(svg)
    assert [x for x, _ in line] == [plots.LEFT, (plots.LEFT + plots.WIDTH - plots.RIGHT) / 2, plots.WIDTH - plots.RIGHT]
    heights = [y for _, y in line]
    assert heights == sorted(heights)  # SVG counts downwards
    assert heights[0] == plots.TOP and heights[1] - heights[0] == pytest.approx(2 * (heights[2] - heights[1]), abs=0.1)


def test_a_long_curve_is_thinned_to_its_averages():
    (line,) = points_of(plots.curve("loss", {"a": [(i, i % 2) for i in range(6000)]}))
    assert len(line) == plots.MOST_POINTS and len({y for _, y in line}) == 1


def test_points_that_are_not_numbers_are_left_out():
    assert points_of(plots.curve("a", {"a": [(0, 1), (1, math.nan), (2, math.inf), (3, 2)]}))[0].__len__() == 2
    assert plots.curve("a", {"a": [(0, math.nan)]}) == "" and plots.curve("a", {}) == ""


def test_one_point_and_a_flat_line_are_drawn():
    assert len(points_of(plots.curve("a", {"a": [(5, 0.0)]}))[0]) == 1
    assert len(points_of(plots.curve("a", {"a": [(0, 3), (9, 3)], "b": [(0, 3), (9, 3)]}))) == 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.017), (-3, 40000), (1e-7, 2e-6), (5, 5)])
def test_ticks_are_few_and_enclose(low, high):
    ticks = plots._ticks(low, high)
    assert 1 <= len(ticks) <= 8 and ticks[0] <= low and ticks[-1] >= high
    assert ticks == sorted(set(ticks))


def test_the_longest_bar_is_the_widest_and_texts_are_escaped():
    text = plots.bars("<b>", [("a<b", 50), ("c", 200), ("none", 0)])
    assert re.findall(r"width:([\d.]+)%", text) == ["25.0", "100.0", "0.0"]
    assert "&lt;b&gt;" in text and "a&lt;b" in text and plots.bars("empty", [])


def test_a_page_is_whole_and_loads_nothing(tmp_path):
    text = plots.page("Mix & more", plots.facts({"a": "<x>"}), plots.table("t", ["n", "m"], [("a", 1)]))
    tags: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag != "meta":
                tags.append(tag)

        def handle_endtag(self, tag):
            assert tags.pop() == tag

    Balance().feed(text)
    assert tags == [] and "Mix &amp; more" in text and '<td class="number">1</td>' in text
    assert not re.search(r"https?://|src=|<script", text)

"""Reports for a browser: one HTML file with plots as SVG, which loads nothing from elsewhere.

    page("Mix", facts({"samples": 12}), bars("tokens", [("0-255", 3), ("256-511", 9)]), curve("loss", {"loss": points}))

Each part is a piece of HTML; every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 720, 260
"""Size of a curve in SVG units; the page scales it."""
TICKS = 5
"""Approximate number of ticks of an axis."""
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 34
COLOURS = ("#2a6fdb", "#d1662b", "#3c9a5f", "#8a5bc7")
MOST_POINTS = 600
"""A longer curve is averaged over stretches of equal length."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem } svg { width: 100%; height: auto }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: #2a6fdb; height: .8rem; min-width: 1px; border-radius: 2px } .wide { width: 22rem }
svg text { font: 12px system-ui, sans-serif; fill: #555 } .grid { stroke: #ddd }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #ddd } svg text { fill: #aaa } .grid { stroke: #333 }
}
"""


def page(title: str, *parts: str) -> str:
    """A whole HTML document."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html><head>{head}</head><body><h1>{escape(title)}</h1>\n{''.join(parts)}</body></html>\n"


def facts(values: Mapping[str, object]) -> str:
    """Names and values, one line each."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in values.items())
    return f"<table>{rows}</table>\n"


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows of texts and numbers; numbers are aligned to the right."""
    lines = []
    for row in rows:
        cells = (f"<td{_aligned(value)}>{escape(str(value))}</td>" for value in row)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{''.join(lines)}</table>\n"


def bars(title: str, rows: Sequence[tuple[str, int]]) -> str:
    """Counts as horizontal bars, the longest as wide as the plot."""
    most = max((count for _, count in rows), default=0) or 1
    lines = "".join(
        f'<tr><td>{escape(label)}</td><td class="number">{count}</td>'
        f'<td class="wide"><div class="bar" style="width:{100 * count / most:.1f}%"></div></td></tr>'
        for label, count in rows
    )
    return f"<h2>{escape(title)}</h2><table>{lines}</table>\n"


def curve(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Lines over the steps of a run; points that are not finite are left out.

    Args:
        series: name → (x, y) pairs in the order of x.
    """
    lines = {name: _thinned([p for p in points if all(map(math.isfinite, p))]) for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    left, right = min(xs), max(xs)
    low, high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across_share = (x - left) / (right - left or 1)
        up_share = (y - low) / (high - low or 1)
        return LEFT + across_share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up_share * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in y_ticks:
        _, height = place(left, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        if left <= x <= right:
            parts.append(f'<text x="{place(x, low)[0]:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 1}" text-anchor="end">step</text>')
    for (name, points), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(lines) > 1:
            place_of_name = LEFT + 8 + 120 * list(lines).index(name)
            parts.append(f'<text x="{place_of_name}" y="{TOP + 10}" style="fill:{colour}">{escape(name)}</text>')
    return f'<h2>{escape(title)}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>\n'


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    span = high - low or abs(high) or 1.0
    raw = span / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _aligned(value: object) -> str:
    return ' class="number"' if isinstance(value, (int, float)) and not isinstance(value, bool) else ""

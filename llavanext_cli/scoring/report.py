"""A page with the scores and the wrong answers: each with its images or frames, the answer and what is right."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from llavanext_cli.errors import DataError
from llavanext_cli.files import write_whole
from llavanext_cli.plots import facts, page, table
from llavanext_cli.processing.formats import guess_kind

if TYPE_CHECKING:
    from PIL import Image

    from llavanext_cli.scoring.score import Group, Scored, ScoreReport

SHOWN = 200
"""Wrong answers on the page."""
SIDE = 240
"""Pixels of the longer side of a thumbnail."""
FRAMES = 4
"""Frames of a video that are shown."""

STYLE = """<style>
.card { display: flex; flex-wrap: wrap; gap: 1rem; border-top: 1px solid #8884; padding: .8rem 0 }
.card .media { flex: 0 1 15rem } .card .text { flex: 1 1 14rem; min-width: 0; overflow-wrap: anywhere }
.card img { max-width: 100%; border-radius: 3px } .card p { margin: .2rem 0 } .card .id { color: #888; font-size: 85% }
</style>"""


def write_score_report(path: Path, report: ScoreReport) -> None:
    """Write the page.

    Raises:
        OSError: it cannot be written.
    """
    values = {"metric": f"{report.metric}{f' ({report.reason})' if report.reason else ''}", **_figures(report)}
    parts = [facts(values)]
    for title, groups in (("By source", report.by_source), ("By kind of question", report.by_kind)):
        if groups:
            parts.append(table(title, ("", "answers", "score", "95 % interval"), [_row(group) for group in groups]))
    wrong = report.wrong
    if wrong:
        count = f"{len(wrong)} wrong answers" + (f", the first {SHOWN}" if len(wrong) > SHOWN else "")
        parts += [STYLE, f"<h2>{count}</h2>", *(_card(item) for item in wrong[:SHOWN])]
    write_whole(path, page("Score", *parts).encode())


def _figures(report: ScoreReport) -> dict[str, str]:
    overall = report.overall
    figures = {
        "score": f"{overall.score:.3f} ({overall.low:.3f} to {overall.high:.3f})",
        "answers": f"{overall.answers} ({report.failed} failed)",
    }
    return figures | {name: f"{value:.3g}" for name, value in report.details.items()}


def _row(group: Group) -> tuple[str, int, str, str]:
    return group.name, group.answers, f"{group.score:.3f}", f"{group.low:.3f} to {group.high:.3f}"


def _card(item: Scored) -> str:
    answer = item.answer
    media = "".join(_thumbnail(Path(name)) for name in answer.media)
    said = f"(failed: {answer.error})" if answer.error else answer.text
    lines = [("question", answer.question), ("answer", said), ("reference", " · ".join(answer.references))]
    if answer.options:
        lines.insert(1, ("options", " · ".join(answer.options)))
    text = "".join(f"<p><b>{name}</b> {escape(value)}</p>" for name, value in lines)
    place = escape(" · ".join(filter(None, (answer.id, answer.source, answer.kind))))
    text += f'<p class="id">{place}</p>'
    return f'<div class="card"><div class="media">{media}</div><div class="text">{text}</div></div>\n'


def _thumbnail(path: Path) -> str:
    """An image, or frames of a video side by side, as a small JPEG inside the page."""
    try:
        images = _images(path)
    except (DataError, OSError):
        return f"<p>{escape(path.name)} cannot be read</p>"
    side = SIDE // min(2, len(images))
    for image in images:
        image.thumbnail((side, side))
    data = io.BytesIO()
    _sheet(images).save(data, "JPEG", quality=80)
    code = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{escape(path.name)}" src="data:image/jpeg;base64,{code}">'


def _images(path: Path) -> list[Image.Image]:
    """The image of a file, or some frames of a video."""
    from PIL import Image

    from llavanext_cli.processing.image import load_image
    from llavanext_cli.processing.video import read_frames

    if guess_kind(path) != "video":
        return [load_image(path)]
    return [Image.fromarray(frame) for frame in read_frames(path, FRAMES)[0]]


def _sheet(images: Sequence[Image.Image]) -> Image.Image:
    from PIL import Image

    if len(images) == 1:
        return images[0]
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    columns = min(2, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * width, number // columns * height))
    return sheet

"""The report of a mix: how much of each source was kept, and why the rest was dropped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavanext_cli import plots
from llavanext_cli.mixing.mixfile import DataSet

REASONS = {
    "not_a_record": "the record is invalid",
    "not_unicode": "a text is not Unicode",
    "speakers": "speakers do not alternate",
    "no_answer": "a question without an answer",
    "empty_question": "an empty question",
    "empty_answer": "an empty answer",
    "placeholders": "placeholders do not match the media",
    "bad_path": "an invalid path",
    "outside_root": "a path outside the media folder",
    "missing": "a missing file",
    "not_a_file": "a folder or device, not a file",
    "empty_file": "a file of 0 bytes",
    "unreadable": "a file that cannot be read",
    "link_loop": "a loop of symbolic links",
    "corrupt": "a file that does not decode",
    "too_large": "too many pixels, or one side too long",
    "no_frames": "a video without frames",
    "false_count": "a video with fewer frames than its header says",
    "timeout": "a file that took too long",
    "crashed": "a file that crashed its decoder",
    "too_long": "more tokens than fit",
    "too_many_tiles": "more image tiles than fit",
    "too_many_frames": "more frames than fit",
}
"""Every reason for which a record can be dropped, in words."""

SOURCE_COLUMNS = ("source", "strategy", "records", "sampled", "kept", "dropped")
BAR = 256
"""Numbers that one bar of a histogram covers: tokens, or pixels of the longer side."""


@dataclass
class SourceReport:
    """One data set's part. `dropped` counts by reason; `sampled` = `kept` + the sum of `dropped`."""

    data_set: DataSet
    records: int = 0
    sampled: int = 0
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)

    @property
    def row(self) -> tuple[str, str, int, int, int, int]:
        """Its cells under `SOURCE_COLUMNS`."""
        data_set = self.data_set
        return data_set.name, data_set.strategy_text, self.records, self.sampled, self.kept, self.dropped.total()

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.data_set.name,
            "json_path": str(self.data_set.json_path),
            "media_root": str(self.data_set.media_root),
            "sampling_strategy": self.data_set.strategy_text,
            "records": self.records,
            "sampled": self.sampled,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
        }


@dataclass
class MixReport:
    """The whole mix.

    Attributes:
        out: the file that was written, or would have been.
        written: False after a dry run.
        sources: in the order of the mix file.
        contents: samples by what they hold ("image", "video", "image+video", "text").
        sizes: media by (kind, longer side in pixels); empty unless headers were read.
        tokens: samples by number of tokens, those that do not fit included; empty unless tokens were counted.
        max_tokens: tokens that fit.
        files: media files whose header was read, or which were decoded.
        files_known: how many of them were checked before.
        seconds: time taken.
        notes: further lines for the user.
    """

    out: Path
    written: bool
    check: str
    format: str
    seed: int
    sources: list[SourceReport]
    rejects: Path | None = None
    contents: Counter = field(default_factory=Counter)
    sizes: Counter = field(default_factory=Counter)
    tokens: Counter = field(default_factory=Counter)
    max_tokens: int | None = None
    files: int = 0
    files_known: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources)

    @property
    def sampled(self) -> int:
        return sum(source.sampled for source in self.sources)

    @property
    def dropped(self) -> Counter:
        return sum((source.dropped for source in self.sources), Counter())

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "written": self.written,
            "check": self.check,
            "format": self.format,
            "seed": self.seed,
            "sampled": self.sampled,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "contents": dict(sorted(self.contents.items())),
            "sizes": [
                {"kind": kind, "longer_side": low, "count": count}
                for (kind, low), count in sorted(size_histogram(self.sizes).items())
            ],
            "tokens": self._tokens_dict(),
            "files_checked": self.files,
            "files_known": self.files_known,
            "rejects": str(self.rejects) if self.rejects else None,
            "seconds": round(self.seconds, 3),
            "notes": self.notes,
            "sources": [source.to_dict() for source in self.sources],
        }

    def _tokens_dict(self) -> dict[str, Any] | None:
        if not self.tokens:
            return None
        return {
            "max_tokens": self.max_tokens,
            "too_long": self.dropped["too_long"],
            "longest": max(self.tokens),
            "total": sum(length * count for length, count in self.tokens.items()),
            "histogram": [{"tokens": low, "samples": n} for low, n in sorted(token_histogram(self.tokens).items())],
        }


def report_page(report: MixReport) -> str:
    """The report as one HTML page: what was kept, why the rest was dropped, sizes and tokens as bars."""
    parts = [
        plots.facts({"output": report.out, "samples": report.kept, "seed": report.seed, "check": report.check}),
        plots.table("Sources", SOURCE_COLUMNS, [source.row for source in report.sources]),
        plots.bars("Contents", report.contents.most_common()),
    ]
    if report.dropped:
        parts.append(plots.bars("Dropped", [(REASONS[name], count) for name, count in report.dropped.most_common()]))
    for kind in sorted({kind for kind, _ in report.sizes}):
        sizes = sorted((low, n) for (of, low), n in size_histogram(report.sizes).items() if of == kind)
        parts.append(plots.bars(f"Longer side, {kind}, pixels", [(bar_label(low), n) for low, n in sizes]))
    if report.tokens:
        tokens = sorted(token_histogram(report.tokens).items())
        parts.append(plots.bars("Tokens of a sample", [(bar_label(low), n) for low, n in tokens]))
    return plots.page("Mix", *parts)


def token_histogram(tokens: Counter) -> Counter:
    """Counts by number of tokens rounded down to a multiple of `BAR`."""
    histogram: Counter = Counter()
    for length, count in tokens.items():
        histogram[length // BAR * BAR] += count
    return histogram


def size_histogram(sizes: Counter) -> Counter:
    """Counts by (kind, longer side in pixels rounded down to a multiple of `BAR`)."""
    histogram: Counter = Counter()
    for (kind, side), count in sizes.items():
        histogram[kind, side // BAR * BAR] += count
    return histogram


def bar_label(low: int) -> str:
    """The numbers of one bar of a histogram: "256-511"."""
    return f"{low}-{low + BAR - 1}"

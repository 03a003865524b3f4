"""What a mix shall do, as one value: `commands/mix.py` builds it, `pipeline.run_mix` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llavanext_cli.errors import DataError
from llavanext_cli.mixing.check_result import LEVELS

FORMATS = ("llavanext", "mindformers")
ON_BAD = ("drop", "fail")


@dataclass(frozen=True)
class MixRequest:
    """Arguments of a mix.

    Attributes:
        mix_file: YAML, see `mixfile`.
        out: the samples; the file appears when it is complete. Beside it, OUT.cache remembers the checks of media.
        seed: of the strategy `random`.
        check: one of `LEVELS`.
        workers: processes; None takes every core this process may use.
        on_bad: "drop" leaves bad records out, "fail" raises at the end and writes no samples.
        rejects: JSON Lines of every bad record with its reason; written in both cases.
        format: one of `FORMATS`; None takes "mindformers" for a name that ends in .json.
        frames: frames of a video that training will use, for the check "full" and for counting; None takes the
            preset's, or 16.
        tokenizer: folder with tokenizer.model and config.json; with it, every sample's tokens, tiles and frames are
            counted and recorded.
        max_tokens: samples of more tokens are bad.
        preset: name or file; its seq_length and frames replace `max_tokens` and `frames` where those are None, and its
            tiles and videos limit a sample.
        time_limit: seconds that the check of one file may take.
        page: an HTML file for the report; written whenever `rejects` is.
        force: replace existing files.
        dry_run: do everything but write; the cache is kept.
    """

    mix_file: Path
    out: Path
    seed: int = 0
    check: str = "header"
    workers: int | None = None
    on_bad: str = "drop"
    rejects: Path | None = None
    format: str | None = None
    frames: int | None = None
    tokenizer: Path | None = None
    max_tokens: int | None = None
    preset: str | None = None
    time_limit: float = 60.0
    page: Path | None = None
    force: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name, known in (("check", LEVELS), ("on_bad", ON_BAD), ("format", (None, *FORMATS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {known}, not {getattr(self, name)!r}")
        if Path("-") in (self.out, self.rejects, self.page):
            raise DataError("-: a mix cannot write to stdout", "name a file, such as samples.jsonl")
        if self.page and self.page.suffix.lower() not in (".html", ".htm"):
            raise DataError(f"{self.page}: the report is an HTML page", "choose a name that ends in .html")

    @property
    def output_format(self) -> str:
        """One of `FORMATS`."""
        return self.format or ("mindformers" if self.out.suffix == ".json" else "llavanext")

    @property
    def reads_media(self) -> bool:
        """Whether files are opened, and their results kept in the cache."""
        return self.check in ("header", "full")

    @property
    def cache(self) -> Path | None:
        """File of the cache."""
        return self.out.with_name(self.out.name + ".cache") if self.reads_media else None

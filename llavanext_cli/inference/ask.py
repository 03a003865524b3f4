"""Answer one question about pictures and clips."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llavanext_cli.config.presets import load_preset
from llavanext_cli.errors import ConfigError, DataError
from llavanext_cli.inference.sampling import Sampling
from llavanext_cli.processing.processor import Processor
from llavanext_cli.processing.tokens import load_tokenizer
from llavanext_cli.records import EncodedSample, Medium, Sample, Turn
from llavanext_cli.weights.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset
    from llavanext_cli.inference.session import Answer, Session

CACHE_STEP = 256
"""The cache is as long as one question needs, rounded up to this many tokens."""


def run_ask(
    question: str,
    images: Sequence[Path],
    videos: Sequence[Path],
    checkpoint: Path,
    *,
    preset_name: str | None = None,
    overrides: Sequence[str] = (),
    frames: int | None = None,
    changes: dict[str, float | int] | None = None,
    on_text: Callable[[str], None] | None = None,
    verbose: bool = False,
) -> Answer:
    """Ask a checkpoint one question.

    Args:
        question: may hold `<image>` and `<video>` placeholders; media without one come first, pictures before clips.
        images, videos: files.
        checkpoint: a folder that `convert` or `train` made.
        preset_name: an ask preset; None picks the one that fits the media and the device at hand.
        overrides: "key.path=value" changes to the preset.
        frames: frames taken from each clip; the preset's when None.
        changes: fields of `Sampling` that differ from the preset's.
        on_text: called with each piece of the answer as it comes.

    Raises:
        LlavaNextError: a file, the checkpoint, the preset or the question cannot be used.
    """
    media = (*[Medium("image", str(path)) for path in images], *[Medium("video", str(path)) for path in videos])
    sample = Sample("", "", media, (Turn("user", question),))
    opened, preset, processor = prepare(checkpoint, preset_name, overrides, frames, wants_video=bool(videos))
    check_media(sample, preset)
    sampling = build_sampling(preset, changes or {})
    encoded = processor.encode_question(sample)
    with open_session(opened, preset, cache_need(encoded, sampling), verbose=verbose) as session:
        return session.answer([encoded], sampling, (lambda row, text: on_text(text)) if on_text else None)[0]


def prepare(
    checkpoint: Path, preset_name: str | None, overrides: Sequence[str], frames: int | None, *, wants_video: bool
) -> tuple[Checkpoint, Preset, Processor]:
    """Open what a question needs, short of the model itself."""
    opened = open_checkpoint(checkpoint)
    extra = [f"data.frames={frames}"] if frames is not None else []
    name = preset_name or default_preset(wants_video)
    preset = load_preset(name, [*overrides, *extra])
    if preset.ask is None:
        raise ConfigError(f"{name} is a preset for training, not for asking", hint="see `llavanext presets list`")
    processor = Processor(opened.architecture, load_tokenizer(opened.folder), frames=preset.data.frames)
    return opened, preset, processor


def default_preset(wants_video: bool) -> str:
    """The Ascend presets where an Ascend is, the CPU's elsewhere."""
    if Path("/dev/davinci_manager").exists():
        return "video-7b-ask-video" if wants_video else "video-7b-ask-image"
    return "tiny-ask"


def check_media(sample: Sample, preset: Preset) -> None:
    """Refuse clips that a preset for pictures has no frames for, and pictures that it has no tiles for."""
    kinds = {medium.kind for medium in sample.media}
    if "video" in kinds and preset.data.frames == 0:
        raise DataError(f"preset {preset.name} takes no clips", hint="use --preset video-7b-ask-video, or --frames 32")
    if "image" in kinds and preset.data.tiles == 0:
        raise DataError(f"preset {preset.name} takes no pictures", hint="use --preset video-7b-ask-image")


def build_sampling(preset: Preset, changes: dict[str, float | int]) -> Sampling:
    """The preset's way of drawing tokens, with the command's changes."""
    ask = preset.ask
    assert ask is not None, "an ask preset"
    sampling = Sampling(
        max_new_tokens=ask.max_new_tokens,
        temperature=ask.temperature,
        top_k=ask.top_k,
        top_p=ask.top_p,
        repetition_penalty=ask.repetition_penalty,
    )
    return replace(sampling, **changes)


def cache_need(encoded: EncodedSample, sampling: Sampling) -> int:
    """Tokens of cache for a prompt and its answer, rounded up."""
    need = encoded.length + sampling.max_new_tokens + 1
    return -(-need // CACHE_STEP) * CACHE_STEP


@contextmanager
def open_session(
    checkpoint: Checkpoint, preset: Preset, cache_tokens: int, *, batch_size: int = 1, verbose: bool = False
) -> Iterator[Session]:
    """A session whose libraries write to a temporary folder that goes with it."""
    from llavanext_cli.inference.session import Session

    assert preset.ask is not None, "an ask preset"
    folder = Path(tempfile.mkdtemp(prefix="llavanext-"))
    try:
        limit = min(cache_tokens, preset.ask.cache_tokens)
        yield Session(checkpoint, preset, folder, batch_size=batch_size, cache_tokens=limit, verbose=verbose)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

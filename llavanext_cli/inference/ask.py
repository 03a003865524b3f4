"""Answer one question about images and videos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llavanext_cli.errors import DataError
from llavanext_cli.files import check_target
from llavanext_cli.inference.contact_sheet import write_contact_sheet
from llavanext_cli.inference.media_sources import rename_in_errors, resolve_media
from llavanext_cli.inference.prepare import Prepared, longest_cache, open_session, prepare, temporary_folder
from llavanext_cli.inference.questions import build_question, check_media
from llavanext_cli.inference.request import AskRequest
from llavanext_cli.inference.step import CACHE_STEP, round_up
from llavanext_cli.processing.formats import guess_kind
from llavanext_cli.processing.video import describe_times
from llavanext_cli.records import EncodedSample, Sample, Turn

if TYPE_CHECKING:
    from llavanext_cli.inference.session import Answer


def run_ask(request: AskRequest, on_text: Callable[[str], None] | None = None) -> Answer:
    """Ask a checkpoint one question.

    Args:
        on_text: called with each piece of the answer as it comes.

    Raises:
        LlavaNextError: a file, the checkpoint, the preset or the question cannot be used.
    """
    from llavanext_cli.inference.session import check_room

    if request.show is not None:
        _check_show(request)
    prepared = prepare(request, has_videos=bool(request.videos))
    encoded = encode(request, prepared)
    check_room(encoded, prepared.settings.cache_tokens, how_to_fit(encoded, len(request.videos), prepared))
    with open_session(prepared, cache_need(encoded, prepared), verbose=request.verbose) as session:
        return session.answer([encoded], prepared.sampling, (lambda row, text: on_text(text)) if on_text else None)[0]


def _check_show(request: AskRequest) -> None:
    assert request.show is not None
    media = (*request.images, *request.videos)
    if not media:
        raise DataError("--show has nothing to show", hint="ask about an image or a video: --image, --video")
    check_target(
        request.show,
        kind="an image",
        is_ours=lambda path: guess_kind(path) == "image",
        force=request.force,
        option="--show",
        inputs=[Path(name) for name in media],
    )


def encode(request: AskRequest, prepared: Prepared) -> EncodedSample:
    """Read the question's media, and write the contact sheet where one is wanted."""
    question, processor = request.question or "", prepared.processor
    with temporary_folder() as folder, rename_in_errors(folder, request.images, request.videos):
        images, videos = resolve_media(request.images, request.videos, folder, allow_url=request.allow_url)
        sample = build_question(question, images, videos)
        check_media(sample, prepared.preset)
        media = processor.load_media(sample)
        if request.time_instruction:
            sentences = [describe_times(video, times) for video, times in zip(videos, media.times, strict=True)]
            sample = Sample("", "", sample.media, (Turn("user", "\n".join([*sentences, question])),))
        if request.show is not None:
            names = [Path(medium.path).name for medium in sample.media]
            write_contact_sheet(request.show, media, prepared.checkpoint.architecture, names)
        return processor.encode_question(sample, media=media)


def cache_need(encoded: EncodedSample, prepared: Prepared) -> int:
    """Tokens of cache for a prompt and its answer, rounded up."""
    return round_up(encoded.length + prepared.sampling.max_new_tokens + 1, CACHE_STEP)


def how_to_fit(encoded: EncodedSample, videos: int, prepared: Prepared) -> str:
    """What to change when a question does not fit into the cache: a longer cache where the checkpoint's positions reach
    further, else fewer frames, so that the whole answer has room."""
    architecture, settings = prepared.checkpoint.architecture, prepared.settings
    longest = longest_cache(architecture, settings)
    if encoded.length < longest:
        return (
            f"add --set ask.cache_tokens={min(round_up(cache_need(encoded, prepared), settings.block_size), longest)}"
        )
    limit = f"the checkpoint has {architecture.text.positions} positions"
    if videos:
        excess = encoded.length + prepared.sampling.max_new_tokens - longest
        step = videos * architecture.frame_features
        frames = len(encoded.frames) // videos - round_up(excess, step) // step
        if frames > 0:
            room = f" and --set ask.cache_tokens={longest}" if settings.cache_tokens < longest else ""
            return f"{limit}: add --frames {frames}{room}"
    return f"{limit}: use fewer images, videos or words"

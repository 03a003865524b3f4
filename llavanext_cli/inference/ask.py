"""Answer one question about pictures and clips."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli.config.presets import check_model_settings, load_preset
from llavanext_cli.config.rules import greatest_positions, has_room
from llavanext_cli.errors import ConfigError, DataError
from llavanext_cli.files import cache_folder
from llavanext_cli.inference.contact_sheet import write_contact_sheet
from llavanext_cli.inference.engines import CACHE_STEP, CHAT_STEP, round_up
from llavanext_cli.inference.media_sources import describe_times, rename_in_errors, resolve_media
from llavanext_cli.inference.sampling import Sampling
from llavanext_cli.inference.scratch import scratch_folder
from llavanext_cli.machine.doctor import require_cann
from llavanext_cli.processing.processor import Processor
from llavanext_cli.processing.tokens import load_tokenizer
from llavanext_cli.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, EncodedSample, Medium, Sample, Turn
from llavanext_cli.weights.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from llavanext_cli.config.architecture import Architecture
    from llavanext_cli.config.schema import Ask, Preset
    from llavanext_cli.inference.chat import Chat
    from llavanext_cli.inference.remote import RemoteSession
    from llavanext_cli.inference.session import Answer, Session


def run_ask(
    question: str,
    images: Sequence[str | Path],
    videos: Sequence[str | Path],
    checkpoint: Path,
    *,
    preset_name: str | None = None,
    overrides: Sequence[str] = (),
    devices: int | None = None,
    frames: int | None = None,
    changes: dict[str, Any] | None = None,
    time_instruction: bool = False,
    allow_url: bool = False,
    show: Path | None = None,
    on_text: Callable[[str], None] | None = None,
    verbose: bool = False,
) -> Answer:
    """Ask a checkpoint one question.

    Args:
        question: may hold `<image>` and `<video>` placeholders; media without one come first, pictures before clips.
        images, videos: files; `-` is a picture from stdin, http(s) addresses are read where `allow_url`.
        checkpoint: a folder that `convert` or `train` made.
        preset_name: an ask preset; None picks the one that fits the media and the device at hand.
        overrides: "key.path=value" changes to the preset.
        devices: that share each layer; the preset's when None.
        frames: frames taken from each clip; the preset's when None.
        changes: fields of `Sampling` that differ from the preset's.
        time_instruction: put the original's sentence about duration and frame times before the question.
        show: a picture file for the tiles and frames that the model sees.
        on_text: called with each piece of the answer as it comes.

    Raises:
        LlavaNextError: a file, the checkpoint, the preset or the question cannot be used.
    """
    from llavanext_cli.inference.session import check_room

    opened, preset, processor = prepare(checkpoint, preset_name, overrides, devices, frames, wants_video=bool(videos))
    sampling = build_sampling(preset, changes or {})
    assert preset.ask is not None, "an ask preset"
    named = [str(name) for name in images], [str(name) for name in videos]
    with scratch_folder() as folder, rename_in_errors(folder, *named):
        pictures, clips = resolve_media(*named, folder, allow_url=allow_url)
        sample = build_question(question, pictures, clips)
        check_media(sample, preset)
        media = processor.load_media(sample)
        if time_instruction:
            sentences = [describe_times(clip, times) for clip, times in zip(clips, media.times, strict=True)]
            sample = Sample("", "", sample.media, (Turn("user", "\n".join([*sentences, question])),))
        if show is not None:
            write_contact_sheet(show, media, opened.architecture, [Path(medium.path).name for medium in sample.media])
        encoded = processor.encode_question(sample, media=media)
    hint = how_to_fit(encoded, len(clips), preset, opened.architecture, sampling)
    check_room(encoded, preset.ask.cache_tokens, hint)
    with open_session(opened, preset, cache_need(encoded, sampling), verbose=verbose) as session:
        return session.answer([encoded], sampling, (lambda row, text: on_text(text)) if on_text else None)[0]


def build_question(question: str, images: Sequence[Path], videos: Sequence[Path]) -> Sample:
    """A question and its media, in the order of its placeholders: the first `<image>` is the first picture, the first
    `<video>` the first clip. Without placeholders pictures come before clips."""
    media = [*[Medium("image", str(path)) for path in images], *[Medium("video", str(path)) for path in videos]]
    order = placed(question, [medium.kind for medium in media])
    return Sample("", "", tuple(media[at] for at in order), (Turn("user", question),))


def placed(question: str, kinds: Sequence[str]) -> list[int]:
    """The order of media of these kinds: as the placeholders of the question take them, then those without one."""
    left, order = list(range(len(kinds))), []
    for found in re.findall(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}", question):
        at = next((at for at in left if kinds[at] == found[1:-1]), None)
        if at is not None:
            left.remove(at)
            order.append(at)
    return order + left


@contextmanager
def open_chat(
    checkpoint: Path,
    *,
    preset_name: str | None = None,
    overrides: Sequence[str] = (),
    devices: int | None = None,
    frames: int | None = None,
    changes: dict[str, Any] | None = None,
    verbose: bool = False,
) -> Iterator[Chat]:
    """A conversation with a checkpoint; arguments as in `run_ask`."""
    from llavanext_cli.inference.chat import Chat

    opened, preset, processor = prepare(checkpoint, preset_name, overrides, devices, frames, wants_video=True)
    sampling = build_sampling(preset, changes or {})
    assert preset.ask is not None, "an ask preset"
    with open_session(opened, preset, preset.ask.cache_tokens, cache_step=CHAT_STEP, verbose=verbose) as session:
        yield Chat(session, processor, preset, sampling)


def prepare(
    checkpoint: Path,
    preset_name: str | None,
    overrides: Sequence[str],
    devices: int | None,
    frames: int | None,
    *,
    wants_video: bool,
) -> tuple[Checkpoint, Preset, Processor]:
    """Open what a question needs, short of the model itself. The cache ends where the checkpoint's positions do."""
    opened = open_checkpoint(checkpoint)
    extra = [f"data.frames={frames}"] if frames is not None else []
    name = preset_name or default_preset(opened.architecture, wants_video)
    preset = load_preset(name, [*overrides, *extra], devices, opened.architecture)
    if preset.ask is None:
        raise ConfigError(f"{name} is a preset for training, not for asking", hint="see `llavanext presets list`")
    check_model_settings(preset, overrides, opened.architecture)
    most = usable_positions(opened.architecture, preset.ask)
    preset = replace(preset, ask=replace(preset.ask, cache_tokens=min(preset.ask.cache_tokens, most)))
    processor = Processor(opened.architecture, load_tokenizer(opened.folder), frames=preset.data.frames)
    return opened, preset, processor


def default_preset(architecture: Architecture, wants_video: bool) -> str:
    """The Ascend presets where an Ascend is; elsewhere the tiny one where the checkpoint's pictures and clips fit into
    it, else the CPU's for models of full size."""
    if Path("/dev/davinci_manager").exists():
        return "video-7b-ask-video" if wants_video else "video-7b-ask-image"
    return "tiny-ask" if has_room(load_preset("tiny-ask"), architecture) else "video-7b-ask-cpu"


def usable_positions(architecture: Architecture, ask: Ask) -> int:
    """The longest cache: as far as the checkpoint's positions reach, in whole blocks."""
    return greatest_positions(architecture.text) // ask.block_size * ask.block_size


def check_media(sample: Sample, preset: Preset) -> None:
    """Refuse clips that a preset for pictures has no frames for, and pictures that it has no tiles for."""
    kinds = {medium.kind for medium in sample.media}
    if "video" in kinds and preset.data.frames == 0:
        raise DataError(f"preset {preset.name} takes no clips", hint="give --frames 16, or another preset")
    if "image" in kinds and preset.data.tiles == 0:
        raise DataError(f"preset {preset.name} takes no pictures", hint="give --set data.tiles=5, or another preset")


def how_to_fit(
    encoded: EncodedSample, clips: int, preset: Preset, architecture: Architecture, sampling: Sampling
) -> str:
    """What to change when a question does not fit into the cache: the cache where the positions reach further, else
    the frames of its clips, so that the whole answer has room."""
    assert preset.ask is not None, "an ask preset"
    most = usable_positions(architecture, preset.ask)
    if encoded.length < most:
        return (
            f"give --set ask.cache_tokens={min(round_up(cache_need(encoded, sampling), preset.ask.block_size), most)}"
        )
    reach = f"the positions of this checkpoint reach {greatest_positions(architecture.text)}"
    if clips:
        excess = encoded.length + sampling.max_new_tokens - most
        frames = len(encoded.frames) // clips - round_up(excess, step := clips * architecture.frame_features) // step
        if frames > 0:
            room = f" and --set ask.cache_tokens={most}" if preset.ask.cache_tokens < most else ""
            return f"{reach}: give --frames {frames}{room}"
    return f"{reach}: give fewer pictures, clips or words"


def build_sampling(preset: Preset, changes: dict[str, Any]) -> Sampling:
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
    return round_up(need, CACHE_STEP)


@contextmanager
def open_session(
    checkpoint: Checkpoint, preset: Preset, cache_tokens: int, *, verbose: bool = False, **shapes: int
) -> Iterator[Session | RemoteSession]:
    """A session, in this process or on several devices, whose libraries write to a temporary folder that goes with it;
    `shapes` as in `Session`.

    Raises:
        RuntimeMissingError: the preset is for NPUs, and CANN is not there.
    """
    from llavanext_cli.inference.remote import open_remote
    from llavanext_cli.inference.session import Session

    assert preset.ask is not None, "an ask preset"
    if preset.runtime.target == "Ascend":
        require_cann(advice="; on a CPU, leave --preset out or take video-7b-ask-cpu")
    limit = min(cache_tokens, preset.ask.cache_tokens)
    with scratch_folder() as folder:
        if preset.parallel.devices > 1:
            with open_remote(checkpoint.folder, preset, folder, limit, shapes) as session:
                yield session
            return
        graphs = cache_folder() / "graphs"
        yield Session(checkpoint, preset, folder, cache_tokens=limit, graphs=graphs, verbose=verbose, **shapes)

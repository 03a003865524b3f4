"""From a request to what answers it: checkpoint, preset and processor first, then the session with the model.

Everything that can be wrong with a request is found before the session loads MindSpore.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli.config.presets import check_model_settings, load_preset
from llavanext_cli.config.rules import has_room
from llavanext_cli.errors import ConfigError
from llavanext_cli.inference.memory import check_ask_memory, plan_ask_memory
from llavanext_cli.inference.request import AskRequest
from llavanext_cli.inference.sampling import Sampling
from llavanext_cli.machine.doctor import require_cann
from llavanext_cli.processing.processor import Processor
from llavanext_cli.processing.tokenizer import load_tokenizer
from llavanext_cli.weights.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from llavanext_cli.config.architecture import Architecture
    from llavanext_cli.config.schema import Ask, Preset
    from llavanext_cli.inference.remote import RemoteSession
    from llavanext_cli.inference.session import Session


@dataclass(frozen=True)
class Prepared:
    """What a question needs, short of the model itself.

    Attributes:
        checkpoint: opened; its weights are not read yet.
        preset: an ask preset.
        settings: its section for asking, with a cache that ends where the checkpoint's positions do.
        processor: for the checkpoint's prompts and media.
        sampling: how tokens are drawn.
    """

    checkpoint: Checkpoint
    preset: Preset
    settings: Ask
    processor: Processor
    sampling: Sampling


def prepare(request: AskRequest, *, has_videos: bool) -> Prepared:
    """Open the checkpoint and load the preset.

    Raises:
        LlavaNextError: the checkpoint or the preset cannot be used, or they do not fit each other.
    """
    checkpoint = open_checkpoint(request.checkpoint)
    architecture = checkpoint.architecture
    name = request.preset or default_preset(architecture, has_videos)
    frames = [f"data.frames={request.frames}"] if request.frames is not None else []
    preset = load_preset(name, [*request.overrides, *frames], request.devices, architecture)
    if preset.ask is None:
        raise ConfigError(f"{name} is a preset for training, not for asking", hint="see `llavanext presets list`")
    check_model_settings(preset, request.overrides, architecture)
    longest = longest_cache(architecture, preset.ask)
    settings = replace(preset.ask, cache_tokens=min(preset.ask.cache_tokens, longest))
    processor = Processor(architecture, load_tokenizer(checkpoint.folder), frames=preset.data.frames)
    sampling = build_sampling(settings, **request.sampling)
    return Prepared(checkpoint, replace(preset, ask=settings), settings, processor, sampling)


def default_preset(architecture: Architecture, has_videos: bool) -> str:
    """The Ascend presets where there is an Ascend. Elsewhere the tiny preset if the checkpoint's images and videos fit
    into it, else the CPU preset for models of full size."""
    if Path("/dev/davinci_manager").exists():
        return "video-7b-ask-video" if has_videos else "video-7b-ask-image"
    return "tiny-ask" if has_room(load_preset("tiny-ask"), architecture) else "video-7b-ask-cpu"


def longest_cache(architecture: Architecture, settings: Ask) -> int:
    """As far as the checkpoint's positions reach, in whole blocks."""
    return architecture.text.positions // settings.block_size * settings.block_size


def build_sampling(settings: Ask, **changes: Any) -> Sampling:
    """The preset's sampling with the command's changes."""
    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
    )
    return replace(sampling, **changes)


@contextmanager
def open_session(
    prepared: Prepared, cache_tokens: int, *, verbose: bool = False, **shapes: int
) -> Iterator[Session | RemoteSession]:
    """A session, in this process or on several devices. Its libraries write to a temporary folder.

    Args:
        cache_tokens: room for prompt and answer; at most the preset's.
        shapes: as in `Session`.

    Raises:
        RuntimeMissingError: the preset is for NPUs, and CANN is missing; or a CPU has too little memory.
    """
    from llavanext_cli.inference.remote import open_remote
    from llavanext_cli.inference.session import Session

    checkpoint, preset = prepared.checkpoint, prepared.preset
    if preset.runtime.target == "Ascend":
        require_cann(advice="; on a CPU, leave --preset out or use video-7b-ask-cpu")
    limit = min(cache_tokens, prepared.settings.cache_tokens)
    if preset.runtime.target == "CPU":
        check_ask_memory(plan_ask_memory(checkpoint, preset, shapes.get("batch_size", 1), limit))
    with temporary_folder() as folder:
        if preset.parallel.devices > 1:
            with open_remote(checkpoint.folder, preset, folder, limit, shapes) as session:
                yield session
            return
        yield Session(checkpoint, preset, folder, cache_tokens=limit, verbose=verbose, **shapes)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder under $TMPDIR that is removed with the command."""
    with tempfile.TemporaryDirectory(prefix="llavanext-ask-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)

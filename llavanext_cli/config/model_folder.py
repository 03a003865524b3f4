"""What the files of a checkpoint folder say about the model: config.json, preprocessor settings, chat template.

A checkpoint whose images were prepared in another way (another mean, another size), or that was trained on another
conversation format, would load and answer wrongly. So both are compared with what llavanext does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.hf_config import parse_architecture
from llavanext_cli.config.validation import is_number
from llavanext_cli.errors import CheckpointError

REFETCH = "fetch the file again: `llavanext fetch` checks each file's size and digest"
JSON_LIMIT = 16 << 20
"""Bytes of a config.json, and of any other JSON file of a model."""


def read_config(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """Parse a folder's `config.json`, or another of its JSON files.

    Raises:
        CheckpointError: it is missing, or does not hold a JSON object.
    """
    path = Path(folder) / name
    if path.exists() and not path.is_file():  # reading a pipe would wait forever
        raise CheckpointError(f"{path}: not a regular file", REFETCH)
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{path}: larger than {JSON_LIMIT} bytes", REFETCH)
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: {name} is missing", "name a folder that holds a model: weights, config.json and tokenizer"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}", "check the file's permissions and the disk"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON file ({error})", REFETCH) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, not {type(config).__name__}", REFETCH)
    return config


def read_optional(folder: str | Path, name: str) -> dict[str, Any]:
    """`read_config`, or an empty object when the file is missing."""
    return read_config(folder, name) if (Path(folder) / name).exists() else {}


def load_architecture(folder: str | Path) -> Architecture:
    """Read the architecture from a folder's `config.json`, and check how it prepares images.

    Raises:
        CheckpointError: there is no readable config.json, or it describes a model that is not supported, or images are
            prepared in another way; every problem is a line of `details`.
    """
    architecture = parse_architecture(read_config(folder), str(Path(folder) / "config.json"))
    check_preprocessor(folder, architecture)
    return architecture


# --------------------------------------------------------------------------------------------- how images are prepared

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3
SIZES = ("size", "crop_size")
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
COMPARED = ("image_mean", "image_std", "resample", "rescale_factor", *SIZES, *STEPS)
"""Keys that change pixels. A file may leave out any of them."""


def preprocessor_config(architecture: Architecture) -> dict[str, Any]:
    """The content of the preprocessor_config.json with which transformers prepares images as llavanext does."""
    side = architecture.vision.image_size
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextVideoProcessor",
        "aspect_ratio_setting": "anyres",
        "image_grid_pinpoints": [list(point) for point in architecture.image_grid_pinpoints],
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        **dict.fromkeys((*STEPS, "do_pad"), True),
    }


def check_preprocessor(folder: str | Path, architecture: Architecture) -> None:
    """Compare a folder's settings for images and videos, if it has any, with what llavanext does.

    Raises:
        CheckpointError: they differ, or a file cannot be read; one line for each setting.
    """
    ours = preprocessor_config(architecture)
    faults = []
    for where, settings in _preprocessor_settings(Path(folder)):
        pinpoints = () if "video" in where else ("image_grid_pinpoints",)  # videos have no grids
        faults += [
            f"{where}: {key}: {settings[key]!r:.200} is not supported; supported: {ours[key]}"
            for key in (*COMPARED, *pinpoints)
            if settings.get(key) is not None and not _is_same(key, settings[key], ours[key])
        ]
    if faults:
        raise CheckpointError(
            f"{folder}: this model prepares images in a way that is not supported",
            "if the file came with another model, replace it with the right one or remove it",
            faults,
        )


def _preprocessor_settings(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, settings) of all processors; transformers 5 writes them into one file."""
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        if (folder / name).is_file():
            yield name, read_config(folder, name)
    name = "processor_config.json"
    whole = read_config(folder, name) if (folder / name).is_file() else {}
    for part in ("image_processor", "video_processor"):
        if isinstance(whole.get(part), dict):
            yield f"{name}: {part}", whole[part]


def _is_same(key: str, theirs: Any, ours: Any) -> bool:
    """Whether a setting means the same: a size is a number, or an object of one or two."""
    if key in SIZES:
        sides = [side for side in theirs.values() if side is not None] if isinstance(theirs, dict) else [theirs]
        return bool(sides) and all(side in ours.values() for side in sides)
    if isinstance(ours, float) or key in ("image_mean", "image_std"):
        pair = [value if isinstance(value, list) else [value] for value in (theirs, ours)]
        return len(pair[0]) == len(pair[1]) and all(map(_is_close, *pair))
    return bool(theirs == ours)


def _is_close(theirs: Any, ours: float) -> bool:
    return is_number(theirs) and math.isclose(theirs, ours, rel_tol=1e-5)


# --------------------------------------------------------------------------------------------- the conversation format

MARKS = {"vicuna_v1": "ASSISTANT", "mistral_instruct": "[INST]"}
"""Conversation format → text that every template of that format writes."""
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Files that may hold a chat template; the first that does counts, as in transformers."""


def check_chat_template(folder: Path) -> str | None:
    """A warning where a checkpoint's chat template has another format than `Architecture.conversation`; else None.

    The template is not run: it is searched for the text that marks the format. A folder that is not a checkpoint gives
    no warning, as opening it will fail with the reason.
    """
    try:
        conversation = load_architecture(folder).conversation
        template = _read_template(folder)
    except (CheckpointError, OSError, ValueError):
        return None
    if template is None or MARKS[conversation] in template:
        return None
    return f"{folder}: its chat template is not in the format {conversation}, which llavanext uses for this model"


def _read_template(folder: Path) -> str | None:
    for name in TEMPLATE_FILES:
        path = folder / name
        if not path.is_file():
            continue
        template: object
        if path.suffix == ".json":
            template = read_config(folder, name).get("chat_template")
        else:
            template = path.read_text(encoding="utf-8")
        if isinstance(template, list):  # several, by name: [{"name": "default", "template": "..."}]
            template = json.dumps(template)
        if isinstance(template, str):
            return template
    return None

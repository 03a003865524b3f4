"""How pictures are prepared, in the words of a preprocessor_config.json: written for models that bring none, and
compared with what others bring.

A checkpoint that was taught with pictures prepared in another way (another mean, another size) would load and answer
wrongly. `processing.geometry` and `processing.image` do what is said here, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.hf_config import read_config
from llavanext_cli.config.sections import is_number
from llavanext_cli.errors import CheckpointError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3
SIZES = ("size", "crop_size")
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
COMPARED = ("image_mean", "image_std", "resample", "rescale_factor", *SIZES, *STEPS)
"""Keys that change pixels. A file may leave out any of them."""


def preprocessor_config(architecture: Architecture) -> dict[str, Any]:
    """The content of the preprocessor_config.json with which transformers prepares pictures as this program does."""
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
    """Compare the settings for pictures and clips that a folder brings, if any, with what is done here.

    Raises:
        CheckpointError: they differ, or a file cannot be read; one line for each setting.
    """
    ours = preprocessor_config(architecture)
    faults = []
    for where, settings in _read_settings(Path(folder)):
        pinpoints = () if "video" in where else ("image_grid_pinpoints",)  # clips have no grids
        faults += [
            f"{where}: {key}: {settings[key]!r:.200} is not supported; supported: {ours[key]}"
            for key in (*COMPARED, *pinpoints)
            if settings.get(key) is not None and not _same(key, settings[key], ours[key])
        ]
    if faults:
        raise CheckpointError(
            f"{folder}: pictures of this model are prepared in a way that is not supported",
            "If the file came with another model, put the right one in its place or remove it.",
            faults,
        )


def _read_settings(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where they stand, settings) of all processors; transformers 5 writes them into one file."""
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        if (folder / name).is_file():
            yield name, read_config(folder, name)
    name = "processor_config.json"
    whole = read_config(folder, name) if (folder / name).is_file() else {}
    for part in ("image_processor", "video_processor"):
        if isinstance(whole.get(part), dict):
            yield f"{name}: {part}", whole[part]


def _same(key: str, theirs: Any, ours: Any) -> bool:
    """Whether a setting means the same: a size is a number, or an object of one or two."""
    if key in SIZES:
        sides = [side for side in theirs.values() if side is not None] if isinstance(theirs, dict) else [theirs]
        return bool(sides) and all(side in ours.values() for side in sides)
    if isinstance(ours, float) or key in ("image_mean", "image_std"):
        pair = [value if isinstance(value, list) else [value] for value in (theirs, ours)]
        return len(pair[0]) == len(pair[1]) and all(map(_close, *pair))
    return bool(theirs == ours)


def _close(theirs: Any, ours: float) -> bool:
    return is_number(theirs) and math.isclose(theirs, ours, rel_tol=1e-5)

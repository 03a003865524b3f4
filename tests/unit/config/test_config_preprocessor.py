"""What a folder says about preparing pictures, against what is done here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavanext_cli.config.architecture import Architecture, architecture_to_hf, load_architecture
from llavanext_cli.config.preprocessor import check_preprocessor, preprocessor_config
from llavanext_cli.errors import CheckpointError

OURS = preprocessor_config(Architecture())
CLIP = {  # what openai/clip-vit-large-patch14-336 brings
    **{"crop_size": 336, "size": 336, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"},
    **{"do_center_crop": True, "do_normalize": True, "do_resize": True},
    **{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
}
ABSENT = dict.fromkeys(["size", "crop_size", "image_mean", "do_convert_rgb", "image_grid_pinpoints", "device"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        OURS,
        CLIP,
        ABSENT,
        {"size": {"height": 336, "width": 336}, "crop_size": {"shortest_edge": 336, "longest_edge": None}},
        {"rescale_factor": 0.00392156862745098, "image_std": [0.2686295, 0.2613026, 0.2757771]},
    ],
)
def test_other_words_for_the_same(settings: dict, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    check_preprocessor(tmp_path, Architecture())


def test_transformers_prepares_pictures_so_by_itself(tmp_path: Path) -> None:
    from transformers import LlavaNextImageProcessor

    sides = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    LlavaNextImageProcessor(**sides).save_pretrained(tmp_path)
    check_preprocessor(tmp_path, Architecture())
    LlavaNextImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="crop_size"):
        check_preprocessor(tmp_path, Architecture())


OTHERS: dict[str, Any] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.26862954, 0.26130258],
    "size": {"shortest_edge": 384},
    "crop_size": {"height": 336, "width": 224},
    "image_grid_pinpoints": [[336, 672]],
    "resample": 2,
    "rescale_factor": 1.0,
    **dict.fromkeys(["do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"], False),
}
ODD: dict[str, Any] = {
    "image_mean": "clip",
    "image_std": [[1], None, 10**400],
    "size": [],
    "crop_size": {},
    "rescale_factor": True,
    "do_resize": "yes",
}


@pytest.mark.parametrize("others", [OTHERS, ODD])
def test_what_is_done_otherwise_is_refused_by_name(others: dict, tmp_path: Path) -> None:
    """When a checkpoint is opened; each setting with what is supported."""
    (tmp_path / "config.json").write_text(json.dumps(architecture_to_hf(Architecture())))
    assert load_architecture(tmp_path) == Architecture()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OURS | others))
    with pytest.raises(CheckpointError) as caught:
        load_architecture(tmp_path)
    assert caught.value.hint and len(caught.value.details) == len(others)
    for key in others:
        (line,) = [line for line in caught.value.details if line.startswith(f"preprocessor_config.json: {key}: ")]
        assert line.endswith(f" is not supported; supported: {OURS[key]}")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("video_preprocessor_config.json", ""),
        ("processor_config.json", "image_processor"),
        ("processor_config.json", "video_processor"),
    ],
)
def test_the_other_places(name: str, part: str, tmp_path: Path) -> None:
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_grid_pinpoints": None if "image" in part else [[1, 1]]}
    (tmp_path / name).write_text(json.dumps({part: settings} if part else settings))
    with pytest.raises(CheckpointError) as caught:
        check_preprocessor(tmp_path, Architecture())
    (line,) = caught.value.details  # clips have no grids, whatever their file says
    assert line.startswith(f"{name}: {part}{': ' if part else ''}image_mean: [0.5, 0.5, 0.5] is not supported")


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: not a JSON file"):
        check_preprocessor(tmp_path, Architecture())

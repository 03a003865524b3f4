"""What the files of a checkpoint folder say: config.json, preparation of images, conversation format."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llavanext_cli.config.architecture import Architecture, TextArchitecture
from llavanext_cli.config.hf_config import architecture_to_hf
from llavanext_cli.config.model_folder import (
    MARKS,
    check_chat_template,
    check_preprocessor,
    load_architecture,
    preprocessor_config,
)
from llavanext_cli.errors import CheckpointError
from llavanext_cli.processing.prompt import CONVERSATIONS


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "config.json is missing"),
        (lambda path: path.write_text("{"), "config.json: not a JSON file"),
        (lambda path: path.write_text("[]"), "config.json: expected a JSON object, not list"),
        (lambda path: path.mkdir(), "config.json: not a regular file"),
        (os.mkfifo, "config.json: not a regular file"),
        (lambda path: (path.touch(), os.truncate(path, 600_000_000)), "config.json: larger than 16777216 bytes"),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path: Path, write: Any, message: str) -> None:
    write(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_architecture(tmp_path)
    assert caught.value.hint


# --- how images are prepared

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
def test_other_spellings_of_the_same_settings(settings: dict, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    check_preprocessor(tmp_path, Architecture())


def test_transformers_prepares_images_in_this_way(tmp_path: Path) -> None:
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
def test_other_settings_are_refused_by_name(others: dict, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(architecture_to_hf(Architecture())))
    assert load_architecture(tmp_path) == Architecture()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OURS | others))
    with pytest.raises(CheckpointError, match="prepares images in a way that is not supported") as caught:
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
def test_settings_in_other_files(name: str, part: str, tmp_path: Path) -> None:
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_grid_pinpoints": None if "image" in part else [[1, 1]]}
    (tmp_path / name).write_text(json.dumps({part: settings} if part else settings))
    with pytest.raises(CheckpointError) as caught:
        check_preprocessor(tmp_path, Architecture())
    (line,) = caught.value.details  # videos have no grids, whatever their file says
    assert line.startswith(f"{name}: {part}{': ' if part else ''}image_mean: [0.5, 0.5, 0.5] is not supported")


def test_preprocessor_settings_that_are_not_json(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: not a JSON file"):
        check_preprocessor(tmp_path, Architecture())


# --- the conversation format

VICUNA = "{{ message['role'].upper() + ': '}}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
MISTRAL = "{{ '[INST] ' }}{{ content['text'] }}{{ ' [/INST]' }}"
CHATML = "{{ '<|im_start|>' + message['role'] }}"


@pytest.fixture
def checkpoint(tmp_path):
    def make(kind: str, **files):
        architecture = replace(Architecture(), text=TextArchitecture(model_type=kind))
        (tmp_path / "config.json").write_text(json.dumps(architecture_to_hf(architecture)))
        for name, content in files.items():
            (tmp_path / name.replace("__", ".")).write_text(content)
        return tmp_path

    return make


def test_the_format_follows_from_the_language_model():
    assert Architecture().conversation == "vicuna_v1"
    assert Architecture(text=TextArchitecture(model_type="mistral")).conversation == "mistral_instruct"
    assert set(MARKS) == set(CONVERSATIONS)


@pytest.mark.parametrize(("kind", "template"), [("llama", VICUNA), ("mistral", MISTRAL)])
def test_a_template_of_the_same_format_gives_no_warning(checkpoint, kind, template):
    assert check_chat_template(checkpoint(kind)) is None
    assert check_chat_template(checkpoint(kind, tokenizer_config__json=json.dumps({"legacy": True}))) is None
    assert check_chat_template(checkpoint(kind, chat_template__json=json.dumps({"chat_template": template}))) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template__jinja", CHATML),
        ("chat_template__json", json.dumps({"chat_template": CHATML})),
        ("tokenizer_config__json", json.dumps({"chat_template": CHATML})),
        ("tokenizer_config__json", json.dumps({"chat_template": [{"name": "default", "template": CHATML}]})),
    ],
)
@pytest.mark.parametrize(("kind", "conversation"), [("llama", "vicuna_v1"), ("mistral", "mistral_instruct")])
def test_another_format_gives_a_warning(checkpoint, kind, conversation, name, content):
    folder = checkpoint(kind, **{name: content})
    line = f"{folder}: its chat template is not in the format {conversation}, which llavanext uses for this model"
    assert check_chat_template(folder) == line


def test_a_folder_that_is_not_a_checkpoint_gives_no_warning(tmp_path, checkpoint):
    assert check_chat_template(tmp_path / "none") is None
    assert check_chat_template(checkpoint("llama", chat_template__json="{")) is None

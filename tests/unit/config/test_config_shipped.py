"""Every YAML that is shipped: found, sound, commented, expandable, and with the numbers that were published."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from llavanext_cli.config.architecture import Architecture, RopeScaling
from llavanext_cli.config.documents import load_yaml
from llavanext_cli.config.mindformers import expand
from llavanext_cli.config.presets import load_preset
from llavanext_cli.config.shipped import preset_files, presets_folder
from llavanext_cli.config.writing import preset_to_dict, preset_to_yaml

NAMES = sorted(preset_files())


def test_all_of_them_were_found():
    on_disk = sorted(path.relative_to(presets_folder()).as_posix() for path in presets_folder().rglob("*.y*ml"))
    assert on_disk == sorted(["base/tiny.yaml", "base/video-7b.yaml", *(f"{name}.yaml" for name in NAMES)])
    assert {"video-7b-stage2", "video-7b-stage3", "video-7b-ask-image", "video-7b-ask-video"} <= set(NAMES)
    assert {"tiny-stage2", "tiny-stage3", "tiny-ask"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_with_its_command_its_hardware_and_its_outcome(name):
    lines = preset_files()[name].read_text().splitlines()
    command = {"train": "llavanext train ", "ask": "llavanext ask "}[load_preset(name).task]
    assert lines[0].startswith(f"# {command}")
    assert f" {name}" in lines[0]
    assert ("-ask" in name) == (load_preset(name).task == "ask"), "shells tell them apart by their names"
    assert lines[2].startswith("# Hardware: ")
    assert lines[3].startswith("# Outcome:  ")
    assert len(lines) < 60, "a person reads it in a minute"


@pytest.mark.parametrize("name", NAMES)
def test_it_extends_the_base_of_its_family(name):
    family = name.rsplit("-stage", 1)[0].split("-ask")[0]
    assert load_yaml(preset_files()[name]).values["extends"] == f"base/{family}"


@pytest.mark.parametrize("name", NAMES)
def test_it_expands_to_plain_yaml(name):
    preset = load_preset(name)
    expanded = expand(preset)
    assert expanded["model"]["model_config"]["seq_length"] == (
        preset.data.seq_length if preset.train else preset.ask.cache_tokens
    )
    assert yaml.safe_load(yaml.safe_dump(expanded)) == expanded
    assert yaml.safe_load(yaml.safe_dump(expanded, sort_keys=False)) == json.loads(json.dumps(expanded))


@pytest.mark.parametrize("name", NAMES)
def test_written_out_in_full_it_says_the_same(name, tmp_path):
    preset = load_preset(name)
    path = tmp_path / "full.yaml"
    path.write_text(preset_to_yaml(preset))
    again = load_preset(path)
    assert dataclasses.replace(again, name=preset.name, path=preset.path) == preset
    assert preset_to_dict(again) == preset_to_dict(preset)


def test_the_large_base_is_the_published_architecture():
    assert load_preset("video-7b-stage2").model == Architecture()


@pytest.mark.parametrize("name", ["video-7b-stage2", "video-7b-stage3"])
def test_the_published_training_settings(name):
    preset = load_preset(name)
    train, parallel, runtime = preset.train, preset.parallel, preset.runtime
    assert (train.learning_rate, train.final_learning_rate, train.warmup_ratio) == (2e-6, 0.0, 0.03)
    assert (train.schedule, train.weight_decay, train.betas, train.epsilon) == ("cosine", 0.0, (0.9, 0.999), 1e-8)
    assert (train.batch_size, train.recompute, train.clip_norm) == (1, 16, 1.0)
    assert set(train.trainable) == {"vision", "projector", "newline", "language"}
    assert (parallel.devices, parallel.data, parallel.optimizer_sharding) == (8, 8, True)
    assert (runtime.compute_dtype, runtime.parameter_dtype, runtime.memory) == ("bfloat16", "float32", "57GB")
    assert preset.data.seq_length == 4096
    assert (preset.data.tiles, preset.data.frame_budget) == ((5, 0) if name.endswith("2") else (0, 16))


def test_the_video_preset_reaches_its_32_frames():
    preset = load_preset("video-7b-ask-video")
    assert preset.data.frames * preset.model.frame_features == 4608
    assert preset.ask.cache_tokens == 8192
    assert preset.model.text.rope_scaling == RopeScaling("linear", 2.5)


def test_the_tiny_presets_are_one_model():
    models = [load_preset(name).model for name in NAMES if name.startswith("tiny-")]
    assert len(models) >= 3
    assert len(set(map(repr, models))) == 1

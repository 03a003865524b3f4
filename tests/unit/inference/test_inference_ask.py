"""Which preset a checkpoint is asked with, how far its positions reach, and what is said of a question too long."""

import dataclasses
from types import SimpleNamespace

import pytest

from llavanext_cli.config.architecture import Architecture, TextArchitecture, VisionArchitecture
from llavanext_cli.config.presets import check_model_settings, load_preset
from llavanext_cli.errors import ConfigError
from llavanext_cli.inference.ask import default_preset, how_to_fit, prepare
from llavanext_cli.inference.media_sources import describe_times
from llavanext_cli.inference.sampling import Sampling
from llavanext_cli.processing.video import read_frames

PUBLISHED = Architecture()
SCALED = dataclasses.replace(PUBLISHED, text=TextArchitecture(rope_scaling={"type": "linear", "factor": 2.5}))
SMALL = Architecture(vision=VisionArchitecture(image_size=28, patch_size=7), image_grid_pinpoints=((56, 56),))


@pytest.fixture
def prepared(monkeypatch):
    """`prepare` on a checkpoint of which only the architecture is there."""

    def prepared(architecture, name, *overrides, frames=None):
        opened = SimpleNamespace(architecture=architecture, folder=None)
        monkeypatch.setattr("llavanext_cli.inference.ask.open_checkpoint", lambda folder: opened)
        monkeypatch.setattr("llavanext_cli.inference.ask.load_tokenizer", lambda folder: SimpleNamespace(added={}))
        return prepare("folder", name, overrides, None, frames, wants_video=True)[1]

    return prepared


def test_a_cpu_asks_every_checkpoint_without_settings(prepared):
    assert default_preset(PUBLISHED, wants_video=True) == "video-7b-ask-cpu"
    assert default_preset(SMALL, wants_video=True) == "tiny-ask"
    assert default_preset(load_preset("tiny-ask").model, wants_video=False) == "tiny-ask"
    preset = prepared(PUBLISHED, None)
    assert (preset.runtime.target, preset.ask.cache_tokens) == ("CPU", 4096)
    assert preset.data.tiles and preset.data.frames


def test_the_cache_ends_where_the_checkpoints_positions_do(prepared):
    assert prepared(SCALED, "video-7b-ask-video").ask.cache_tokens == 8192
    assert prepared(PUBLISHED, "video-7b-ask-video").ask.cache_tokens == 4096
    assert prepared(SCALED, "video-7b-ask-image", "ask.cache_tokens=8192").ask.cache_tokens == 8192
    assert prepared(SCALED, "video-7b-ask-image", "ask.cache_tokens=16384").ask.cache_tokens == 10240


def test_the_settings_of_the_run_are_judged_by_the_checkpoint(prepared):
    text = dataclasses.replace(SMALL.text, num_attention_heads=12, num_key_value_heads=12, intermediate_size=9000)
    small = dataclasses.replace(SMALL, text=dataclasses.replace(text, vocab_size=300))
    three = ("parallel.devices=3", "parallel.tensor=3")
    assert prepared(small, "tiny-ask", *three).parallel.tensor == 3
    with pytest.raises(ConfigError) as fault:
        prepared(PUBLISHED, "tiny-ask", *three)
    assert "3 devices cannot share num_attention_heads 32 evenly" in fault.value.details[0]


def test_training_ends_where_the_checkpoints_positions_do():
    settings = ("model.text.rope_scaling={type: linear, factor: 2.5}", "data.seq_length=8192")
    preset = load_preset("video-7b-stage3", settings)
    check_model_settings(preset, settings, SCALED)
    with pytest.raises(ConfigError, match=r"data\.seq_length is 8192, but .* reach 4096") as fault:
        check_model_settings(preset, settings[1:], PUBLISHED)
    assert "--set data.seq_length=4096" in fault.value.hint


@pytest.mark.parametrize("setting", ["model.vision.hidden_size=512", "model={vision: {hidden_size: 512}}"])
def test_a_model_of_another_shape_than_the_checkpoints_is_refused(setting):
    preset = load_preset("video-7b-stage3", (setting,))
    with pytest.raises(ConfigError, match=r"the checkpoint's model\.vision\.hidden_size is 1024"):
        check_model_settings(preset, (setting,), SCALED)


def question(tokens: int, frames: int = 0) -> SimpleNamespace:
    return SimpleNamespace(length=tokens, frames=range(frames))


@pytest.mark.parametrize(
    ("architecture", "encoded", "clips", "expected"),
    [
        (SCALED, question(4700, 32), 1, "give --set ask.cache_tokens=5376"),
        (SCALED, question(9900), 0, "give --set ask.cache_tokens=10224"),
        (PUBLISHED, question(4660, 32), 1, "reach 4096: give --frames 24 and --set ask.cache_tokens=4080"),
        (PUBLISHED, question(4660, 32), 2, "reach 4096: give --frames 12 and --set ask.cache_tokens=4080"),
        (PUBLISHED, question(6000), 0, "reach 4096: give fewer pictures, clips or words"),
        (PUBLISHED, question(9000, 8), 1, "reach 4096: give fewer pictures, clips or words"),
    ],
)
def test_what_a_question_is_told_that_does_not_fit(architecture, encoded, clips, expected):
    preset = load_preset("video-7b-ask-cpu", ["ask.block_size=48", "ask.cache_tokens=4032"])
    assert how_to_fit(encoded, clips, preset, architecture, Sampling()).endswith(expected)


def test_the_times_of_a_clip_are_told_from_the_frames_that_were_read(write_clip, monkeypatch):
    clip = write_clip(frames=30, rate=10)
    times = read_frames(clip, 4)[1].tolist()
    monkeypatch.setattr("llavanext_cli.processing.video.read_frames", None)  # once is enough
    assert describe_times(clip, times) == (
        "The video lasts for 3.00 seconds, and 4 frames are uniformly sampled from it. "
        "These frames are located at 0.00s,0.90s,1.90s,2.90s.Please answer the following questions related to this "
        "video."
    )

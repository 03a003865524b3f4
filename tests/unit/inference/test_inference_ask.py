"""The preset that a checkpoint is asked with, how far its positions reach, and the hint for a question too long."""

import dataclasses
from types import SimpleNamespace

import pytest

from llavanext_cli.config.architecture import Architecture, RopeScaling, TextArchitecture, VisionArchitecture
from llavanext_cli.config.presets import check_model_settings, load_preset
from llavanext_cli.errors import ConfigError
from llavanext_cli.inference import prepare
from llavanext_cli.inference.ask import how_to_fit
from llavanext_cli.inference.request import AskRequest
from llavanext_cli.processing.video import describe_times, read_frames

PUBLISHED = Architecture()
SCALED = dataclasses.replace(PUBLISHED, text=TextArchitecture(rope_scaling=RopeScaling(type="linear", factor=2.5)))
SMALL = Architecture(vision=VisionArchitecture(image_size=28, patch_size=7), image_grid_pinpoints=((56, 56),))


@pytest.fixture
def prepared(monkeypatch):
    """`prepare` on a checkpoint that has an architecture and nothing else."""

    def prepared(architecture, name, *overrides):
        opened = SimpleNamespace(architecture=architecture, folder=None)
        monkeypatch.setattr(prepare, "open_checkpoint", lambda folder: opened)
        monkeypatch.setattr(prepare, "load_tokenizer", lambda folder: SimpleNamespace(added={}))
        return prepare.prepare(AskRequest("folder", preset=name, overrides=overrides), has_videos=True)

    return prepared


def test_a_cpu_asks_every_checkpoint_without_settings(prepared):
    default_preset = prepare.default_preset
    assert default_preset(PUBLISHED, has_videos=True) == "video-7b-ask-cpu"
    assert default_preset(SMALL, has_videos=True) == "tiny-ask"
    assert default_preset(load_preset("tiny-ask").model, has_videos=False) == "tiny-ask"
    preset = prepared(PUBLISHED, None).preset
    assert (preset.runtime.target, preset.ask.cache_tokens) == ("CPU", 4096)
    assert preset.data.tiles and preset.data.frames


def test_the_cache_ends_where_the_checkpoints_positions_do(prepared):
    def cache(*arguments):
        return prepared(*arguments).settings.cache_tokens

    assert cache(SCALED, "video-7b-ask-video") == 8192
    assert cache(PUBLISHED, "video-7b-ask-video") == 4096
    assert cache(SCALED, "video-7b-ask-image", "ask.cache_tokens=8192") == 8192
    assert cache(SCALED, "video-7b-ask-image", "ask.cache_tokens=16384") == 10240


def test_settings_are_compared_with_the_checkpoint(prepared):
    text = dataclasses.replace(SMALL.text, num_attention_heads=12, num_key_value_heads=12, intermediate_size=9000)
    small = dataclasses.replace(SMALL, text=dataclasses.replace(text, vocab_size=300))
    three = ("parallel.devices=3", "parallel.tensor=3")
    assert prepared(small, "tiny-ask", *three).preset.parallel.tensor == 3
    with pytest.raises(ConfigError) as fault:
        prepared(PUBLISHED, "tiny-ask", *three)
    assert "3 devices cannot share num_attention_heads 32 evenly" in fault.value.details[0]


def test_training_ends_where_the_checkpoints_positions_do():
    settings = ("model.text.rope_scaling={type: linear, factor: 2.5}", "data.seq_length=8192")
    preset = load_preset("video-7b-stage3", settings)
    check_model_settings(preset, settings, SCALED)
    with pytest.raises(ConfigError, match=r"data\.seq_length is 8192, but .* has 4096 positions") as fault:
        check_model_settings(preset, settings[1:], PUBLISHED)
    assert "--set data.seq_length=4096" in fault.value.hint


@pytest.mark.parametrize("setting", ["model.vision.hidden_size=512", "model={vision: {hidden_size: 512}}"])
def test_a_model_of_another_shape_than_the_checkpoints_is_refused(setting):
    preset = load_preset("video-7b-stage3", (setting,))
    with pytest.raises(ConfigError, match=r"the checkpoint's model\.vision\.hidden_size is 1024"):
        check_model_settings(preset, (setting,), SCALED)


@pytest.mark.parametrize(
    ("architecture", "tokens", "frames", "videos", "expected"),
    [
        (SCALED, 4700, 32, 1, "add --set ask.cache_tokens=5376"),
        (SCALED, 9900, 0, 0, "add --set ask.cache_tokens=10224"),
        (PUBLISHED, 4660, 32, 1, "has 4096 positions: add --frames 24 and --set ask.cache_tokens=4080"),
        (PUBLISHED, 4660, 32, 2, "has 4096 positions: add --frames 12 and --set ask.cache_tokens=4080"),
        (PUBLISHED, 6000, 0, 0, "has 4096 positions: use fewer images, videos or words"),
        (PUBLISHED, 9000, 8, 1, "has 4096 positions: use fewer images, videos or words"),
    ],
)
def test_the_hint_for_a_question_that_does_not_fit(prepared, architecture, tokens, frames, videos, expected):
    ready = prepared(architecture, "video-7b-ask-cpu", "ask.block_size=48", "ask.cache_tokens=4032")
    question = SimpleNamespace(length=tokens, frames=range(frames))
    assert how_to_fit(question, videos, ready).endswith(expected)


def test_the_times_of_a_video_are_those_of_the_frames_that_were_read(write_clip, monkeypatch):
    video = write_clip(frames=30, rate=10)
    times = read_frames(video, 4)[1].tolist()
    monkeypatch.setattr("llavanext_cli.processing.video.read_frames", None)  # once is enough
    assert describe_times(video, times) == (
        "The video lasts for 3.00 seconds, and 4 frames are uniformly sampled from it. "
        "These frames are located at 0.00s,0.90s,1.90s,2.90s.Please answer the following questions related to this "
        "video."
    )

"""Samples to numbers, end to end: images, videos, paths, counting without decoding, errors that name the sample."""

import dataclasses
import pickle

import msgspec
import numpy as np
import pytest
from PIL import Image

from llavanext_cli.config.architecture import Architecture, VisionArchitecture
from llavanext_cli.errors import CheckpointError, DataError
from llavanext_cli.processing.image import normalise
from llavanext_cli.processing.processor import Processor
from llavanext_cli.processing.tokenizer import load_tokenizer
from llavanext_cli.processing.video import load_video
from llavanext_cli.records import IGNORE_INDEX, Medium, Sample, Turn

ROLES = ("user", "assistant")


@pytest.fixture
def processor(make_tokenizer_folder):
    tokenizer = load_tokenizer(make_tokenizer_folder())
    arch = Architecture(
        vision=VisionArchitecture(image_size=28, patch_size=14),
        image_grid_pinpoints=((28, 56), (56, 28), (56, 56)),
        image_token_index=tokenizer.added["<image>"],
        video_token_index=tokenizer.added["<video>"],
    )
    return Processor(arch, tokenizer, frames=3)


@pytest.fixture
def roots(tmp_path, write_clip):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(noise).save(tmp_path / "images" / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(tmp_path / "images" / "turned.jpg", exif=exif)
    write_clip("images/clip.mp4", frames=9)
    return {"src": tmp_path / "images"}


def sample(texts, media=(), source="src") -> Sample:
    return Sample("s1", source, tuple(media), tuple(Turn(ROLES[i % 2], t) for i, t in enumerate(texts)))


PICTURE, TURNED, CLIP = Medium("image", "a.png"), Medium("image", "turned.jpg"), Medium("video", "clip.mp4")


def test_encoding_everything_at_once(processor, roots):
    whole = sample(["<image> <video> <image>", "a cat"], [PICTURE, CLIP, TURNED])
    encoded = processor.encode(whole, roots)
    plans = processor.load_media(whole, roots).plans
    assert encoded.tiles.shape == (plans[0].tiles + plans[2].tiles, 3, 28, 28)
    assert encoded.tiles.dtype == encoded.frames.dtype == np.float32
    video, _ = load_video(roots["src"] / "clip.mp4", 3, processor.arch)
    assert np.array_equal(encoded.frames, normalise(video))
    assert plans[2].size == (60, 40)  # as displayed, not as stored
    assert processor.tokenizer.decode(encoded.labels[encoded.labels != IGNORE_INDEX]) == "a cat"
    assert processor.measure(whole, roots) == encoded.size
    assert processor.plan_media(whole, roots) == plans


def test_a_text_only_sample(processor):
    encoded = processor.encode(sample(["q", "a"], source="none"), {})
    assert encoded.tiles.shape == encoded.frames.shape == (0, 3, 28, 28)


def test_a_question(processor, roots):
    question = sample(["what?"], [PICTURE])
    encoded = processor.encode_question(question, roots)
    assert (encoded.labels == IGNORE_INDEX).all()
    text = processor.tokenizer.decode(encoded.input_ids)
    assert text.endswith("USER: \nwhat? ASSISTANT:")


def test_media_can_be_decoded_once_for_a_whole_chat(processor, roots):
    first = sample(["what?"], [PICTURE, CLIP])
    media = processor.load_media(first, roots)
    then = msgspec.structs.replace(first, turns=(*first.turns, Turn("assistant", "a cat"), Turn("user", "grey?")))
    kept = processor.encode_question(then, {}, media)
    fresh = processor.encode_question(then, roots)
    for field in ("input_ids", "labels", "tiles", "frames", "feature_index"):
        assert np.array_equal(getattr(kept, field), getattr(fresh, field))


def test_paths(processor, roots, monkeypatch):
    relative = processor.encode(sample(["<image>\nq", "a"], [PICTURE]), roots)
    absolute = Medium("image", str(roots["src"] / "a.png"))
    assert np.array_equal(processor.encode(sample(["<image>\nq", "a"], [absolute], "other"), {}).tiles, relative.tiles)
    monkeypatch.chdir(roots["src"])
    assert np.array_equal(processor.encode(sample(["<image>\nq", "a"], [PICTURE], ""), {}).tiles, relative.tiles)


def test_counting_uses_recorded_sizes(processor, roots):
    recorded = sample(["<image> <video>", "a"], [Medium("image", "gone.png", (40, 60)), Medium("video", "gone.mp4")])
    real = sample(["<image> <video>", "a"], [PICTURE, CLIP])
    assert processor.measure(recorded, {"src": "nowhere"}) == processor.encode(real, roots).size
    with pytest.raises(DataError, match=r"sample s1: .*gone\.png: no such image"):
        processor.encode(recorded, {"src": "nowhere"})


def test_counting_decodes_nothing(processor, roots, monkeypatch):
    def refuse(*_):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image.Image, "convert", refuse)
    monkeypatch.setattr("llavanext_cli.processing.processor.load_image", refuse)
    monkeypatch.setattr("llavanext_cli.processing.processor.load_video", refuse)
    assert processor.measure(sample(["<image> <video> <image>", "a"], [PICTURE, CLIP, TURNED]), roots).tokens > 20


def test_errors_name_the_sample(processor, roots):
    for name in ("text.jpg", "text.mp4"):
        (roots["src"] / name).write_text("no")
    for medium, words in (
        (Medium("image", "none.png"), "no such image"),
        (Medium("image", "text.jpg"), "not an image"),
        (Medium("video", "none.mp4"), "no such video"),
        (Medium("video", "text.mp4"), "cannot be read as a video"),
    ):
        with pytest.raises(DataError, match=f"^sample s1: .*{medium.path}: .*{words}") as caught:
            processor.encode(sample(["<image>\nq", "a"], [medium]), roots)
        assert caught.value.hint


def test_a_video_where_no_frames_are_taken(processor, roots):
    none = dataclasses.replace(processor, frames=0)
    video = sample(["<image>\nq", "a"], [CLIP])
    for work in (none.encode, none.measure):
        with pytest.raises(DataError, match=r"^sample s1: has a video, but data.frames is 0") as caught:
            work(video, roots)
        assert "data.frames" in caught.value.hint
    assert len(none.encode(sample(["<image>\nq", "a"], [PICTURE]), roots).frames) == 0


def test_a_source_without_a_root(processor):
    with pytest.raises(DataError, match=r"sample s1: no media folder for source 'src', needed for a\.png") as caught:
        processor.encode(sample(["<image>\nq", "a"], [PICTURE]), {"elsewhere": "x"})
    assert "elsewhere" in caught.value.hint


def test_a_tokenizer_of_another_checkpoint(processor):
    arch = dataclasses.replace(processor.arch, image_token_index=7)
    with pytest.raises(CheckpointError, match=r"<image> has id 521 in the tokenizer, but image_token_index is 7"):
        Processor(arch, processor.tokenizer)


def test_an_image_model_whose_tokenizer_knows_videos(processor, roots):
    image = processor.arch.image_token_index
    images = Processor(dataclasses.replace(processor.arch, video_token_index=image), processor.tokenizer)
    assert (images.encode(sample(["<image>\nq", "a"], [PICTURE]), roots).input_ids == image).any()
    with pytest.raises(CheckpointError, match="<image> has id 521"):
        Processor(dataclasses.replace(images.arch, image_token_index=7, video_token_index=7), processor.tokenizer)


def test_it_travels_to_other_processes(processor, roots):
    whole = sample(["<image>\nq", "a"], [PICTURE])
    copy = pickle.loads(pickle.dumps(processor))
    assert np.array_equal(copy.encode(whole, roots).input_ids, processor.encode(whole, roots).input_ids)

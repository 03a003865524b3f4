"""The table of forms and endings: that it says what PIL and FFmpeg say, and that what it names is read."""

from pathlib import Path

import av
import pytest
from PIL import Image, features

from llavanext_cli.processing.formats import IMAGE_ENDINGS, IMAGE_FORMATS, VIDEO_ENDINGS, VIDEO_FORMATS, guess_kind
from llavanext_cli.processing.image import load_image
from llavanext_cli.processing.video import read_frames


def test_pil_gives_each_ending_to_the_form_that_the_table_does():
    Image.init()
    known = Image.registered_extensions()
    assert {ending: form for form, endings in IMAGE_FORMATS.items() for ending in endings if ending in known} == {
        ending: form for ending, form in known.items() if form in IMAGE_FORMATS
    }


def test_ffmpeg_knows_the_forms_of_videos():
    assert len(VIDEO_FORMATS) > 20
    for name in VIDEO_FORMATS:
        assert av.format.ContainerFormat(name, "r").is_input


def test_no_ending_stands_twice():
    endings = [*IMAGE_ENDINGS, *VIDEO_ENDINGS]
    assert len(set(endings)) == len(endings) > 40


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jpg", "image"),
        ("a.AVIF", "image"),
        ("a.gif", "image"),
        ("b.c/a.MP4", "video"),
        (Path("a.tar.ts"), "video"),
        ("a.txt", None),
        ("jpg", None),
        (".jpg", None),
        ("", None),
    ],
)
def test_what_a_name_tells(name, kind):
    assert guess_kind(name) == kind


WRITTEN = ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tiff", "a.ppm"]
WRITTEN += [f"a.{form}" for form, has in (("jp2", "jpg_2000"), ("avif", "avif")) if features.check(has)]


@pytest.mark.parametrize("name", WRITTEN)
def test_images_with_these_endings_are_read(tmp_path, name):
    Image.new("RGB", (30, 20)).save(tmp_path / name)
    assert guess_kind(name) == "image"
    assert load_image(tmp_path / name).size == (30, 20)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mov", "libx264"),
        ("a.mkv", "libx264"),
        ("a.avi", "mpeg4"),
        ("a.webm", "libvpx"),
        ("a.flv", "flv"),
        ("a.wmv", "wmv2"),
        ("a.mpg", "mpeg1video"),
        ("a.ts", "libx264"),
        ("a.3gp", "mpeg4"),
        ("a.h264", "libx264"),
        ("a.ivf", "libvpx"),
        ("a.nut", "mpeg4"),
    ],
)
def test_videos_with_these_endings_are_read(write_clip, name, codec):
    assert guess_kind(name) == "video"
    rate = 25 if codec == "mpeg1video" else 10  # MPEG-1 knows a few rates
    assert len(read_frames(write_clip(name, 12, codec=codec, rate=rate), 3, "pyav")[0]) == 3

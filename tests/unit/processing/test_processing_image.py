"""Images: every mode that files come in, orientation, what is refused and how, and the tiles."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.model_folder import CLIP_MEAN, CLIP_STD
from llavanext_cli.errors import DataError
from llavanext_cli.processing import image as image_module
from llavanext_cli.processing.geometry import plan_tiles
from llavanext_cli.processing.image import (
    TooLargeError,
    build_tiles,
    load_image,
    normalise,
    read_image_size,
)

ARCH = Architecture()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", **options)
    return buffer.getvalue()


@pytest.fixture
def stored(tmp_path):
    """Bytes in a file, whose path it gives."""

    def store(data: bytes) -> Path:
        path = tmp_path / "stored"
        path.write_bytes(data)
        return path

    return store


def test_a_path_may_be_text(stored):
    pixels = noise(20, 30)
    path = stored(png(Image.fromarray(pixels)))
    for source in (path, str(path)):
        image = load_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), pixels)
        assert read_image_size(source) == (20, 30)


def test_a_wrong_extension_does_not_matter(tmp_path):
    path = tmp_path / "really_a_gif.jpg"
    Image.fromarray(noise(9, 7)).quantize(8).save(path, "gif")
    assert (load_image(path).height, load_image(path).width) == (9, 7)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "RGB", "CMYK"])
def test_modes_become_rgb_as_pil_converts_them(mode, tmp_path):
    source = Image.fromarray(noise(12, 16)).convert(mode)
    source.save(tmp_path / "a", "tiff" if mode == "CMYK" else "png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "a")), np.asarray(source.convert("RGB")))


def test_transparency_is_dropped_not_blended(stored):
    pixels = noise(5, 5, 4)
    pixels[..., 3] = 0
    assert np.array_equal(np.asarray(load_image(stored(png(Image.fromarray(pixels))))), pixels[..., :3])


def test_palette_with_a_transparent_colour(stored):
    source = Image.fromarray(noise(8, 8)).quantize(4)
    loaded = load_image(stored(png(source, transparency=0)))
    assert np.array_equal(np.asarray(loaded), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize("container", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled(container, stored):
    grey = np.array([[0, 100, 255, 256, 1000, 40000, 65535]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, container)
    loaded = np.asarray(load_image(stored(buffer.getvalue())))
    assert loaded[0, :, 0].tolist() == [0, 0, 0, 1, 3, 156, 255]  # PIL alone: 0 100 255 255 255 255 255
    assert (loaded[..., 0] == loaded[..., 2]).all()


def test_float_grey(tmp_path):
    Image.fromarray(np.array([[0, 0.5, 1.0]], np.float32)).save(tmp_path / "f.tif")
    assert np.asarray(load_image(tmp_path / "f.tif"))[0, :, 0].tolist() == [0, 127, 255]


FORMS = ["png", "jpeg", "webp", "tiff", *(["avif"] if features.check("avif") else [])]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation, form, tmp_path):
    # every orientation of the same upright image: a bright corner at the top left, wider than high
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = 255
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(turn(upright))).save(tmp_path / "a", form, exif=exif)
    loaded = np.asarray(load_image(tmp_path / "a"))
    assert np.abs(loaded.astype(int) - upright).max() <= (0 if form in ("png", "tiff") else 40)  # others lose a little
    assert read_image_size(tmp_path / "a") == (32, 48)


def turned_png(at: str) -> bytes:
    """A PNG of 48 x 32 pixels whose orientation, 6, is noted in a chunk of its own, before or behind the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = len(content).to_bytes(4, "big") + b"eXIf" + content + zlib.crc32(b"eXIf" + content).to_bytes(4, "big")
    data = png(Image.fromarray(noise(48, 32)))
    place = data.index(at.encode()) - 4
    return data[:place] + chunk + data[place:]


@pytest.mark.parametrize("at", ["IDAT", "IEND"])
def test_header_and_pixels_agree_wherever_a_png_notes_its_orientation(at, stored):
    path = stored(turned_png(at))
    image = load_image(path)
    assert (image.height, image.width) == read_image_size(path) == (32, 48)


@pytest.mark.parametrize("form", FORMS)
def test_sizes_are_read_without_decoding(form, tmp_path, monkeypatch):
    path = tmp_path / "a"
    Image.fromarray(noise(20, 30)).save(path, form)
    with Image.open(path) as image:
        plugin = type(image)
    monkeypatch.setattr(plugin, "load", lambda self: pytest.fail("an image was decoded"))
    assert read_image_size(path) == (20, 30)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_does_not_cost_the_image(stored):
    pixels = noise(6, 8)
    data = png(Image.fromarray(pixels), exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x01")
    path = stored(data)
    assert np.array_equal(np.asarray(load_image(path)), pixels)
    assert read_image_size(path) == (6, 8)


def _refused(source, *words):
    with pytest.raises(DataError) as caught:
        load_image(source)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in caught.value.what
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("form", ["eps", "sgi", "tga"])
def test_what_may_be_a_program_is_no_image_whatever_its_name(form, tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript; it and rarer forms are not looked at."""
    path = tmp_path / "cat.jpg"
    Image.fromarray(noise(6, 8)).save(path, form)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    assert ": not an image" in _refused(path).what
    with pytest.raises(DataError, match=": not an image"):
        read_image_size(path)


@pytest.mark.parametrize("form", FORMS)
def test_an_image_is_held_once(form, tmp_path, monkeypatch):
    """An image of the greatest size takes 0.7 GB, and a copy as much again. What is returned outlives its file."""
    path = tmp_path / "a"
    Image.fromarray(noise(20, 30)).save(path, form)
    monkeypatch.setattr(Image.Image, "copy", lambda self: pytest.fail("an image was copied"))
    image = load_image(path)
    path.unlink()
    assert np.asarray(image.resize((15, 10))).shape == (10, 15, 3)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    assert "root" in _refused(tmp_path / "none.jpg", "none.jpg", "no such image").hint
    _refused(tmp_path / "empty.jpg", "empty.jpg", "0 bytes")
    _refused(tmp_path / "text.jpg", "text.jpg", "not an image")
    _refused(tmp_path, "a folder, not an image")
    with pytest.raises(DataError, match="0 bytes"):
        read_image_size(tmp_path / "empty.jpg")


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "gif", "tiff", "bmp"])
def test_truncated_images_are_refused(form, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, form)
    path = tmp_path / f"cut.{form}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    _refused(path, str(path))


def test_every_byte_of_an_image_may_be_wrong(stored):
    data = bytearray(png(Image.fromarray(noise(16, 16)), exif=Image.Exif()))
    random = np.random.default_rng(1)
    read = refused = 0
    for _ in range(300):
        broken = bytearray(data)
        broken[int(random.integers(len(broken)))] ^= int(random.integers(1, 256))
        try:
            load_image(stored(broken))
            read += 1
        except DataError:
            refused += 1
    assert refused > 100
    assert read + refused == 300


def test_decompression_bombs(monkeypatch, stored):
    monkeypatch.setattr(image_module, "MAX_PIXELS", 100)
    path = stored(png(Image.fromarray(noise(11, 10))))
    assert isinstance(_refused(path, "11 x 10 pixels", "100"), TooLargeError)
    with pytest.raises(TooLargeError, match="100"):
        read_image_size(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    monkeypatch.setattr(image_module, "MAX_PIXELS", 10**9)
    assert isinstance(_refused(path, "more than"), TooLargeError)


def test_a_file_of_another_user(monkeypatch, stored):
    path = stored(png(Image.fromarray(noise(6, 8))))
    refuse = lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))  # noqa: E731
    monkeypatch.setattr(Image, "open", refuse)  # root may read everything
    assert "permissions" in _refused(path, "cannot be read as an image", "Permission denied").hint


def test_tiles_are_the_grid_cut_up():
    pixels = noise(480, 640)
    plan = plan_tiles((480, 640), ARCH)
    tiles = build_tiles(Image.fromarray(pixels), plan, ARCH)
    assert tiles.shape == (5, 3, 336, 336)
    assert tiles.dtype == np.uint8
    assert tiles.flags.c_contiguous
    grid = np.concatenate([np.concatenate(list(tiles[1:3]), 2), np.concatenate(list(tiles[3:]), 2)], 1)
    assert not grid[:, :84].any()
    assert not grid[:, 588:].any()
    resized = np.asarray(Image.fromarray(pixels).resize((672, 504), Image.Resampling.BICUBIC))
    assert np.array_equal(grid[:, 84:588].transpose(1, 2, 0), resized)
    assert np.array_equal(
        tiles[0].transpose(1, 2, 0), np.asarray(Image.fromarray(pixels).resize((336, 336), Image.Resampling.BICUBIC))
    )


def test_a_plan_of_another_image_is_a_bug():
    with pytest.raises(ValueError, match="the plan is for"):
        build_tiles(Image.new("RGB", (10, 20)), plan_tiles((10, 20), ARCH), ARCH)


def test_normalising():
    tiles = noise(4, 4).transpose(2, 0, 1)[None]
    expected = (tiles / 255 - np.array(CLIP_MEAN)[:, None, None]) / np.array(CLIP_STD)[:, None, None]
    result = normalise(tiles)
    assert result.dtype == np.float32
    assert np.abs(result - expected).max() < 2e-7
    assert normalise(np.zeros((0, 3, 4, 4), np.uint8)).shape == (0, 3, 4, 4)

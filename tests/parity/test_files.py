"""The whole way from image files: what `Processor` makes of a sample against transformers' processor, live.

Both sides get the names of the same files and open them on their own.
"""

import numpy as np
import pytest
from PIL import Image

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.processing.processor import Processor
from llavanext_cli.records import Medium, Sample, Turn
from tests.parity.test_processing import SYSTEM, image_processor, load_both, noise

transformers = pytest.importorskip("transformers")

FORMS = {"jpeg": {"quality": 90}, "png": {}, "webp": {"lossless": True}, "tiff": {}}
STORED = {(150, 401): 6, (90, 260): 8, (333, 120): 3}
"""(height, width) in the file → EXIF orientation: a quarter turn either way, and upside down."""


@pytest.fixture
def processors(tmp_path, sentencepiece_model):
    """(ours, transformers' `LlavaNextProcessor`) for one tokenizer folder."""
    from transformers import LlavaNextProcessor

    tokenizer, theirs = load_both(tmp_path, sentencepiece_model, legacy=False)
    arch = Architecture(image_token_index=tokenizer.added["<image>"], video_token_index=tokenizer.added["<video>"])
    whole = LlavaNextProcessor(
        image_processor(arch),
        theirs,
        patch_size=arch.vision.patch_size,
        vision_feature_select_strategy=arch.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )
    return Processor(arch, tokenizer), whole


@pytest.mark.parametrize("form", FORMS)
def test_turned_images_from_files(form, processors, tmp_path):
    from transformers.image_utils import load_image

    ours, theirs = processors
    for number, (size, orientation) in enumerate(STORED.items()):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(noise(*size)).save(tmp_path / f"{number}", form, exif=exif, **FORMS[form])
    names = [f"{number}" for number in range(len(STORED))]
    sample = Sample(
        id="s",
        source="images",
        media=tuple(Medium("image", name) for name in names),
        turns=(Turn("user", "<image>\n<image> and <image>?"), Turn("assistant", "a grey cat")),
    )
    roots = {"images": tmp_path}
    planned = ours.plan_media(sample, roots)  # from the headers
    encoded = ours.encode(sample, roots)

    images = [load_image(str(tmp_path / name)) for name in names]
    text = f"{SYSTEM} USER: <image>\n<image> and <image>? ASSISTANT: a grey cat</s>"
    expected = theirs(images=images, text=text, return_tensors="np")
    sizes = [(401, 150), (260, 90), (333, 120)]
    assert [plan.size for plan in planned] == sizes == [tuple(size) for size in expected["image_sizes"].tolist()]
    assert ours.load_media(sample, roots).plans == planned
    assert encoded.input_ids.tolist() == expected["input_ids"][0].tolist()
    tiles = [
        tile for plan, of_one in zip(planned, expected["pixel_values"], strict=True) for tile in of_one[: plan.tiles]
    ]
    assert np.abs(encoded.tiles - np.stack(tiles)).max() <= 1e-6
    assert not any(of_one[plan.tiles :].any() for plan, of_one in zip(planned, expected["pixel_values"], strict=True))

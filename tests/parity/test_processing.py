"""Processing against transformers, live: token counts, tiles, frames, ids; and labels against the original's rule.

Every comparison is with the library itself (4.57.1), run on the same input; nothing here is a stored number.
"""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.processing.decoding import sample_positions
from llavanext_cli.processing.geometry import plan_tiles
from llavanext_cli.processing.image import build_tiles, load_image, normalise
from llavanext_cli.processing.prompt import MEDIUM, TEXT, build_question_prompt, build_training_prompt
from llavanext_cli.processing.sample_layout import VideoPlan, lay_out
from llavanext_cli.processing.tokenizer import load_tokenizer
from llavanext_cli.processing.video import load_video
from llavanext_cli.records import IGNORE_INDEX, Medium, Sample, Turn
from tests.conftest import train_sentencepiece

transformers = pytest.importorskip("transformers")

ARCH = Architecture()
OTHER_PINPOINTS = tuple((336 * rows, 336 * columns) for rows in range(1, 4) for columns in range(1, 4))


def image_processor(arch: Architecture, **options):
    from transformers import LlavaNextImageProcessor

    side = arch.vision.image_size
    return LlavaNextImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[list(grid) for grid in arch.image_grid_pinpoints],
        **options,
    )


# --- token counts ---


@pytest.mark.parametrize("pinpoints", [ARCH.image_grid_pinpoints, OTHER_PINPOINTS], ids=["five", "nine"])
def test_token_counts_of_random_sizes(pinpoints):
    """200 000 sizes, half of them of every aspect ratio up to 20 000 to 1, and those where transformers' rounded
    doubles part from exact arithmetic."""
    from transformers import LlavaNextVideoProcessor

    arch = Architecture(image_grid_pinpoints=pinpoints)
    random = np.random.default_rng(7)
    half = 100_000 if pinpoints is ARCH.image_grid_pinpoints else 10_000
    usual = random.integers(8, 4000, (2, half))
    extreme = np.exp(random.uniform(0, np.log(20_001), (2, half))).astype(int)
    heights, widths = np.concatenate([usual, extreme], axis=1)
    rounded = np.array([(1133, 567), (1141, 570), (1199, 600), (5089, 10184), (10038, 5020), (1073, 358), (423, 752)])
    heights, widths = np.append(heights, rounded[:, 0]), np.append(widths, rounded[:, 1])
    sizes = list(zip(heights.tolist(), widths.tolist(), strict=True))

    # without its constructor, which wants torchvision; counting needs these three attributes only
    processor = object.__new__(LlavaNextVideoProcessor)
    processor.image_processor = image_processor(arch)
    processor.patch_size, processor.num_additional_image_tokens = arch.vision.patch_size, 0
    expected = [processor._get_number_of_features(height, width, 336, 336) for height, width in sizes]
    assert [plan_tiles(size, arch).tokens for size in sizes] == expected


# --- images ---

SIZES = [
    *[(336, 336), (672, 672), (480, 640), (640, 480), (427, 640), (640, 427), (1080, 1920), (1920, 1080)],
    *[(20, 2000), (2000, 20), (100, 2000), (2000, 100), (5, 700), (700, 5), (16, 16), (2, 2), (4, 9)],
    *[(19, 19), (38, 19), (76, 19), (608, 19), (912, 19), (325, 1800), (50, 900), (75, 25), (21, 784)],
    *[(401, 500), (500, 401), (333, 777), (777, 333), (335, 337), (337, 335), (671, 673), (673, 671)],
    *[(1133, 567), (567, 1133), (1141, 570), (423, 752), (752, 423), (1008, 336), (336, 1008), (1007, 337)],
    *[(99, 101), (150, 151), (512, 512), (511, 1022), (3000, 2000)],
    # Thin and tall only: transformers reads what is 1 or 3 pixels high, before or after it is resized, as an image of
    # so many channels.
    *[(1009, 1), (2017, 2), (20_000, 1), (2, 1)],
]


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, channels), np.uint8)


def compare_tiles(image: Image.Image, given: Image.Image, arch: Architecture = ARCH) -> None:
    """Our tiles of `image` against transformers' of `given`: the bytes, then the normalised floats."""
    tiles = build_tiles(image, plan_tiles((image.height, image.width), arch), arch)
    raw = image_processor(arch, do_rescale=False, do_normalize=False)(given, return_tensors="np")
    assert raw["image_sizes"].tolist() == [[image.height, image.width]]
    assert raw["pixel_values"].dtype == np.uint8
    assert np.array_equal(tiles, raw["pixel_values"][0])
    whole = image_processor(arch)(given, return_tensors="np")["pixel_values"][0]
    assert np.abs(normalise(tiles) - whole).max() <= 1e-6


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tiles_of_sizes(height, width):
    image = Image.fromarray(noise(height, width))
    compare_tiles(image, image)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (19, 19), (101, 60), (30, 200)])
def test_tiles_of_other_architectures(height, width):
    from llavanext_cli.config.architecture import VisionArchitecture

    arch = Architecture(
        vision=VisionArchitecture(image_size=56, patch_size=14), image_grid_pinpoints=((56, 112), (112, 56), (112, 168))
    )
    image = Image.fromarray(noise(height, width))
    compare_tiles(image, image, arch)


@pytest.fixture
def saved(tmp_path):
    """Saves an image in a form; gives its path."""

    def save(image: Image.Image, form: str, **options) -> Path:
        path = tmp_path / f"a.{form}"
        image.save(path, form, **options)
        return path

    return save


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("1", "png"), ("CMYK", "jpeg"), ("L", "jpeg")],
)
def test_tiles_of_modes(mode, form, saved):
    path = saved(Image.fromarray(noise(150, 221)).convert(mode), form)
    stored = Image.open(path)
    assert stored.mode == mode
    compare_tiles(load_image(path), stored)


def test_tiles_of_a_palette_with_a_transparent_colour(saved):
    path = saved(Image.fromarray(noise(90, 121)).quantize(16), "png", transparency=3)
    compare_tiles(load_image(path), Image.open(path))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiles_of_turned_images(orientation, saved):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(noise(120, 201)), "jpeg", exif=exif)
    # as transformers.image_utils.load_image reads files
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    compare_tiles(load_image(path), upright)


SIXTEEN_BITS = np.random.default_rng(0).integers(0, 65536, (60, 90))
DEEP_GREY = {
    "16 bits": (SIXTEEN_BITS.astype(np.uint16), "png", 255),
    "32 bits": (SIXTEEN_BITS.astype(np.int32), "tiff", 255),
    "reals in 0..1": (((SIXTEEN_BITS >> 8) / 255).astype(np.float32), "tiff", 0),
}


@pytest.mark.parametrize("kind", DEEP_GREY)
def test_tiles_of_deep_grey(kind, saved):
    """Scaled to 8 bits here. Given the file as it is, transformers clips it: that difference is meant, and checked."""
    grey, form, clipped = DEEP_GREY[kind]
    path = saved(Image.fromarray(grey), form)
    compare_tiles(load_image(path), Image.fromarray((SIXTEEN_BITS >> 8).astype(np.uint8)))
    theirs = image_processor(ARCH, do_rescale=False, do_normalize=False)(Image.open(path))
    assert (np.asarray(theirs["pixel_values"][0][0]) == clipped).mean() > 0.95


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_tiles_of_eight_bits_in_more(dtype, saved):
    path = saved(Image.fromarray((SIXTEEN_BITS >> 8).astype(dtype)), "tiff")
    compare_tiles(load_image(path), Image.open(path))


def test_tiles_of_a_photograph():
    data = pytest.importorskip("skimage.data")
    image = Image.fromarray(data.astronaut()[:400])
    compare_tiles(image, image)


# --- videos ---


@pytest.mark.parametrize("size", [(96, 128), (128, 96), (240, 426), (340, 336), (336, 336), (338, 600)])
def test_frames(write_clip, size):
    from transformers import LlavaNextVideoImageProcessor

    path = write_clip(frames=12, size=size)
    with av.open(str(path)) as container:
        every = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    wanted = every[sample_positions(12, 5)]
    tiles, _ = load_video(path, 5, ARCH)
    options = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    raw = LlavaNextVideoImageProcessor(do_rescale=False, do_normalize=False, **options)(wanted, return_tensors="np")
    assert raw["pixel_values_videos"].dtype == np.uint8
    assert np.array_equal(tiles, raw["pixel_values_videos"][0])
    whole = LlavaNextVideoImageProcessor(**options)(wanted, return_tensors="np")["pixel_values_videos"][0]
    assert np.abs(normalise(tiles) - whole).max() <= 1e-6


# --- ids ---

MODELS = {
    "llama": {},
    "unigram": {"model_type": "unigram"},
    "nfkc": {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
}


def load_both(folder: Path, model: bytes, legacy: bool):
    """(ours, transformers' `LlamaTokenizer`), both from the folder that transformers writes."""
    from transformers import AddedToken, LlamaTokenizer

    (folder / "source.model").write_bytes(model)
    theirs = LlamaTokenizer(str(folder / "source.model"), legacy=legacy, pad_token="<unk>")
    names = [AddedToken(name, special=True, normalized=False) for name in ("<video>", "<image>")]
    theirs.add_tokens(names, special_tokens=True)
    theirs.save_pretrained(folder / "saved")
    return load_tokenizer(folder / "saved"), theirs


@pytest.fixture(params=[(legacy, kind) for legacy in (True, False) for kind in MODELS], ids=str)
def tokenizers(request, tmp_path):
    legacy, kind = request.param
    return load_both(tmp_path, train_sentencepiece(vocab_size=450, **MODELS[kind]), legacy)


TEXTS = [
    "A chat between a curious user and an assistant.",
    "what is it? a grey cat",
    " leading and trailing ",
    "  two  spaces  ",
    "line\nbreak\r\n\ttab",
    "héllo ½ ﬁne \uff21 wörld",
    "漢字 かな 한글 🐈‍⬛",
    "12345 3.14 -7",
    "a▁b",
    "\n",
    " ",
    "!@#$%^&*()",
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_text(tokenizers, text):
    ours, theirs = tokenizers
    assert ours.encode(text, first=True) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_after_a_special_token(tokenizers, text):
    ours, theirs = tokenizers
    whole = theirs.encode(f"a</s>{text}", add_special_tokens=False)
    assert [*ours.encode("a", first=True), ours.eos_id, *ours.encode(text)] == whole


@pytest.mark.parametrize("text", [t for t in TEXTS if "▁" not in t])
def test_text_of_ids(tokenizers, text):
    ours, theirs = tokenizers
    ids = theirs.encode(text)
    if theirs.legacy and text.startswith(" "):
        # transformers takes one space off before SentencePiece takes another; the space that was typed is kept here
        assert ours.decode(ids).lstrip() == theirs.decode(ids, skip_special_tokens=True).lstrip()
        return
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


# --- whole conversations ---

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
IMAGE, VIDEO = Medium("image", "a.jpg"), Medium("video", "a.mp4")
SMALL_PLANS = {"image": [plan_tiles((20, 2000), ARCH), plan_tiles((100, 2000), ARCH)], "video": [VideoPlan(2)] * 2}

CONVERSATIONS = {
    "text only": (["what is it?", "a grey cat."], []),
    "three rounds": (["what is it?", "a cat", "how many birds?", "three of them", "and?", "they flew away."], []),
    "an image": (["<image>\nwhat is it?", "a grey cat."], [IMAGE]),
    "an image, rounds": (["<image>\nwhat?", "a cat", "grey?", "Yes, grey.", "a ball?", "No"], [IMAGE]),
    "two images": (["<image>\n<image>\ncompare them", "one cat, one ball", "sure?", "Yes"], [IMAGE, IMAGE]),
    "within the text": (["is <image> in <image>?", "no", "really?", "really"], [IMAGE, IMAGE]),
    "an image in each round": (["<image>\nwhat?", "a cat", "<image>\nand?", "a ball"], [IMAGE, IMAGE]),
    "a video": (["<video>\nwhat moves?", "a red ball", "where?", "away"], [VIDEO]),
    "odd characters": (["<image>\n漢字?\n\n 12 ½", "🐈 héllo\nthree", "ok  ?", "3.14!"], [IMAGE]),
}


def as_sample(texts, media) -> Sample:
    roles = ("user", "assistant")
    return Sample("s", "", tuple(media), tuple(Turn(roles[i % 2], text) for i, text in enumerate(texts)))


def plans_of(media) -> list:
    counts = {"image": iter(SMALL_PLANS["image"]), "video": iter(SMALL_PLANS["video"])}
    return [next(counts[medium.kind]) for medium in media]


def joined(texts) -> str:
    """The conversation as one string, the way the original's template writes it."""
    rounds = [f"USER: {texts[i]} ASSISTANT: {texts[i + 1]}</s>" for i in range(0, len(texts), 2)]
    return f"{SYSTEM} {''.join(rounds)}"


def joined_for_mistral(texts) -> str:
    rounds = [f"[INST] {texts[i]} [/INST] {texts[i + 1]} </s>" for i in range(0, len(texts), 2)]
    return "".join(rounds)


FORMS = {"vicuna_v1": joined, "mistral_instruct": joined_for_mistral}


def layout_and_plans(ours, texts, media, form="vicuna_v1"):
    arch = Architecture(image_token_index=ours.added["<image>"], video_token_index=ours.added["<video>"])
    plans = plans_of(media)
    return lay_out(build_training_prompt(as_sample(texts, media), form), plans, ours, arch, "s"), plans


def tokens_of(plan) -> int:
    return plan.tokens if not isinstance(plan, VideoPlan) else plan.frames * 144


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_of_conversations(tokenizers, name, form):
    """As `LlavaNextVideoProcessor` does: a placeholder for each feature, then one call of the tokenizer."""
    ours, theirs = tokenizers
    texts, media = CONVERSATIONS[name]
    layout, plans = layout_and_plans(ours, texts, media, form)
    prompt = FORMS[form](texts)
    for plan in plans:  # each in its turn: <image> -> <placeholder> x tokens, so that the next one is found
        word = "<video>" if isinstance(plan, VideoPlan) else "<image>"
        prompt = prompt.replace(word, f"<{word[1]}>" * tokens_of(plan), 1)
    prompt = prompt.replace("<i>", "<image>").replace("<v>", "<video>")
    assert layout.input_ids.tolist() == theirs(prompt).input_ids


def test_ids_of_the_sentence_in_the_documentation(tokenizers):
    """The one that transformers' documentation of llava_next asks llava-v1.6-mistral."""
    from transformers import LlavaNextForConditionalGeneration

    ours, theirs = tokenizers
    sentence = "[INST] <image>\nWhat is shown in this image? [/INST]"
    assert sentence.replace("\n", "\\n") in LlavaNextForConditionalGeneration.forward.__doc__
    plan = plans_of([IMAGE])[0]
    arch = Architecture(image_token_index=ours.added["<image>"], video_token_index=ours.added["<video>"])
    segments = build_question_prompt(as_sample(["What is shown in this image?"], [IMAGE]), "mistral_instruct")
    layout = lay_out(segments, [plan], ours, arch, "s")
    assert layout.input_ids.tolist() == theirs(sentence.replace("<image>", "<image>" * plan.tokens)).input_ids


def test_ids_through_the_whole_processor(tokenizers):
    """Not by a stand-in: pixels and prompt go through transformers' `LlavaNextProcessor`."""
    from transformers import LlavaNextProcessor

    ours, theirs = tokenizers
    processor = LlavaNextProcessor(
        image_processor(ARCH),
        theirs,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    texts, media = CONVERSATIONS["two images"]
    layout, plans = layout_and_plans(ours, texts, media)
    images = [Image.fromarray(noise(*plan.size)) for plan in plans]
    assert layout.input_ids.tolist() == processor(images=images, text=joined(texts))["input_ids"][0]


# --- labels ---


def labels_of_the_original(tokenizer, conversation: str, ids: list[int], media_tokens: list[int]) -> np.ndarray:
    """The original's rule, derived independently: mask by lengths of rounds that are tokenised apart from each other.

    Cut at the end token. Of each round everything up to and with "ASSISTANT:" is masked, its length being that of the
    head's own tokens without bos and without the space at the end. A later round loses one more token without `legacy`:
    alone it is written " USER", two pieces, inside the conversation "USER", one. Lengths that do not add up mask all.
    """
    labels = np.array(ids)
    at = 1
    labels[:at] = IGNORE_INDEX
    media = iter(media_tokens)
    for number, text in enumerate(part for part in conversation.split("</s>") if part):
        head, *answers = text.split(" ASSISTANT: ")
        if len(answers) != 1:
            break
        head += " ASSISTANT: "
        more = sum(next(media) - 1 for _ in range(text.count("<image>") + text.count("<video>")))
        whole_length = len(tokenizer(text).input_ids) + more
        head_length = len(tokenizer(head).input_ids) - 2 + more
        if number and not tokenizer.legacy:
            whole_length, head_length = whole_length - 1, head_length - 1
        labels[at : at + head_length] = IGNORE_INDEX
        at += whole_length
    labels[at:] = IGNORE_INDEX
    if at != len(ids):
        labels[:] = IGNORE_INDEX
    return labels


@pytest.fixture(params=[True, False], ids=["legacy", "new"])
def llama_tokenizers(request, tmp_path, sentencepiece_model):
    return load_both(tmp_path, sentencepiece_model, request.param)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_labels_of_well_formed_conversations(llama_tokenizers, name):
    ours, theirs = llama_tokenizers
    texts, media = CONVERSATIONS[name]
    layout, plans = layout_and_plans(ours, texts, media)
    expected = labels_of_the_original(theirs, joined(texts), layout.input_ids.tolist(), [tokens_of(p) for p in plans])
    assert (expected != IGNORE_INDEX).any()
    assert layout.labels.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "answer", ["Say ASSISTANT: and wait.", "It ends with </s> always.", "a </s>USER: b ASSISTANT: c"]
)
def test_where_the_original_masks_everything_nothing_is_lost(llama_tokenizers, answer):
    ours, theirs = llama_tokenizers
    texts = ["how?", answer, "and then?", "a cat"]
    layout, _ = layout_and_plans(ours, texts, [])
    learned = layout.labels[layout.labels != IGNORE_INDEX]
    assert theirs.decode(learned).lstrip() == f"{answer}</s> a cat</s>"
    assert (layout.input_ids == ours.eos_id).sum() == 2
    theirs_ids = theirs(joined(texts)).input_ids
    original = labels_of_the_original(theirs, joined(texts), theirs_ids, [])
    assert (original != IGNORE_INDEX).sum() < len(learned)


def test_segments_hold_the_answers_and_no_more(llama_tokenizers):
    segments = build_training_prompt(as_sample(*CONVERSATIONS["an image, rounds"]))
    assert [s.text for s in segments if s.kind == TEXT and s.supervised] == [" a cat", " Yes, grey.", " No"]
    assert not any(s.supervised for s in segments if s.kind == MEDIUM)

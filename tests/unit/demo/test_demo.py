"""What the demo draws, asks and scores."""

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
from PIL import Image

from llavanext_cli.config.presets import load_preset
from llavanext_cli.demo.data import QUICK, make_data, squash_image
from llavanext_cli.demo.images import CELL, PATTERNS, TAG_SIZE, DemoImage, Tag, draw_image, plan_image
from llavanext_cli.demo.model import ARCHITECTURE, TILE, write_model
from llavanext_cli.demo.questions import CONTROL_KIND, IMAGE_KINDS, VIDEO_KINDS, ask_about_image, ask_about_video
from llavanext_cli.demo.report import Row, Scored, build_rows, find_shortfalls
from llavanext_cli.demo.videos import FRAMES, draw_frame, plan_video, write_video
from llavanext_cli.processing.geometry import plan_tiles
from llavanext_cli.processing.image import build_tiles


def answers_by_kind(count: int, held_out: bool) -> dict[str, dict[str, int]]:
    rng = random.Random(0)
    found: dict[str, dict[str, int]] = {kind: {} for kind in (*IMAGE_KINDS, *VIDEO_KINDS)}
    for _ in range(count):
        for question in [
            *ask_about_image(plan_image(rng, held_out), rng),
            *ask_about_video(plan_video(rng)),
        ]:
            found[question.kind][question.answer] = found[question.kind].get(question.answer, 0) + 1
    return found


@pytest.mark.parametrize("held_out", [False, True])
def test_no_constant_answer_is_right_much_more_often_than_one_time_in_four(held_out):
    for kind, answers in answers_by_kind(4000, held_out).items():
        assert len(answers) == 4, kind
        assert max(answers.values()) < 0.32 * sum(answers.values()), kind


def test_the_same_seed_draws_the_same_image():
    first, second, other = (plan_image(random.Random(seed), held_out=True) for seed in (1, 1, 2))
    assert first == second != other
    assert draw_image(first).tobytes() == draw_image(second).tobytes()


@pytest.mark.parametrize("corner", [(0, 0), (0, 3 * CELL), (CELL, CELL), (3 * CELL, 2 * CELL)])
def test_only_a_tile_shows_a_tags_pattern(corner):
    """In the base tile all patterns are the same grey, to four levels of 255; in the tiles they are far apart."""
    base, tiles = [], []
    for pattern in PATTERNS:
        image = draw_image(DemoImage(TAG_SIZE, (), Tag(pattern, corner)))
        stack = build_tiles(image, plan_tiles(TAG_SIZE, ARCHITECTURE), ARCHITECTURE).astype(int)
        base.append(stack[0])
        tiles.append(stack[1:])
    for one, other in itertools.combinations(range(len(PATTERNS)), 2):
        assert np.abs(base[one] - base[other]).max() <= 4
        assert np.abs(tiles[one] - tiles[other]).max() >= 80


def test_no_held_out_tag_is_trained_on():
    rng = random.Random(7)
    tags = {held_out: {plan_image(rng, held_out).tag for _ in range(4000)} for held_out in (False, True)}
    assert len(tags[True] - {None}) == 16
    assert len(tags[False] - {None}) == 48
    assert tags[True] & tags[False] == {None}


def test_a_moving_sign_goes_where_the_answer_says():
    rng = random.Random(3)
    moves = [video for video in (plan_video(rng) for _ in range(60)) if video.kind == "move"]
    assert {video.answer for video in moves} == {"left", "right", "up", "down"}
    for video in moves:
        (_, _, first), (_, _, last) = video.frames[0], video.frames[-1]
        step = np.subtract(last, first)
        expected = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}[video.answer]
        assert (step == np.array(expected) * CELL).all()


def test_a_written_video_has_the_frames_of_its_plan(tmp_path):
    from llavanext_cli.processing.video import read_frames

    video = plan_video(random.Random(5))
    write_video(tmp_path / "video.mp4", video)
    frames, seconds = read_frames(tmp_path / "video.mp4", FRAMES)
    assert frames.shape == (FRAMES, TILE, TILE, 3)
    assert seconds[-1] == pytest.approx((FRAMES - 1) / 8)
    drawn = np.stack([np.asarray(draw_frame(shown, video.ground)) for shown in video.frames]).astype(int)
    assert np.abs(frames.astype(int) - drawn).mean() < 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of a demo's data, and the sentences for its tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    sizes = dataclasses.replace(QUICK, images=600, videos=8, test_images=60, test_videos=2)
    return folder, sizes, make_data(folder, sizes, seed=0)


def test_the_data_sets_are_laid_out_like_the_public_ones(data):
    folder, sizes, sentences = data
    images = json.loads((folder / "images" / "images.json").read_text())
    assert len(images) == sizes.images
    assert images[0]["conversations"][0]["value"].startswith("<image>\n")
    assert Image.open(folder / "images" / images[0]["image"]).size[0] in (48, 72, 96, 144)
    videos = json.loads((folder / "videos" / "videos.json").read_text())
    assert len(videos) == sizes.videos
    assert (folder / "videos" / videos[0]["video"]).stat().st_size > 0
    kinds = json.loads((folder / "kinds.json").read_text())
    assert {record["id"] for record in json.loads((folder / "test.json").read_text())} == kinds.keys()
    assert any("What colour is the sign?" in sentence for sentence in sentences)


def test_no_image_asked_about_is_trained_on(data):
    def pixels(files):
        return {(image.size, image.tobytes()) for image in map(Image.open, files)}

    asked = pixels((data[0] / "test").glob("*.png"))
    assert len(asked) > 40
    assert not asked & pixels((data[0] / "images" / "train").glob("*.png"))


def test_a_squashed_tag_keeps_its_tokens_and_loses_its_pattern():
    images = []
    for pattern in PATTERNS:
        image = draw_image(DemoImage(TAG_SIZE, (), Tag(pattern, (CELL, CELL))))
        images.append(np.asarray(squash_image(image)).astype(int))
    assert images[0].shape == (*TAG_SIZE, 3)
    assert max(np.abs(one - other).max() for one, other in itertools.combinations(images, 2)) <= 5


def test_convert_reads_the_random_model_and_the_presets_describe_it(tmp_path, data):
    from llavanext_cli.weights.checkpoint import open_checkpoint
    from llavanext_cli.weights.convert import run_convert
    from llavanext_cli.weights.request import ConvertRequest

    write_model(tmp_path / "random", data[2], seed=0)
    run_convert(ConvertRequest(tmp_path / "random", tmp_path / "base"))
    assert open_checkpoint(tmp_path / "base").architecture == ARCHITECTURE
    for name in ("tiny-stage2", "tiny-stage3", "tiny-ask"):
        assert load_preset(name).model == ARCHITECTURE


def scored(kind: str, pairs: list[tuple[str, str]]) -> list[Scored]:
    return [Scored("m", kind, "?", expected, answer) for expected, answer in pairs]


def test_accuracy_stands_beside_the_best_constant_answer():
    answers = scored("colour", [("red", "red"), ("red", "blue"), ("blue", " blue "), ("green", "green")])
    answers += scored("move", [("left", "left"), ("up", "left")])
    rows = {row.kind: row for row in build_rows(answers)}
    assert (rows["colour"].asked, rows["colour"].right, rows["colour"].constant) == (4, 3, 0.5)
    assert (rows["images"].accuracy, rows["videos"].accuracy) == (0.75, 0.5)
    assert rows["videos"].constant == 0.5


def test_the_control_does_not_count_for_the_images_and_must_fail():
    answers = scored("anyres", [("plain", "plain"), ("vertical", "vertical")])
    answers += scored(CONTROL_KIND, [("plain", "plain"), ("vertical", "plain")])
    rows = {row.kind: row for row in build_rows(answers)}
    assert rows["images"].asked == 2
    assert rows[CONTROL_KIND].accuracy == 0.5
    assert not find_shortfalls([rows[CONTROL_KIND]])
    leaky = find_shortfalls([Row(CONTROL_KIND, 10, 8, 0.3)])
    assert leaky == [f"{CONTROL_KIND}: accuracy 0.800, expected at most 0.5"]


def test_a_model_that_learned_too_little_is_reported():
    good = [Row("colour", 100, 99, 0.3), Row("images", 100, 96, 0.3), Row("videos", 100, 90, 0.3)]
    assert find_shortfalls(good) == []
    faults = find_shortfalls([Row("count", 10, 5, 0.3), Row("images", 100, 90, 0.3), Row("videos", 100, 84, 0.3)])
    assert [fault.split(":")[0] for fault in faults] == ["count", "images", "videos"]

"""What the demo draws, asks and scores."""

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
from PIL import Image

from llavanext_cli.config.presets import load_preset
from llavanext_cli.demo.clips import CLIP_FRAMES, draw_frame, plan_clip, write_clip
from llavanext_cli.demo.data import QUICK, make_data, squash_picture
from llavanext_cli.demo.model import ARCHITECTURE, TILE, write_model
from llavanext_cli.demo.pictures import CELL, PATTERNS, TAG_SIZE, Picture, Tag, draw_picture, plan_picture
from llavanext_cli.demo.questions import CLIP_KINDS, CONTROL_KIND, PICTURE_KINDS, ask_about_clip, ask_about_picture
from llavanext_cli.demo.report import Row, Scored, build_rows, find_shortfalls
from llavanext_cli.processing.geometry import plan_tiles
from llavanext_cli.processing.image import build_tiles


def answers_by_kind(count: int, held_out: bool) -> dict[str, dict[str, int]]:
    rng = random.Random(0)
    found: dict[str, dict[str, int]] = {kind: {} for kind in (*PICTURE_KINDS, *CLIP_KINDS)}
    for _ in range(count):
        for question in [
            *ask_about_picture(plan_picture(rng, held_out), rng),
            *ask_about_clip(plan_clip(rng)),
        ]:
            found[question.kind][question.answer] = found[question.kind].get(question.answer, 0) + 1
    return found


@pytest.mark.parametrize("held_out", [False, True])
def test_no_constant_answer_is_right_much_more_often_than_one_time_in_four(held_out):
    for kind, answers in answers_by_kind(4000, held_out).items():
        assert len(answers) == 4, kind
        assert max(answers.values()) < 0.32 * sum(answers.values()), kind


def test_the_same_seed_draws_the_same_picture():
    first, second, other = (plan_picture(random.Random(seed), held_out=True) for seed in (1, 1, 2))
    assert first == second != other
    assert draw_picture(first).tobytes() == draw_picture(second).tobytes()


@pytest.mark.parametrize("corner", [(0, 0), (0, 3 * CELL), (CELL, CELL), (3 * CELL, 2 * CELL)])
def test_only_a_tile_shows_a_tags_pattern(corner):
    """In the base tile all patterns are the same grey, to four levels of 255; in the tiles they are far apart."""
    base, tiles = [], []
    for pattern in PATTERNS:
        picture = draw_picture(Picture(TAG_SIZE, (), Tag(pattern, corner)))
        stack = build_tiles(picture, plan_tiles(TAG_SIZE, ARCHITECTURE), ARCHITECTURE).astype(int)
        base.append(stack[0])
        tiles.append(stack[1:])
    for one, other in itertools.combinations(range(len(PATTERNS)), 2):
        assert np.abs(base[one] - base[other]).max() <= 4
        assert np.abs(tiles[one] - tiles[other]).max() >= 80


def test_no_held_out_tag_is_trained_on_in_any_shade():
    rng = random.Random(7)
    tags = {held_out: {plan_picture(rng, held_out).tag for _ in range(4000)} for held_out in (False, True)}
    assert len(tags[True] - {None}) == 16
    assert len(tags[False] - {None}) == 48
    assert tags[True] & tags[False] == {None}


def test_a_moving_sign_goes_where_the_answer_says():
    rng = random.Random(3)
    moves = [clip for clip in (plan_clip(rng) for _ in range(60)) if clip.kind == "move"]
    assert {clip.answer for clip in moves} == {"left", "right", "up", "down"}
    for clip in moves:
        (_, _, first), (_, _, last) = clip.frames[0], clip.frames[-1]
        step = np.subtract(last, first)
        expected = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}[clip.answer]
        assert (step == np.array(expected) * CELL).all()


def test_a_clip_is_a_clip(tmp_path):
    from llavanext_cli.processing.video import read_frames

    clip = plan_clip(random.Random(5))
    write_clip(tmp_path / "clip.mp4", clip)
    frames, seconds = read_frames(tmp_path / "clip.mp4", CLIP_FRAMES)
    assert frames.shape == (CLIP_FRAMES, TILE, TILE, 3)
    assert seconds[-1] == pytest.approx((CLIP_FRAMES - 1) / 8)
    drawn = np.stack([np.asarray(draw_frame(shown, clip.ground)) for shown in clip.frames]).astype(int)
    assert np.abs(frames.astype(int) - drawn).mean() < 6


def test_the_data_sets_are_laid_out_like_the_public_ones(tmp_path):
    sentences = make_data(tmp_path, QUICK, seed=0)
    pictures = json.loads((tmp_path / "pictures" / "pictures.json").read_text())
    assert len(pictures) == QUICK.pictures
    assert pictures[0]["conversations"][0]["value"].startswith("<image>\n")
    assert Image.open(tmp_path / "pictures" / pictures[0]["image"]).size[0] in (48, 72, 96, 144)
    clips = json.loads((tmp_path / "clips" / "clips.json").read_text())
    assert len(clips) == QUICK.clips
    assert (tmp_path / "clips" / clips[0]["video"]).stat().st_size > 0
    kinds = json.loads((tmp_path / "kinds.json").read_text())
    assert {record["id"] for record in json.loads((tmp_path / "test.json").read_text())} == kinds.keys()
    assert any("What colour is the sign?" in sentence for sentence in sentences)


def test_no_file_asked_about_shows_what_a_training_file_shows(tmp_path):
    make_data(tmp_path, dataclasses.replace(QUICK, pictures=600, clips=8, test_pictures=60, test_clips=2), seed=0)

    def pixels(files):
        return {(image.size, image.tobytes()) for image in map(Image.open, files)}

    asked = pixels((tmp_path / "test").glob("*.png"))
    assert len(asked) > 40
    assert not asked & pixels((tmp_path / "pictures" / "train").glob("*.png"))


def test_a_squashed_tag_keeps_its_tokens_and_loses_its_pattern():
    pictures = []
    for pattern in PATTERNS:
        picture = draw_picture(Picture(TAG_SIZE, (), Tag(pattern, (CELL, CELL))))
        pictures.append(np.asarray(squash_picture(picture)).astype(int))
    assert pictures[0].shape == (*TAG_SIZE, 3)
    assert max(np.abs(one - other).max() for one, other in itertools.combinations(pictures, 2)) <= 5


def test_the_first_model_is_one_that_convert_takes_and_the_presets_describe(tmp_path):
    from llavanext_cli.weights.checkpoint import open_checkpoint
    from llavanext_cli.weights.convert import run_convert
    from llavanext_cli.weights.request import ConvertRequest

    write_model(tmp_path / "random", make_data(tmp_path / "data", QUICK, seed=0), seed=0)
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
    assert (rows["pictures"].accuracy, rows["clips"].accuracy) == (0.75, 0.5)
    assert rows["clips"].constant == 0.5


def test_the_control_is_no_part_of_the_pictures_and_must_fail():
    answers = scored("anyres", [("plain", "plain"), ("vertical", "vertical")])
    answers += scored(CONTROL_KIND, [("plain", "plain"), ("vertical", "plain")])
    rows = {row.kind: row for row in build_rows(answers)}
    assert rows["pictures"].asked == 2
    assert rows[CONTROL_KIND].accuracy == 0.5
    assert not [fault for fault in find_shortfalls([rows[CONTROL_KIND]]) if fault]
    leaky = find_shortfalls([Row(CONTROL_KIND, 10, 8, 0.3)])
    assert leaky == [f"{CONTROL_KIND}: accuracy 0.800, expected at most 0.5"]


def test_a_model_that_learned_too_little_is_said_to():
    good = [Row("colour", 100, 99, 0.3), Row("pictures", 100, 96, 0.3), Row("clips", 100, 90, 0.3)]
    assert find_shortfalls(good) == []
    faults = find_shortfalls([Row("count", 10, 5, 0.3), Row("pictures", 100, 90, 0.3), Row("clips", 100, 84, 0.3)])
    assert [fault.split(":")[0] for fault in faults] == ["count", "pictures", "clips"]

"""The demo's data sets on disk: media, records in the layouts of the public data sets, and mix files.

DIR/data/images/{images.json, train/0001.png …}     records as in LLaVA-Instruct-150K
DIR/data/videos/{videos.json, train/0001.mp4 …}     records as in LLaVA-Video-178K
DIR/data/stage2.yaml, stage3.yaml                   what `llavanext mix` reads
DIR/data/test.json, test/…, kinds.json              questions about media that are not trained on, and their kinds

What is asked about is planned first, and training leaves those plans out.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from llavanext_cli.demo.images import DemoImage, draw_image, plan_image
from llavanext_cli.demo.model import TILE
from llavanext_cli.demo.questions import CONTROL_KIND, Question, ask_about_image, ask_about_video
from llavanext_cli.demo.videos import DemoVideo, plan_video, write_video
from llavanext_cli.processing.prompt import SYSTEM

Progress = Callable[[int, int], None]
Plan = TypeVar("Plan", DemoImage, DemoVideo)


@dataclass(frozen=True)
class Sizes:
    """Numbers of images and videos to train on and to be asked about, and of steps of the two stages."""

    images: int = 3000
    videos: int = 1200
    test_images: int = 240
    test_videos: int = 120
    steps_stage2: int = 550
    steps_stage3: int = 180


QUICK = Sizes(images=64, videos=32, test_images=12, test_videos=6, steps_stage2=6, steps_stage3=4)


def make_data(folder: Path, sizes: Sizes, seed: int, progress: Progress | None = None) -> list[str]:
    """Write all data below `folder`.

    Returns:
        Sentences for the tokenizer: every question and answer in its prompt.
    """
    rng, test_rng = random.Random(f"{seed}/train"), random.Random(f"{seed}/test")
    total = sizes.images + sizes.videos + sizes.test_images + sizes.test_videos
    for name in ("images/train", "videos/train", "test"):
        (folder / name).mkdir(parents=True)

    test_images = [plan_image(test_rng, held_out=True) for _ in range(sizes.test_images)]
    test_videos = [plan_video(test_rng) for _ in range(sizes.test_videos)]
    held_out = {*test_images, *test_videos}

    asked: list[Question] = []
    records = []
    for number in range(sizes.images):
        image = _plan_other(lambda: plan_image(rng, held_out=False), held_out)
        file = f"train/{number:04d}.png"
        draw_image(image).save(folder / "images" / file)
        questions = ask_about_image(image, rng)
        records.append(_record(f"image-{number:04d}", "image", file, questions))
        asked += questions
        _report(progress, number + 1, total)
    _write_json(folder / "images" / "images.json", records)

    records = []
    for number in range(sizes.videos):
        video = _plan_other(lambda: plan_video(rng), held_out)
        file = f"train/{number:04d}.mp4"
        write_video(folder / "videos" / file, video)
        questions = ask_about_video(video)
        records.append(_record(f"video-{number:04d}", "video", file, questions))
        asked += questions
        _report(progress, sizes.images + number + 1, total)
    _write_json(folder / "videos" / "videos.json", records)

    _write_test(folder, test_images, test_videos, test_rng)
    _report(progress, total, total)
    (folder / "stage2.yaml").write_text(_mix(("images/images.json", "all")))
    # Stage 3 learns from videos; some of the images stay, so that they are not forgotten.
    (folder / "stage3.yaml").write_text(_mix(("videos/videos.json", "all"), ("images/images.json", "random:30%")))
    (folder / "test.yaml").write_text(_mix(("test.json", "all")))
    return _sentences(asked)


def _plan_other(plan: Callable[[], Plan], held_out: set[DemoImage | DemoVideo]) -> Plan:
    """The first plan that is not held out."""
    while (planned := plan()) in held_out:
        pass
    return planned


def _write_test(folder: Path, images: list[DemoImage], videos: list[DemoVideo], rng: random.Random) -> None:
    """Media and records to be asked about, one question each, and the kinds of the questions."""
    kinds, records = {}, []

    def ask(name: str, kind: str, medium: str, file: str, question: Question) -> None:
        kinds[name] = kind
        records.append(_record(name, medium, file, [question]))

    for number, plan in enumerate(images):
        name, file = f"image-{number:04d}", f"test/image-{number:04d}.png"
        image = draw_image(plan)
        image.save(folder / file)
        for question in ask_about_image(plan, rng):
            ask(f"{name}-{question.kind}", question.kind, "image", file, question)
            if question.kind == "anyres":
                squashed = file.replace(".png", "-squashed.png")
                squash_image(image).save(folder / squashed)
                ask(f"{name}-squashed", CONTROL_KIND, "image", squashed, question)
    for number, video in enumerate(videos):
        name, file = f"video-{number:04d}", f"test/video-{number:04d}.mp4"
        write_video(folder / file, video)
        for question in ask_about_video(video):
            ask(f"{name}-{question.kind}", question.kind, "video", file, question)
    _write_json(folder / "test.json", records)
    _write_json(folder / "kinds.json", kinds)


def squash_image(image: Image.Image) -> Image.Image:
    """The image scaled to the size of the base tile and back: as many tokens, but no more detail than that tile has."""
    return image.resize((TILE, TILE), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)


def _record(name: str, kind: str, file: str, questions: list[Question]) -> dict:
    """A record as in the public data sets, where the placeholder is `<image>` for videos too."""
    conversation = []
    for number, question in enumerate(questions):
        place = "<image>\n" if number == 0 else ""
        conversation.append({"from": "human", "value": place + question.text})
        conversation.append({"from": "gpt", "value": question.answer})
    return {"id": name, kind: file, "conversations": conversation}


def _mix(*parts: tuple[str, str]) -> str:
    lines = ["datasets:"]
    for path, strategy in parts:
        lines += [f"  - json_path: {path}", f"    sampling_strategy: {strategy}"]
    return "\n".join(lines) + "\n"


def _sentences(asked: list[Question]) -> list[str]:
    """Each question and answer in its prompt, often enough that words become pieces, and each printable character."""
    prompts = {f"{SYSTEM} USER: {q.text} ASSISTANT: {q.answer}" for q in asked}
    return sorted(prompts) * 20 + list(string.printable.strip())


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress:
        progress(done, total)

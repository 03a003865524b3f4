"""The demo's data sets on disk: media, raw records in the layouts of the public data sets, and mix files.

DIR/data/pictures/{pictures.json, train/0001.png …}     records as in LLaVA-Instruct-150K
DIR/data/clips/{clips.json, train/0001.mp4 …}           records as in LLaVA-Video-178K
DIR/data/stage2.yaml, stage3.yaml                       what `llavanext mix` takes
DIR/data/test.json, test/…                              questions about pictures and clips never trained on

What is asked about is planned first, and training leaves those plans out: no medium is in both.
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

from llavanext_cli.demo.clips import Clip, plan_clip, write_clip
from llavanext_cli.demo.model import TILE
from llavanext_cli.demo.pictures import Picture, draw_picture, plan_picture
from llavanext_cli.demo.questions import CONTROL_KIND, Question, ask_about_clip, ask_about_picture
from llavanext_cli.processing.prompt import SYSTEM

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sizes:
    """How much is made: pictures and clips to train on and to be asked about, and steps of the two stages."""

    pictures: int = 3000
    clips: int = 1200
    test_pictures: int = 240
    test_clips: int = 120
    steps_stage2: int = 550
    steps_stage3: int = 180


QUICK = Sizes(pictures=64, clips=32, test_pictures=12, test_clips=6, steps_stage2=6, steps_stage3=4)


def make_data(folder: Path, sizes: Sizes, seed: int, progress: Progress | None = None) -> list[str]:
    """Make everything below `folder`.

    Returns:
        Sentences for the tokenizer: every question and answer, and the prompt around them.
    """
    rng = random.Random(f"{seed}/train")
    tests = random.Random(f"{seed}/test")
    total = sizes.pictures + sizes.clips + sizes.test_pictures + sizes.test_clips
    done = 0

    def made() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    asked_pictures = [plan_picture(tests, held_out=True) for _ in range(sizes.test_pictures)]
    asked_clips = [plan_clip(tests) for _ in range(sizes.test_clips)]
    taken: set[Picture | Clip] = {*asked_pictures, *asked_clips}

    asked: list[Question] = []
    records = []
    for number in range(sizes.pictures):
        picture = _plan_another(lambda: plan_picture(rng, held_out=False), taken)
        file = f"train/{number:04d}.png"
        _save_picture(folder / "pictures" / file, draw_picture(picture))
        questions = ask_about_picture(picture, rng)
        records.append(_record(f"picture-{number:04d}", "image", file, questions))
        asked += questions
        made()
    _write_json(folder / "pictures" / "pictures.json", records)

    records = []
    for number in range(sizes.clips):
        clip = _plan_another(lambda: plan_clip(rng), taken)
        file = f"train/{number:04d}.mp4"
        _save_clip(folder / "clips" / file, clip)
        records.append(_record(f"clip-{number:04d}", "video", file, ask_about_clip(clip)))
        asked += ask_about_clip(clip)
        made()
    _write_json(folder / "clips" / "clips.json", records)

    kinds, records = {}, []

    def ask(name: str, kind: str, medium: str, file: str, question: Question) -> None:
        kinds[name] = kind
        records.append(_record(name, medium, file, [question]))

    for number, picture in enumerate(asked_pictures):
        name, file = f"image-{number:04d}", f"test/image-{number:04d}.png"
        image = draw_picture(picture)
        _save_picture(folder / file, image)
        for question in ask_about_picture(picture, tests):
            ask(f"{name}-{question.kind}", question.kind, "image", file, question)
            if question.kind == "anyres":
                squashed = file.replace(".png", "-squashed.png")
                _save_picture(folder / squashed, squash_picture(image))
                ask(f"{name}-squashed", CONTROL_KIND, "image", squashed, question)
        made()
    for number, clip in enumerate(asked_clips):
        name, file = f"video-{number:04d}", f"test/video-{number:04d}.mp4"
        _save_clip(folder / file, clip)
        for question in ask_about_clip(clip):
            ask(f"{name}-{question.kind}", question.kind, "video", file, question)
        made()
    _write_json(folder / "test.json", records)
    _write_json(folder / "kinds.json", kinds)

    (folder / "stage2.yaml").write_text(_mix(("pictures/pictures.json", "all")))
    # Clips are new; some of the pictures stay, so that they are not forgotten.
    (folder / "stage3.yaml").write_text(_mix(("clips/clips.json", "all"), ("pictures/pictures.json", "random:30%")))
    (folder / "test.yaml").write_text(_mix(("test.json", "all")))
    return _sentences(asked)


Plan = TypeVar("Plan", Picture, Clip)


def _plan_another(plan: Callable[[], Plan], taken: set[Picture | Clip]) -> Plan:
    """The first plan that is not taken."""
    while (planned := plan()) in taken:
        pass
    return planned


def squash_picture(picture: Image.Image) -> Image.Image:
    """The picture after a trip through the size of the base tile: as many tokens, and no more than that tile shows."""
    return picture.resize((TILE, TILE), Image.Resampling.BICUBIC).resize(picture.size, Image.Resampling.BICUBIC)


def _save_picture(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _save_clip(path: Path, clip: Clip) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, clip)


def _record(name: str, kind: str, file: str, questions: list[Question]) -> dict:
    """As the public data sets have it: the placeholder is `<image>` for clips too."""
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
    """Every question and answer in its prompt, often enough that words become pieces, and every printable character."""
    prompts = {f"{SYSTEM} USER: {q.text} ASSISTANT: {q.answer}" for q in asked}
    return sorted(prompts) * 20 + list(string.printable.strip())


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

"""The demo's data sets on disk: media, raw records in the layouts of the public data sets, and mix files.

DIR/data/pictures/{pictures.json, train/0001.png …}     records as in LLaVA-Instruct-150K
DIR/data/clips/{clips.json, train/0001.mp4 …}           records as in LLaVA-Video-178K
DIR/data/stage2.yaml, stage3.yaml                       what `llavanext mix` takes
DIR/data/test.json, test/…                              questions about pictures and clips never trained on
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llavanext_cli.demo.clips import plan_clip, write_clip
from llavanext_cli.demo.pictures import draw_picture, plan_picture
from llavanext_cli.demo.questions import Question, ask_about_clip, ask_about_picture
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

    asked: list[Question] = []
    records = []
    for number in range(sizes.pictures):
        questions = _make_picture(folder / "pictures" / "train" / f"{number:04d}.png", rng)
        records.append(_record(f"picture-{number:04d}", "image", f"train/{number:04d}.png", questions))
        asked += questions
        made()
    _write_json(folder / "pictures" / "pictures.json", records)

    records = []
    for number in range(sizes.clips):
        questions = _make_clip(folder / "clips" / "train" / f"{number:04d}.mp4", rng)
        records.append(_record(f"clip-{number:04d}", "video", f"train/{number:04d}.mp4", questions))
        asked += questions
        made()
    _write_json(folder / "clips" / "clips.json", records)

    kinds, records = {}, []
    for media, count, make, suffix in (
        ("image", sizes.test_pictures, _make_picture, "png"),
        ("video", sizes.test_clips, _make_clip, "mp4"),
    ):
        for number in range(count):
            file = f"test/{media}-{number:04d}.{suffix}"
            for question in make(folder / file, tests):
                name = f"{media}-{number:04d}-{question.kind}"
                records.append(_record(name, media, file, [question]))
                kinds[name] = question.kind
            made()
    _write_json(folder / "test.json", records)
    _write_json(folder / "kinds.json", kinds)

    (folder / "stage2.yaml").write_text(_mix(("pictures/pictures.json", "all")))
    # Clips are new; some of the pictures stay, so that they are not forgotten.
    (folder / "stage3.yaml").write_text(_mix(("clips/clips.json", "all"), ("pictures/pictures.json", "random:30%")))
    (folder / "test.yaml").write_text(_mix(("test.json", "all")))
    return _sentences(asked)


def _make_picture(path: Path, rng: random.Random) -> list[Question]:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = plan_picture(rng)
    draw_picture(picture).save(path)
    return ask_about_picture(picture, rng)


def _make_clip(path: Path, rng: random.Random) -> list[Question]:
    path.parent.mkdir(parents=True, exist_ok=True)
    clip = plan_clip(rng)
    write_clip(path, clip)
    return ask_about_clip(clip)


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

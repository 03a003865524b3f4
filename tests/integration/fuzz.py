"""`python fuzz.py TARGET FILE SEED` damages a valid file in many rounds and reads it each time.

SEED and the round decide the damage, so `--only ROUND` repeats one that failed. The exit code is 0 when every round was
read, or refused with an error of ours.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from llavanext_cli.config.model_folder import load_architecture
from llavanext_cli.errors import LlavaNextError

TOKENS = [
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"[]",
    b"{}",
    b'""',
    b"\x00",
    b"\xff\xfe",
    b"9" * 40,
    b"&a *a",
    b"!!python/x",
]
"""Inserted into files, as parsers are easily wrong about them."""


def damage(data: bytes, generator: random.Random) -> bytes:
    """Change, cut, repeat or insert a few bytes."""
    damaged = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 8, 64))):
        place = generator.randrange(len(damaged) + 1) if generator.random() < 0.5 else generator.randrange(64)
        place = min(place, len(damaged))
        kind = generator.randrange(6)
        if kind == 0:
            damaged[place : place + 1] = bytes([generator.randrange(256)])
        elif kind == 1:
            damaged[place : place + generator.choice((1, 4, 100))] = b""
        elif kind == 2:
            damaged[place:place] = damaged[place : place + generator.choice((2, 30, 1000))]
        elif kind == 3:
            damaged[place:place] = generator.choice(TOKENS)
        elif kind == 4:
            damaged[place : place + 4] = generator.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"))
        elif generator.random() < 0.2:
            del damaged[place:]
    return bytes(damaged)


def read_image_file(path: Path) -> None:
    from llavanext_cli.processing.image import load_image, read_image_size

    for read in (read_image_size, load_image):
        refuse(read, path)


def read_video_file(path: Path) -> None:
    from llavanext_cli.processing.video import BACKENDS, build_frame, read_frames

    for backend in BACKENDS[1:]:
        refuse(read_frames, path, 4, backend, partial(build_frame, side=336))


def read_records(path: Path) -> None:
    from llavanext_cli.mixing.pipeline import run_mix
    from llavanext_cli.mixing.request import MixRequest

    mix = path.with_name("mix.yaml")
    mix.write_text(f"datasets: [{{json_path: {path.name}, sampling_strategy: all}}]")
    refuse(run_mix, MixRequest(mix, path.with_name("out.jsonl"), workers=1, force=True))


def read_mix_file(path: Path) -> None:
    from llavanext_cli.mixing.mixfile import load_mix_file

    refuse(load_mix_file, path)


def read_preset(path: Path) -> None:
    from llavanext_cli.config.presets import load_preset

    refuse(load_preset, path)


def read_training_file(path: Path) -> None:
    from llavanext_cli.mixing.samples import read_samples

    refuse(lambda: list(read_samples(path)))


def read_questions(path: Path) -> None:
    from llavanext_cli.inference.inputs import read_inputs

    refuse(lambda: list(read_inputs(path, None).items))


def read_hub_folder(path: Path) -> None:
    refuse(load_architecture, path.parent)


def read_tokenizer(path: Path) -> None:
    from llavanext_cli.processing.tokenizer import load_tokenizer

    refuse(lambda: load_tokenizer(path.parent).encode("what is it? <image>"))


def read_checkpoint(path: Path) -> None:
    from llavanext_cli.weights.checkpoint import open_checkpoint

    refuse(open_checkpoint, path.parent)


def refuse(read: Callable, *arguments, **options) -> None:
    """Call a reader, which may only raise an error of ours that fits a terminal."""
    try:
        read(*arguments, **options)
    except LlavaNextError as error:
        assert error.what and "\n" not in error.what and len(error.what) < 2000, error.what


TARGETS: dict[str, tuple[Callable[[Path], None], int]] = {
    "image": (read_image_file, 400),
    "video": (read_video_file, 60),
    "records": (read_records, 30),
    "mix_file": (read_mix_file, 400),
    "preset": (read_preset, 150),
    "training_file": (read_training_file, 400),
    "questions": (read_questions, 400),
    "config": (read_hub_folder, 400),
    "tokenizer": (read_tokenizer, 150),
    "checkpoint": (read_checkpoint, 150),
}
"""name → (reader, rounds)"""

MEMORY = 2 << 30
"""Most bytes of a process, whatever a file claims: one may claim a video of two hundred million frames."""


def peak_memory() -> int:
    """Bytes. Not `ru_maxrss`, which begins with the memory of the process that started this one."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def main() -> int:
    faulthandler.enable()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("file", type=Path, help="the valid file")
    parser.add_argument("seed", type=int)
    parser.add_argument("--only", type=int, help="one round")
    options = parser.parse_args()
    read, rounds = TARGETS[options.target]
    valid = options.file.read_bytes()
    read(options.file)
    kept = options.file.with_name("valid")
    shutil.copyfile(options.file, kept)
    failed = 0
    for number in range(rounds) if options.only is None else [options.only]:
        print(number, end=" ", flush=True)  # the last number is the round of a crash
        options.file.write_bytes(damage(valid, random.Random(f"{options.seed} {number}")))
        try:
            read(options.file)
        except BaseException:
            failed += 1
            print(f"\nround {number} of {options.target}:\n{traceback.format_exc()}")
    peak = peak_memory()
    print(json.dumps({"failed": failed, "peak": peak}))
    return int(failed > 0 or peak > MEMORY)


if __name__ == "__main__":
    sys.exit(main())

"""Whether `ask --batch` grows: its memory while it answers thousands of small questions with a tiny random model.

    python tests/benchmarks/soak_ask.py --dir FOLDER [--count 2000]

The questions have images of many sizes, videos, text alone, or an image that cannot be read. Prints the resident memory
of the command after every 100 answers. The first quarter, in which graphs are compiled, does not count; exit code 1
when memory grows by more than 5 % after it, or an answer is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

EVERY = 100
MOST_GROWTH = 1.05


def write_inputs(folder: Path, count: int) -> tuple[Path, Path]:
    """A checkpoint and a file of questions."""
    import av
    from PIL import Image

    from llavanext_cli.weights.convert import run_convert
    from llavanext_cli.weights.request import ConvertRequest
    from tests.parity.models import tiny_config, write_hf_folder

    if not (folder / "model").exists():
        run_convert(ConvertRequest(write_hf_folder(folder / "hf", tiny_config({})), folder / "model"))
    rng = np.random.default_rng(0)
    for number in range(20):
        pixels = rng.integers(0, 255, (*rng.integers(20, 200, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    with av.open(str(folder / "video.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in range(30):
            frame = np.full((48, 64, 3), number * 8, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    (folder / "broken.png").write_bytes(b"broken")
    draw = random.Random(0)
    lines = []
    for number in range(count):
        medium = draw.choices([{"image": f"{number % 20}.png"}, {"video": "video.mp4"}, {}], (7, 2, 3))[0]
        if number % 97 == 5:
            medium = {"image": "broken.png"}
        lines.append({"id": str(number), "question": "what is it? " * draw.randint(1, 6)} | medium)
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "model", questions


def resident(pid: int) -> float:
    """Megabytes."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2000)
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    checkpoint, questions = write_inputs(options.dir, options.count)
    out = options.dir / "answers.jsonl"
    out.unlink(missing_ok=True)
    words = ["ask", "--batch", questions, "--out", out, "--checkpoint", checkpoint, "--preset", "tiny-ask"]
    words += ["--max-new-tokens", 8, "--batch-size", 8, "--set", "ask.cache_tokens=512"]
    command = [sys.executable, "-m", "llavanext_cli", *map(str, words)]
    environment = os.environ | {"XDG_CACHE_HOME": str(options.dir / "cache")}
    curve: list[tuple[int, float]] = []
    begun = time.monotonic()
    with subprocess.Popen(command, env=environment) as process:
        while process.poll() is None:
            time.sleep(0.05)
            done = count_lines(out)
            if done // EVERY > (curve[-1][0] // EVERY if curve else 0):
                curve.append((done, resident(process.pid)))
                print(f"{done} answers, {time.monotonic() - begun:.0f} s: {curve[-1][1]:.0f} MB", flush=True)
    assert process.returncode == 0, "the command failed"
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in answered] == list(range(options.count)), "answers are missing"
    assert {line["id"] for line in answered if "error" in line} == {str(n) for n in range(5, options.count, 97)}
    settled = next(memory for done, memory in curve if done >= options.count / 4)
    growth = curve[-1][1] / settled
    print(json.dumps({"settled_mb": round(settled), "end_mb": round(curve[-1][1]), "growth": round(growth, 4)}))
    sys.exit(0 if growth <= MOST_GROWTH else 1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()

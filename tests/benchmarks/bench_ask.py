"""How fast `ask` is on a CPU: beside transformers' `generate`, with the same random weights, float32, two threads.

    python tests/benchmarks/bench_ask.py --dir FOLDER                 both sides, some minutes
    python tests/benchmarks/bench_ask.py --dir FOLDER --side cold     the whole command in a new process

The model: a CLIP tower of 12 layers, 512 wide, and a Llama of 12 layers, 1024 wide, with a vocabulary of 32064. The
question: one image of 480 x 640 (2340 tokens) and a few words, 64 new tokens, greedy; both sides get pixels that are
already cut and normalised. The end-of-sequence row of the output matrix is zero, so no answer ends early. Each side is
a process of its own that answers once to warm up; then they answer in turns, so that a machine that is faster for a
while is so for both, and the median counts. `batch` is eight questions of text, 64 new tokens each, one by one and at
once. `cold` is the whole command in a new process, from its start to the first piece of the answer: with an empty cache
folder, then with the one it left.

Prints one JSON object; exit code 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from turns import Side, send

TOKENS = 64
SIZE = (480, 640)
QUESTION = "what is it? how many birds are there?"
BATCH = 8
THREADS = "2"
SETTINGS = [f"runtime.threads={THREADS}", "model.text.max_position_embeddings=4096", "ask.cache_tokens=4096"]
BOUNDS = {"total": 1.0, "first": 1.0, "batch": 2.0}

CONFIG: dict[str, Any] = {
    "image_token_index": 32001,
    "video_token_index": 32000,
    "vision_config": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "image_size": 336,
        "patch_size": 14,
    },
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "text_config.hidden_size": 1024,
    "text_config.intermediate_size": 2816,
    "text_config.num_hidden_layers": 12,
    "text_config.num_attention_heads": 16,
    "text_config.num_key_value_heads": 16,
    "text_config.vocab_size": 32064,
    "text_config.max_position_embeddings": 4096,
}


def make_model(folder: Path) -> None:
    """Write FOLDER/hf as it would come from the hub, and FOLDER/model as `convert` makes it of that."""
    from safetensors.numpy import load_file, save_file

    from llavanext_cli.weights.convert import run_convert
    from llavanext_cli.weights.request import ConvertRequest
    from tests.parity.models import tiny_config, write_hf_folder

    config = tiny_config({key: value for key, value in CONFIG.items() if key != "vision_config"})
    config["vision_config"] |= CONFIG["vision_config"]
    hf = write_hf_folder(folder / "hf", config)
    (hf / "added_tokens.json").write_text(json.dumps({"<video>": 32000, "<image>": 32001}))
    weights = load_file(hf / "model.safetensors")
    weights["language_model.lm_head.weight"][2] = 0
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    run_convert(ConvertRequest(hf, folder / "model"))


def encode(folder: Path, questions: list[str], image: bool) -> list[Any]:
    from PIL import Image

    from llavanext_cli.processing.processor import Processor
    from llavanext_cli.processing.tokenizer import load_tokenizer
    from llavanext_cli.records import Medium, Sample, Turn
    from llavanext_cli.weights.checkpoint import open_checkpoint

    opened = open_checkpoint(folder / "model")
    processor = Processor(opened.architecture, load_tokenizer(opened.folder))
    path = folder / "image.png"
    if not path.exists():
        Image.fromarray(np.random.RandomState(0).randint(0, 256, (*SIZE, 3)).astype(np.uint8)).save(path)
    media = (Medium("image", str(path)),) if image else ()
    return [processor.encode_question(Sample("", "", media, (Turn("user", text),))) for text in questions]


def batch_questions() -> list[str]:
    return [f"{QUESTION} number {number}" + " and more" * (number % 4) for number in range(BATCH)]


def run_transformers(folder: Path, repeats: int) -> Iterator[dict[str, Any]]:
    import torch
    from transformers import LlavaNextVideoForConditionalGeneration
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """Notes when the first new token came; the prompt is put first."""

        def __init__(self):
            self.times: list[float] = []

        def put(self, value):
            self.times.append(time.perf_counter())

        def end(self):
            pass

    torch.set_num_threads(int(THREADS))
    model = LlavaNextVideoForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.float32).eval()

    def inputs(samples: list[Any]) -> dict[str, Any]:
        length = max(sample.length for sample in samples)
        ids, mask = torch.zeros(len(samples), length, dtype=torch.long), torch.zeros(len(samples), length)
        for row, sample in enumerate(samples):
            ids[row, length - sample.length :] = torch.tensor(sample.input_ids)
            mask[row, length - sample.length :] = 1
        made = {"input_ids": ids, "attention_mask": mask.long()}
        if len(samples[0].tiles):
            made["pixel_values"] = torch.tensor(samples[0].tiles)[None]
            made["image_sizes"] = torch.tensor([SIZE])
        return made

    def answer(samples: list[Any], clock: Clock | None = None) -> list[list[int]]:
        made = inputs(samples)
        with torch.no_grad():
            out = model.generate(**made, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, streamer=clock)
        return out[:, made["input_ids"].shape[1] :].tolist()

    def timed(samples: list[Any]) -> tuple[float, float, list[list[int]]]:
        clock, started = Clock(), time.perf_counter()
        tokens = answer(samples, clock)
        return time.perf_counter() - started, clock.times[1] - started, tokens

    image, batch = encode(folder, [QUESTION], image=True), encode(folder, batch_questions(), image=False)
    timed(image)
    answer(batch)
    yield {}
    for _ in range(repeats):
        yield run_of(*timed(image))
    started = time.perf_counter()
    tokens = answer(batch)
    yield {"batch_seconds": time.perf_counter() - started, "batch_tokens": tokens}


def run_ours(folder: Path, repeats: int) -> Iterator[dict[str, Any]]:
    from llavanext_cli.config.presets import load_preset
    from llavanext_cli.inference.sampling import Sampling
    from llavanext_cli.inference.session import Session
    from llavanext_cli.weights.checkpoint import open_checkpoint

    sampling = Sampling(max_new_tokens=TOKENS)
    preset = load_preset("tiny-ask", SETTINGS)

    def session(batch: int) -> Session:
        kept = {"batch_size": batch}
        return Session(open_checkpoint(folder / "model"), preset, folder / "libraries", **kept)

    def timed(samples: list[Any]) -> tuple[float, float, list[list[int]]]:
        one.cached = None  # the same question again would be in the cache
        started = time.perf_counter()
        answer = one.answer(samples, sampling)[0]
        return time.perf_counter() - started, answer.seconds_to_first, [list(answer.tokens)]

    one, many = session(1), session(BATCH)
    image, questions = encode(folder, [QUESTION], image=True), encode(folder, batch_questions(), image=False)
    timed(image)
    timed([max(questions, key=lambda question: question.length)])
    many.answer(questions, sampling)
    yield {"prompt_tokens": image[0].length}
    for _ in range(repeats):
        yield run_of(*timed(image))
    begun = time.perf_counter()
    answers = many.answer(questions, sampling)
    at_once = time.perf_counter() - begun
    begun = time.perf_counter()
    for question in questions:
        timed([question])
    yield {
        "batch_seconds": at_once,
        "one_by_one_seconds": time.perf_counter() - begun,
        "batch_tokens": [list(answer.tokens) for answer in answers],
    }


def run_of(total: float, first: float, tokens: list[list[int]]) -> dict[str, Any]:
    return {"total": total, "first": first, "tokens": tokens[0]}


def run_cold(folder: Path) -> dict[str, Any]:
    """Seconds from the start of the command to the first piece of its answer, with and without kept graphs."""
    import shutil

    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    encode(folder, [QUESTION], image=True)  # writes the image
    command = [sys.executable, "-m", "llavanext_cli", "ask", QUESTION, "--image", str(folder / "image.png")]
    command += ["--checkpoint", str(folder / "model"), "--preset", "tiny-ask", "--max-new-tokens", str(TOKENS)]
    command += [word for setting in SETTINGS for word in ("--set", setting)]
    made = {}
    for name in ("cold_empty_cache", "cold_kept_graphs"):
        begun = time.perf_counter()
        environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=folder) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            made[name] = time.perf_counter() - begun
            process.stdout.read()
    return made


def run_side(folder: Path, side: str, repeats: int) -> None:
    for step in (run_ours if side == "ours" else run_transformers)(folder, repeats):
        send(step)


def compare(folder: Path, repeats: int) -> dict[str, Any]:
    """Both sides in turns."""
    names, sides, tokens = ("ours", "transformers"), [], 0
    for name in names:  # one after the other: compiling would disturb
        command = [sys.executable, __file__, "--dir", str(folder), "--side", name, "--repeats", str(repeats)]
        sides.append(Side(command))
        tokens = sides[-1].receive().get("prompt_tokens", tokens)
    runs = [[side.step() for side in sides] for _ in range(repeats)]
    batches = [side.step() for side in sides]
    for side in sides:
        side.process.kill()
    for ours, theirs in (*runs, batches):
        for key in ("tokens", "batch_tokens"):
            assert ours.get(key) == theirs.get(key), "the two sides do not answer alike"
    report: dict[str, Any] = {"prompt_tokens": tokens, "ratios": {}}
    for place, name in enumerate(names):
        report[name] = {
            **{key: statistics.median(run[place][key] for run in runs) for key in ("total", "first")},
            "runs": [(round(run[place]["total"], 3), round(run[place]["first"], 3)) for run in runs],
            **{key: value for key, value in batches[place].items() if key != "batch_tokens"},
        }
    ours, theirs = (report[name] for name in names)
    report["ratios"] = {key: ours[key] / theirs[key] for key in ("total", "first")} | {
        "batch": ours["one_by_one_seconds"] / ours["batch_seconds"]
    }
    ratios = report["ratios"]
    report["within_bounds"] = ratios["batch"] >= BOUNDS["batch"] and all(
        ratios[key] <= BOUNDS[key] for key in ("total", "first")
    )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--side", choices=["both", "ours", "transformers", "cold"], default="both")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = THREADS
    if not (options.dir / "model").exists():
        make_model(options.dir)
    if options.side == "cold":
        print(json.dumps(run_cold(options.dir)))
    elif options.side != "both":
        run_side(options.dir, options.side, options.repeats)
    else:
        report = compare(options.dir, options.repeats)
        print(json.dumps(report))
        sys.exit(0 if report["within_bounds"] else 1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()

"""How fast `convert` is, and in how little memory: measured against `cp` of the same bytes on the same disk.

    python tests/benchmarks/bench_convert.py --dir FOLDER                a model of 3 GB, both ways
    python tests/benchmarks/bench_convert.py --dir FOLDER --full         a 7B model, 14 GB; needs 45 GB of disk
    python tests/benchmarks/bench_convert.py --dir FOLDER --transformers and the old way: load it, save it again

The model has the shapes of LLaVA-NeXT-Video-7B (the small one fewer layers) and random bytes as bfloat16. Every run is
a process of its own. Before each the source is dropped from the page cache; after each the result is flushed to the
disk, inside the time that is reported, so that neither side gets away with writing to memory. Prints one JSON object;
exit code 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.hf_config import architecture_to_hf
from llavanext_cli.weights import keymap
from llavanext_cli.weights.stream import Stream, plan_shards, write_safetensors
from llavanext_cli.weights.tensors import GeneratedBytes, PlannedTensor

MEMORY_LIMIT = 200_000_000
CP_LIMIT = 1.2
TRANSFORMERS_LIMIT = 8.0
SMALL_LAYERS = 5
BLOCK = 1 << 22


def make_model(folder: Path, layers: int) -> int:
    """Write a Hugging Face folder of random bytes; returns its size in bytes."""
    architecture = Architecture()
    architecture = replace(architecture, text=replace(architecture.text, num_hidden_layers=layers))
    generator = np.random.Generator(np.random.PCG64(0))

    def random_bytes(nbytes: int) -> Callable:
        def chunks():
            for start in range(0, nbytes, BLOCK):
                yield memoryview(generator.bytes(min(BLOCK, nbytes - start)))

        return chunks

    tensors = []
    for name, shape in keymap.hub_tensors(architecture).items():
        nbytes = int(np.prod(shape)) * 2
        tensors.append(PlannedTensor(name, "BF16", shape, (GeneratedBytes(nbytes, random_bytes(nbytes)),)))
    folder.mkdir(parents=True)
    config = architecture_to_hf(architecture) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    shards = plan_shards(tensors, 5_000_000_000)
    weight_map = {}
    with Stream(0) as stream:
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(folder / file, shard, stream, "pt")
            weight_map |= {tensor.name: file for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    flush(folder)
    return sum(path.stat().st_size for path in folder.iterdir())


def flush(folder: Path) -> None:
    """Bring a folder's files to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def run(command: list[object], source: Path, result: Path, warm: bool = False) -> tuple[float, int]:
    """Run a process on a cold source; returns seconds until its result is on the disk, and its peak memory in bytes.

    With `warm` the source stays in the page cache and so may the result: what the process itself takes, disk aside.
    """
    shutil.rmtree(result, ignore_errors=True)
    if not warm:
        forget(source)
    started = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if not warm:
        flush(result)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(map(str, command))}: {errors.decode()[-2000:]}")
    return seconds, usage.ru_maxrss * 1024


def convert(source: Path, result: Path, *options: str) -> list[object]:
    return [sys.executable, "-m", "llavanext_cli", "convert", source, result, *options]


# As MindFormers' script for this model did: no type is asked for, so everything is float32, on the disk too.
OLD_WAY = """
import sys, pathlib
import mindspore as ms, torch
from transformers import LlavaNextVideoForConditionalGeneration
model = LlavaNextVideoForConditionalGeneration.from_pretrained(sys.argv[1])
parameters = [{"name": name, "data": ms.Tensor(value.detach().numpy())} for name, value in model.named_parameters()]
pathlib.Path(sys.argv[2]).mkdir()
ms.save_checkpoint(parameters, sys.argv[2] + "/model.ckpt")
"""


def measure(folder: Path, layers: int, rounds: int, against_transformers: bool) -> dict:
    source, ours, back, copy = (folder / name for name in ("source", "ours", "back", "copy"))
    nbytes = make_model(source, layers)
    cp = ["cp", "-r", source, copy]
    times: dict[str, list[float]] = {"cp": [], "in": [], "out": []}
    memory = []
    for _ in range(rounds):
        seconds, _ = run(cp, source, copy)
        times["cp"].append(seconds)
        shutil.rmtree(copy)
        for name, command, begin, result in (
            ("in", convert(source, ours), source, ours),
            ("out", convert(ours, back, "--to", "hf"), ours, back),
        ):
            seconds, peak = run(command, begin, result)
            times[name].append(seconds)
            memory.append(peak)
    report = {
        "bytes": nbytes,
        "seconds": {name: round(min(values), 2) for name, values in times.items()},
        "all_seconds": {name: [round(value, 2) for value in values] for name, values in times.items()},
        "in_over_cp": round(min(times["in"]) / min(times["cp"]), 3),
        "out_over_cp": round(min(times["out"]) / min(times["cp"]), 3),
        "peak_memory_bytes": max(memory),
        "verified": same_tensors(source, back),
    }
    if against_transformers:
        shutil.rmtree(back)
        report["transformers"] = against_the_old_way(folder, source, ours, min(times["in"]))
    return report


def against_the_old_way(folder: Path, source: Path, ours: Path, cold: float) -> dict:
    """The old way, cold as above and warm. `cp` bounds what any program can gain on a cold disk."""
    old = folder / "old"
    command = [sys.executable, "-c", OLD_WAY, source, old]
    seconds, peak = run(command, source, old)
    warm_old, _ = run(command, source, old, warm=True)
    shutil.rmtree(old)
    os.sync()
    warm_ours, _ = run(convert(source, ours), source, ours, warm=True)
    return {
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak,
        "times_slower": round(seconds / cold, 2),
        "warm_seconds": round(warm_old, 2),
        "warm_seconds_ours": round(warm_ours, 2),
        "warm_times_slower": round(warm_old / warm_ours, 2),
    }


def same_tensors(left: Path, right: Path) -> bool:
    """Every tensor of the source came back to the bit, read with safetensors' own reader."""
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, Path]:
        return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    if not (right / "model.safetensors.index.json").exists():
        names = dict.fromkeys(tensors(left), "model.safetensors")
    else:
        names = tensors(right)
    if names.keys() != tensors(left).keys():
        return False
    from llavanext_cli.weights.readers import read_folder

    old, new = read_folder(left), read_folder(right)
    for name in names:
        with safe_open(right / names[name], "np") as file:
            if file.get_slice(name).get_shape() != list(old[name].shape):
                return False
        for start in range(0, old[name].nbytes, 1 << 24):
            count = min(1 << 24, old[name].nbytes - start)
            pair = []
            for spec in (old[name], new[name]):
                with open(spec.path, "rb") as file:
                    file.seek(spec.offset + start)
                    pair.append(file.read(count))
            if pair[0] != pair[1]:
                return False
    return True


def faults(report: dict) -> list[str]:
    """The bounds that were missed."""
    found = []
    for direction in ("in", "out"):
        if report[f"{direction}_over_cp"] > CP_LIMIT:
            found.append(f"{direction}: {report[f'{direction}_over_cp']} x cp, at most {CP_LIMIT}")
    if report["peak_memory_bytes"] >= MEMORY_LIMIT:
        found.append(f"{report['peak_memory_bytes']} bytes of memory, at most {MEMORY_LIMIT}")
    if not report["verified"]:
        found.append("the result differs from the source")
    if "transformers" in report and report["transformers"]["times_slower"] < TRANSFORMERS_LIMIT:
        found.append(f"only {report['transformers']['times_slower']} x faster than transformers and save_checkpoint")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="an empty folder on the disk to measure")
    parser.add_argument("--full", action="store_true", help="all 32 layers: 14 GB")
    parser.add_argument("--transformers", action="store_true", help="also measure the old way")
    parser.add_argument(
        "--rounds", type=int, help="repetitions, of which the fastest counts; default 3, or 1 with --full"
    )
    options = parser.parse_args()
    folder = options.dir / "bench_convert"
    folder.mkdir(parents=True)
    try:
        layers = Architecture().text.num_hidden_layers if options.full else SMALL_LAYERS
        report = measure(folder, layers, options.rounds or (1 if options.full else 3), options.transformers)
    finally:
        shutil.rmtree(folder)
    report["faults"] = faults(report)
    print(json.dumps(report, indent=1))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""How fast `llavanext mix` is, beside the data script it replaces, from one run on one machine.

    python tests/benchmarks/bench_mix.py                      the full size: about five minutes on two cores
    python tests/benchmarks/bench_mix.py --records 20000 --videos 20
    python tests/benchmarks/bench_mix.py --records 0          videos only

1. 665 298 records (as many as LLaVA's instruction mix), 4 turns each, one in sixteen without an image, over 2 000
   images: `mix --check exists` against the original's loop: json.load, isfile a record, json.dump with indent.
   Expected: at least 6 times as fast, in at most a tenth of the memory.
2. 300 videos of 5 seconds: `mix --check full`, which decodes 16 frames of each, against the original's check: seek to
   the first and the last frame with OpenCV, one video after the other. Expected: at least 3 times as fast.
3. Records a second and videos a second against the number of workers.

Each side runs in processes of its own, one after the other. Memory is the greatest sum of the resident sizes of all
processes of a side. Files are read once before the first measurement, so that both sides find them in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

TALK = (
    "the a man woman dog cat bicycle red blue small large table window street tree standing holding near behind with "
    "and of in on at looks appears image shows several people background visible scene"
)
WORDS = TALK.split()
IMAGES = 2000
TURNS = 4


@dataclass(frozen=True)
class Measured:
    """Seconds and the greatest resident size in MiB of one side."""

    seconds: float
    mebibytes: float


# ------------------------------------------------------------------------------------------------------------ material


def write_records(folder: Path, count: int) -> Path:
    """A data set in the form of llava_v1_5_mix665k.json; its texts are random words from a fixed seed."""
    from PIL import Image

    images = folder / "coco" / "train2017"
    images.mkdir(parents=True)
    Image.new("RGB", (64, 48), (90, 120, 30)).save(images / "0.jpg")
    content = (images / "0.jpg").read_bytes()
    for number in range(1, IMAGES):
        (images / f"{number}.jpg").write_bytes(content)
    draw = random.Random(0)
    questions = [" ".join(draw.choices(WORDS, k=draw.randint(6, 18))) + "?" for _ in range(997)]
    answers = [" ".join(draw.choices(WORDS, k=draw.randint(4, 110))) + "." for _ in range(1999)]
    path = folder / "llava_v1_5_mix665k.json"
    with path.open("w") as file:
        file.write("[\n")
        for number in range(count):
            has_image = number % 16 != 0
            record: dict = {"id": f"{number:012d}"}
            if has_image:
                record["image"] = f"coco/train2017/{draw.randrange(IMAGES)}.jpg"
            record["conversations"] = [
                {"from": "human", "value": draw.choice(questions)}
                if turn % 2 == 0
                else {"from": "gpt", "value": draw.choice(answers)}
                for turn in range(TURNS)
            ]
            if has_image:
                record["conversations"][0]["value"] = "<image>\n" + record["conversations"][0]["value"]
            else:
                record["model"] = ""
            file.write(json.dumps(record, indent=2) + (",\n" if number < count - 1 else "\n"))
        file.write("]\n")
    return path


def write_videos(folder: Path, count: int) -> Path:
    """`count` H.264 videos of 5 s, 30 frames a second, 320 x 240, with the encoder's own settings."""
    import av
    import numpy as np

    (folder / "academic_source").mkdir(parents=True)
    rows, columns = np.mgrid[:240, :320]
    records = []
    for number in range(count):
        name = f"academic_source/{number}.mp4"
        waves = [127 + 100 * np.sin(columns / (20 + 5 * k) + k) * np.cos(rows / (30 + k) + number) for k in range(3)]
        scene = np.stack(waves, axis=-1).astype(np.uint8)
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for frame in range(150):
                image = np.roll(scene, frame // 2, axis=1)
                left = (40 + number + frame * 3) % 280
                image[80:120, left : left + 40] = (255, 30, 30)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        turns = [{"from": "human", "value": "<image>\nWhat moves?"}, {"from": "gpt", "value": "A red square."}]
        records.append({"id": str(number), "data_source": "bench", "video": name, "conversations": turns})
    path = folder / "0_30_s_academic_oe_v0_1_qa_processed.json"
    path.write_text(json.dumps(records))
    return path


def write_mix_file(path: Path, data: Path) -> Path:
    path.write_text(f"datasets:\n  - json_path: {data}\n    sampling_strategy: all\n")
    return path


# ----------------------------------------------------------------------------------------------------------- the sides


def original_loop(data: Path, out: Path) -> None:
    """The original's data script: everything in memory, one file test a record, an indented dump."""
    with data.open() as file:
        records = json.load(file)
    folder, samples = str(data.parent), []
    opening, closing = "<|reserved_special_token_3|>", "<|reserved_special_token_4|>"
    for record in records:
        conversation = record["conversations"]
        media = ""
        if "image" in record:
            if not os.path.isfile(os.path.join(folder, record["image"])):
                continue
            media = os.path.join(folder, record["image"])
        conversation[0]["value"] = f"{opening}{media}{closing}{conversation[0]['value']}"
        for turn in conversation:
            if opening not in turn["value"]:
                turn["value"] = "<text>" + turn["value"]
        samples.append({"conversations": conversation})
    with out.open("w") as file:
        json.dump(samples, file, indent=2, ensure_ascii=False)


def original_videos(data: Path) -> None:
    """The original's check of a video: seek to the first and to the last frame and read them."""
    import cv2
    import numpy as np

    for record in json.loads(data.read_text()):
        capture = cv2.VideoCapture(str(data.parent / record["video"]))
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        for position in np.linspace(0, total - 1, 2, dtype=np.int32):
            capture.set(cv2.CAP_PROP_POS_FRAMES, int(position))
            found, _ = capture.read()
            if not found:
                print("unreadable", record["video"], file=sys.stderr)
        capture.release()


def mix_command(mix_file: Path, out: Path, check: str, workers: int) -> list[str]:
    options = ["--out", str(out), "--check", check, "--workers", str(workers), "--json"]
    return [sys.executable, "-m", "llavanext_cli", "mix", str(mix_file), *options]


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(command: list[str]) -> tuple[Measured, str]:
    """Run a command to its end; returns what it took, and its stdout."""
    os.sync()  # what the one before wrote is not this one's to wait for
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        # Seldom after the start: walking through /proc takes time from a side that uses every core.
        while not done.wait(0.02 if time.monotonic() - started < 1 else 0.2):
            peak = max(peak, resident(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = process.communicate()
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors}")
    return Measured(seconds, peak / 2**20), output


def resident(root: int) -> float:
    """Bytes in memory of a process and all of its descendants."""
    parents, sizes = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                sizes[int(entry.name)] = int((entry / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                parents[int(entry.name)] = int(fields[1])
            except OSError:  # it ended meanwhile
                continue
    total = 0.0
    for pid, size in sizes.items():
        ancestor = pid
        while ancestor not in (0, root):
            ancestor = parents.get(ancestor, 0)
        total += size if ancestor == root else 0
    return total


def warm(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def say(text: str) -> None:
    """Progress goes to stderr; stdout is the result."""
    print(text, file=sys.stderr, flush=True)


def tell(what: str, measured: Measured) -> None:
    say(f"{what}: {measured.seconds:.1f} s, {measured.mebibytes:.0f} MiB")


def compare(name: str, data: Path, side: str, check: str, count: int, workers: list[int], folder: Path) -> dict:
    """Measure the original's `side` and `mix --check` over `data`, with each number of workers."""
    mix_file = write_mix_file(folder / f"{name}.yaml", data)
    warm(data.parent)
    old = folder / "original.json"
    original, _ = measure([sys.executable, __file__, "--only", side, str(data), str(old)])
    old.unlink(missing_ok=True)
    tell(f"the original, {name}", original)
    result: dict = {"count": count, "megabytes": round(data.stat().st_size / 1e6, 1), "original": asdict(original)}
    result["workers"] = {}
    for number in workers:
        out = folder / f"{name}-{number}.jsonl"
        ours, output = measure(mix_command(mix_file, out, check, number))
        if json.loads(output)["kept"] != count:
            raise SystemExit(f"mix kept something else than {count} records: {output}")
        out.unlink()
        tell(f"mix --check {check}, {number} workers", ours)
        result["workers"][str(number)] = asdict(ours)
    best = result["workers"][str(max(workers))]
    result["faster"] = round(original.seconds / best["seconds"], 2)
    result["memory"] = round(best["mebibytes"] / original.mebibytes, 4)
    return result


def run(folder: Path, records: int, videos: int, workers: list[int]) -> dict:
    """All measurements; a part of size 0 is left out."""
    result = {}
    if records:
        say(f"writing {records} records over {IMAGES} images")
        data = write_records(folder / "images", records)
        result["records"] = compare("records", data, "loop", "exists", records, workers, folder)
    if videos:
        say(f"writing {videos} videos")
        data = write_videos(folder / "videos", videos)
        result["videos"] = compare("videos", data, "videos", "full", videos, workers, folder)
    return result


def table(result: dict) -> str:
    """The result for people."""
    lines = [f"{'':8}{'workers':>8}{'seconds':>10}{'a second':>10}{'MiB':>8}"]
    for name, part in result.items():
        rows = [("original", part["original"]), *part["workers"].items()]
        for who, row in rows:
            rate = part["count"] / row["seconds"]
            lines.append(f"{name:8}{who:>8}{row['seconds']:10.1f}{rate:10.0f}{row['mebibytes']:8.0f}")
    lines.append("")
    for name, part in result.items():
        lines.append(f"{name}: {part['faster']} x as fast, {part['memory']} of the memory")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=665_298)
    parser.add_argument("--videos", type=int, default=300)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--only", nargs=3, metavar=("SIDE", "DATA", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        side, data, out = options.only
        original_loop(Path(data), Path(out)) if side == "loop" else original_videos(Path(data))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = run(Path(folder), options.records, options.videos, options.workers)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

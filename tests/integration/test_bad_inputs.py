"""Whatever a stranger hands us: one line that says what is wrong, a hint what to do, an exit code, nothing left behind.

`pytest tests/integration/test_bad_inputs.py -n 0 -s` prints everything that is tried here, with the message.
Errors that need a server, a full disk or a killed worker are in test_fetch, test_convert and test_train.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from llavanext_cli.app import app
from llavanext_cli.demo.model import write_model
from tests import loading

DRAW = random.Random(0)
RAN = Path(tempfile.gettempdir()) / "llavanext-was-here"
"""A file that appears if a pickle is run."""
PROMPT = "A chat between a curious user and an artificial intelligence assistant. "
PROMPT += "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT: "
SENTENCES = [PROMPT] * 50 + [" ".join("".join(DRAW.choices("aeinorst", k=5)) for _ in range(12)) for _ in range(200)]
TRIED: list[tuple[str, int, str]] = []

Make = Callable[[Path], list[object]]
"""From a folder that holds hf/, its checkpoint base/ and a.png to the words of a command."""


def png(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds one row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


JPEG, BOMB = jpeg(), png(60000, 60000)


def put(path: Path, content: str | bytes | dict | list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (dict, list)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def sample(text: str = "<image>\nWhat is it?", path: str = "a.png", answer: str = "A sign.", **more) -> dict:
    turns = [{"role": "user", "text": text}, {"role": "assistant", "text": answer}]
    media = [{"kind": "image", "path": path}] if path else []
    return {"id": "7", "source": "mine", "media": media, "turns": turns} | more


def data_file(folder: Path, *lines: dict | str) -> Path:
    head = {"llavanext_mix": 1, "roots": {"mine": "."}, "seed": 0}
    return put(
        folder / "mine.jsonl", "\n".join(x if isinstance(x, str) else json.dumps(x) for x in (head, *lines)) + "\n"
    )


def train(folder: Path, data: Path, *more: object) -> list[object]:
    command = ["train", "tiny-stage2", "--data", data, "--checkpoint", folder / "base", "--out", folder / "run"]
    return [*command, "--set", "train.batch_size=1", *more]


def ask(folder: Path, *more: object) -> list[object]:
    return ["ask", "What is it?", "--checkpoint", folder / "base", "--preset", "tiny-ask", *more]


def mix(folder: Path, records: str | bytes | list | None, strategy: str = "all", **more: object) -> list[object]:
    if records is not None:
        put(folder / "set" / "a.json", records)
    entry = {"json_path": "set/a.json", "sampling_strategy": strategy} | more
    return ["mix", put(folder / "mix.yaml", {"datasets": [entry]}), "--out", folder / "out.jsonl"]


def record(**more: object) -> dict:
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A sign."}]
    return {"id": "1", "image": "a.png", "conversations": said} | more


def changed(folder: Path, edit: Callable[[Path], None]) -> Path:
    """A copy of the Hugging Face folder with one thing wrong."""
    copy = folder / "changed"
    shutil.copytree(folder / "hf", copy)
    edit(copy)
    return copy


def reconfigured(**values: object) -> Callable[[Path], None]:
    def edit(copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text())
        for key, value in values.items():
            section, _, name = key.rpartition("__")
            (config[section] if section else config)[name] = value
        put(copy / "config.json", config)

    return edit


def cut_checkpoint(folder: Path, edit: Callable[[Path], object]) -> list[object]:
    """A question for a copy of the checkpoint with one thing wrong."""
    shutil.copytree(folder / "base", folder / "cut")
    edit(folder / "cut")
    return ["ask", "What?", "--checkpoint", folder / "cut", "--preset", "tiny-ask", "--image", folder / "a.png"]


def ask_of(folder: Path, checkpoint: str, preset: str = "tiny-ask") -> list[object]:
    return ["ask", "What?", "--checkpoint", folder / checkpoint, "--preset", preset, "--image", folder / "a.png"]


def batch(folder: Path, questions: Path, out: str) -> list[object]:
    words = ["--batch", questions, "--out", folder / out, "--force", "--checkpoint", folder / "base"]
    return ["ask", *words, "--preset", "tiny-ask"]


def convert(folder: Path, edit: Callable[[Path], object]) -> list[object]:
    return ["convert", changed(folder, edit), folder / "new"]


def only_weights(copy: Path) -> Path:
    return next(copy.glob("*.safetensors"))


def truncate(file: Path, by: int) -> None:
    file.write_bytes(file.read_bytes()[:-by])


def show(folder: Path, place: Path) -> list[object]:
    return ask(folder, "--image", folder / "a.png", "--show", place, "--force")


def train_over(folder: Path) -> list[object]:
    put(folder / "run" / "precious.txt", "mine")
    return train(folder, data_file(folder, sample()))


def train_without(folder: Path, weight: str) -> list[object]:
    manifest = json.loads((folder / "base" / "llavanext_manifest.json").read_text())
    del manifest["tensors"][weight]
    put(folder / "base" / "llavanext_manifest.json", manifest)
    return train(folder, data_file(folder, sample()))


def lie_about_length(copy: Path) -> None:
    only_weights(copy).write_bytes(struct.pack("<Q", 1 << 60) + only_weights(copy).read_bytes()[8:])


def poison(copy: Path) -> None:
    """A pickle that runs a command when it is loaded."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {RAN}",)

    only_weights(copy).unlink()
    with zipfile.ZipFile(copy / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"image_newline": Evil()}, protocol=2))
        archive.writestr("archive/version", "3\n")


def setting(*settings: str) -> Make:
    return lambda f: ["presets", "show", "tiny-stage2", *(word for one in settings for word in ("-s", one))]


def preset(content: str | bytes) -> Make:
    return lambda f: ["presets", "check", put(f / "mine.yaml", content)]


def image(content: bytes, name: str) -> Make:
    return lambda f: ask(f, "--image", put(f / name, content))


def train_on(*lines: dict | str, more: tuple[str, ...] = ()) -> Make:
    return lambda f: train(f, data_file(f, *lines), *more)


def mix_of(records: object, strategy: str = "all", *more: object, **entry: object) -> Make:
    return lambda f: [*mix(f, records, strategy, **entry), *more]


PRESETS = {
    "no such preset": ("no preset named 'tiny-stag2'", lambda f: ["presets", "show", "tiny-stag2"]),
    "an unknown key": (
        "train.learning_rat: unknown key; did you mean train.learning_rate?",
        setting("train.learning_rat=1"),
    ),
    "a value of another type": ("train.epochs: expected a whole number, not 'many'", setting("train.epochs=many")),
    "a negative rate": ("train.learning_rate: must be more than 0", setting("train.learning_rate=-1")),
    "not a number": ("train.learning_rate: expected a number, not 'nan'", setting("train.learning_rate=nan")),
    "no equals sign": ("--set train.epochs: expected KEY=VALUE", setting("train.epochs")),
    "a preset file that is not there": (
        "none/mine.yaml does not exist",
        lambda f: ["presets", "check", "none/mine.yaml"],
    ),
    "a preset that is an image": ("mine.yaml cannot be read: it is not UTF-8 text", preset(JPEG)),
    "a preset with two errors": (
        "mine.yaml, line 4: train.epoch: unknown key",
        preset("extends: base/tiny\ntask: train\ntrain:\n  epoch: 1\n  learning_rate: fast\n"),
    ),
    "a preset that extends itself": (
        "mine.yaml, line 1: extends: unknown base mine",
        preset("extends: mine\ntask: train\n"),
    ),
    "a copy of a preset that is an image": (
        "not UTF-8 text",
        lambda f: ["presets", "copy", put(f / "mine.yaml", JPEG), f / "copy.yaml"],
    ),
    "a copy of a preset over a device": (
        "is a device or a pipe",
        lambda f: ["presets", "copy", "tiny-ask", "/dev/null", "--force"],
    ),
}
USAGE = {
    "no such command": ("No such command 'trian'", lambda f: ["trian"]),
    "no such option": ("No such option: --modle", lambda f: ["presets", "list", "--modle"]),
    "demo: a negative seed": ("'--seed': -1 is not in the range", lambda f: ["demo", "--dir", "never", "--seed", "-1"]),
    "ask: a hundred million frames": (
        "'--frames': 99999999 is not in the range",
        lambda f: ask(f, "--video", f / "a.mp4", "--frames", "99999999"),
    ),
    "fetch: nowhere to put it": ("--to FOLDER is missing", lambda f: ["fetch", "video-7b"]),
}
"""Wrong command lines: exit code 2, and typer's own words in the place of a hint."""

ASK = {
    "no such image": ("none.png: no such image", lambda f: ask(f, "--image", f / "none.png")),
    "a folder for an image": ("base: a folder, not an image", lambda f: ask(f, "--image", f / "base")),
    "garbage named .jpg": ("garbage.jpg: not an image", image(bytes(range(256)) * 20, "garbage.jpg")),
    "an empty image": ("empty.png: the image is empty", image(b"", "empty.png")),
    "a truncated JPEG": ("half.jpg: the image is corrupt or truncated", image(JPEG[:900], "half.jpg")),
    "a PNG of 60 000 x 60 000 declared pixels": ("bomb.png: more than 178956970 pixels", image(BOMB, "bomb.png")),
    "a text named .mp4": (
        "clip.mp4: cannot be read as a video",
        lambda f: ask(f, "--video", put(f / "clip.mp4", "not a clip at all\n" * 99)),
    ),
    "an empty video": ("empty.mp4: the video is empty", lambda f: ask(f, "--video", put(f / "empty.mp4", b""))),
    "no such checkpoint": ("none: no such folder", lambda f: ask_of(f, "none")),
    "a Hugging Face folder for a checkpoint": (
        "a Hugging Face folder that is not yet converted",
        lambda f: ask_of(f, "hf"),
    ),
    "no such preset": ("no preset named 'tiny-aks'", lambda f: ask_of(f, "base", "tiny-aks")),
    "a train preset": ("tiny-stage2 is a preset for training", lambda f: ask_of(f, "base", "tiny-stage2")),
    "no question": (
        "Error: the question is missing",
        lambda f: ["ask", "--checkpoint", f / "base", "--preset", "tiny-ask"],
    ),
    "more placeholders than images": (
        "2 placeholders (<image>, <video>) for 1 file",
        lambda f: ["ask", "<image> <image> Which?", *ask_of(f, "base")[2:]],
    ),
    "a truncated checkpoint": (
        "damaged or truncated safetensors file",
        lambda f: cut_checkpoint(f, lambda cut: truncate(only_weights(cut), 1000)),
    ),
    "a checkpoint without its tokenizer": (
        "cut: tokenizer.model is missing",
        lambda f: cut_checkpoint(f, lambda cut: (cut / "tokenizer.model").unlink()),
    ),
    "--show over the image": ("writing there would damage the input", lambda f: show(f, f / "a.png")),
    "--show into a folder": ("is a folder", lambda f: show(f, f)),
    "--show into a device": ("/dev/null is a device or a pipe, not a file", lambda f: show(f, Path("/dev/null"))),
    "--show without a suffix": ("sheet has no suffix, so its format is unknown", lambda f: show(f, f / "sheet")),
    "--show without an image": ("--show has nothing to show", lambda f: ask(f, "--show", f / "saw.png")),
    "a hundred million frames, set": (
        "data.frames: must be at most 10000",
        lambda f: ask(f, "--image", f / "a.png", "--set", "data.frames=99999999"),
    ),
    "a batch that is an image": (
        "a.png: no line is valid JSON",
        lambda f: batch(f, f / "a.png", "answers.jsonl"),
    ),
    "answers over an image": (
        "a.png exists and is not a file of answers",
        lambda f: batch(f, put(f / "questions.jsonl", '{"question": "What is it?"}\n'), "a.png"),
    ),
}
NO_CANN = {
    "ask: an NPU without CANN": (
        "CANN: not found",
        lambda f: ask(f, "--image", f / "a.png", "--set", "runtime.target=Ascend"),
    )
}
TRAIN = {
    "no such data file": ("none.jsonl: No such file or directory", lambda f: train(f, f / "none.jsonl")),
    "an empty data file": ("empty.jsonl: the file is empty", lambda f: train(f, put(f / "empty.jsonl", ""))),
    "a broken line": ("mine.jsonl, line 3: not valid JSON", train_on(sample(), '{"id": "8", "turns": [')),
    "a line that is a list": ("mine.jsonl, line 2: a sample is an object", train_on("[1, 2]")),
    "the assistant begins": (
        "mine.jsonl, line 2: turn 1 must be the user's, not 'assistant'",
        train_on(sample() | {"turns": [{"role": "assistant", "text": "A sign."}]}),
    ),
    "two placeholders, one image": (
        "sample 7: 2 placeholders (<image>, <video>) for 1 file",
        train_on(sample("<image> <image> What?")),
    ),
    "an image that is gone": (
        "1 of 1 samples name an image or video that does not exist",
        train_on(sample(path="gone.png")),
    ),
    "a source without a root": ("line 2: source 'elsewhere' is missing in", train_on(sample(source="elsewhere"))),
    "longer than seq_length": ("1 of 1 samples have too many tokens", train_on(sample(answer="It is a sign. " * 200))),
    "a checkpoint of another shape": (
        "the checkpoint's model.text.hidden_size is 128",
        train_on(sample(), more=("--set", "model.text.hidden_size=64")),
    ),
    "heads that do not divide": (
        "the checkpoint's model.text.num_attention_heads is 4",
        train_on(sample(), more=("--set", "model.text.num_attention_heads=3")),
    ),
    "devices that the preset does not divide into": (
        "parallel.devices: 3 devices, but data 2 x tensor 1",
        train_on(sample(), more=("--set", "parallel.devices=3", "--set", "parallel.data=2")),
    ),
    "no such preset": (
        "no preset named 'tiny-stage9'",
        lambda f: ["train", "tiny-stage9", "--data", data_file(f, sample()), "-c", f / "base", "-o", f / "run"],
    ),
    "an ask preset": (
        "tiny-ask is a preset for asking",
        lambda f: ["train", "tiny-ask", "--data", data_file(f, sample()), "-c", f / "base", "-o", f / "run"],
    ),
    "no such checkpoint": (
        "none: no such folder",
        lambda f: ["train", "tiny-stage2", "--data", data_file(f, sample()), "-c", f / "none", "-o", f / "run"],
    ),
    "a checkpoint without one weight": (
        "the weights do not fit config.json",
        lambda f: train_without(f, "image_newline"),
    ),
    "an out folder that holds something": ("exists and is not a training run", lambda f: train_over(f)),
}
MIX = {
    "no such mix file": ("none.yaml: no such mix file", lambda f: ["mix", f / "none.yaml", "--out", f / "out.jsonl"]),
    "no data sets": ("must hold a list", lambda f: ["mix", put(f / "mix.yaml", "{}"), "--out", f / "out.jsonl"]),
    "a data set that is not there": ("json_path: set/a.json does not exist", mix_of(None)),
    "an unknown strategy": ("unknown strategy 'middle:10'", mix_of([record()], "middle:10")),
    "more than 100 %": ("'first:120%' is more than 100 %", mix_of([record()], "first:120%")),
    "a negative count": ("'end:-3': the amount is a count", mix_of([record()], "end:-3")),
    "an unknown key": ("unknown key 'json_pat'; did you mean 'json_path'?", mix_of([record()], json_pat="x")),
    "truncated JSON": ("not valid JSON", mix_of(json.dumps([record()] * 3, indent=1)[:-40])),
    "JSON that is a number": ("a data set is a list of records", mix_of("42")),
    "over one of its images": (
        "a.png exists",
        lambda f: [*mix(f, [record()])[:-1], f / "a.png", "--force"],
    ),
    "a report that is not a page": (
        "report.png: the report is an HTML page",
        lambda f: [*mix(f, [record()]), "--report", f / "report.png"],
    ),
    "out to stdout": ("a mix cannot write to stdout", lambda f: [*mix(f, [record()])[:-1], "-"]),
    "only invalid records": ("all 3 records are bad", mix_of([1, "two", None])),
    "a path out of its root": (
        "is outside the media folder",
        mix_of([record(image="../../etc/passwd")], "all", "--on-bad", "fail"),
    ),
    "an image that is text": (
        "set/t.png: not an image",
        lambda f: [
            *mix(f, [record(image=put(f / "set" / "t.png", "text").name)]),
            "--on-bad",
            "fail",
            "--check",
            "full",
        ],
    ),
    "an output folder that is not there": (
        "does not exist",
        lambda f: [*mix(f, [record()])[:-1], f / "none" / "out.jsonl"],
    ),
    "an output that is there": (
        "out.jsonl exists",
        lambda f: [*mix(f, [record()])[:-1], put(f / "out.jsonl", "mine")],
    ),
}
CONVERT = {
    "no such folder": ("none: no such folder", lambda f: ["convert", f / "none", f / "new"]),
    "an empty folder": (
        "empty: config.json is missing",
        lambda f: ["convert", put(f / "empty/x", "").parent, f / "new"],
    ),
    "into itself": ("writing there would damage the input", lambda f: ["convert", f / "hf", f / "hf" / "new"]),
    "a destination that is there": ("base already holds a checkpoint", lambda f: ["convert", f / "hf", f / "base"]),
    "config.json is missing": (
        "changed: config.json is missing",
        lambda f: convert(f, lambda copy: (copy / "config.json").unlink()),
    ),
    "another architecture": ("this is not a LLaVA-NeXT model", lambda f: convert(f, reconfigured(model_type="blip-2"))),
    "an unknown activation": (
        "projector_hidden_act: expected quick_gelu or gelu, not 'mish9'",
        lambda f: convert(f, reconfigured(projector_hidden_act="mish9")),
    ),
    "heads that do not fit": (
        "num_key_value_heads: the 4 attention heads are not a multiple of 3",
        lambda f: convert(f, reconfigured(text_config__num_key_value_heads=3)),
    ),
    "a truncated file of weights": (
        "damaged or truncated safetensors file",
        lambda f: convert(f, lambda copy: truncate(only_weights(copy), 100)),
    ),
    "a header of 2^60 bytes": ("header too large", lambda f: convert(f, lie_about_length)),
    "weights that are HTML": (
        "damaged or truncated safetensors file",
        lambda f: convert(f, lambda copy: put(only_weights(copy), "<html>404</html>")),
    ),
    "a pickle that would run code": ("holds 'posix.system'", lambda f: convert(f, poison)),
}
FETCH = {
    "no such artifact": ("unknown artifact 'video-7'", lambda f: ["fetch", "video-7", "--to", f / "new"]),
    "a file for a folder": ("a.png is a file, not a folder", lambda f: ["fetch", "video-7b", "--to", f / "a.png"]),
    "a check of a folder that was not fetched": (
        "base has no files that llavanext fetch downloaded",
        lambda f: ["fetch", "--check", f / "base"],
    ),
    "an address of no kind": (
        "unknown artifact 'file:///etc/passwd'",
        lambda f: ["fetch", "file:///etc/passwd", "--to", f / "new"],
    ),
    "no network": (
        "127.0.0.1:9 refuses the connection",
        lambda f: ["fetch", "org/repo", "--to", f / "new", "--endpoint", "http://127.0.0.1:9", "--retries", 0],
    ),
}

TABLES = [("presets: ", 1, PRESETS), ("", 2, USAGE), ("ask: ", 1, ASK), ("", 3, NO_CANN), ("train: ", 1, TRAIN)]
TABLES += [("mix: ", 1, MIX), ("convert: ", 1, CONVERT), ("fetch: ", 1, FETCH)]
CASES = {
    f"{command}{name}": (says, make, code) for command, code, table in TABLES for name, (says, make) in table.items()
}
"""What is tried → a phrase of the message, the command, the exit code."""


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A Hugging Face folder, its checkpoint and an image."""
    folder = tmp_path_factory.mktemp("stock")
    write_model(folder / "hf", SENTENCES, seed=0)
    loading.convert(folder / "hf", folder / "base")
    Image.radial_gradient("L").convert("RGB").resize((40, 40)).save(folder / "a.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    width = max((len(name) for name, _, _ in TRIED), default=0)
    print("\n\n" + "\n".join(f"{name.ljust(width)}  {code}  {message}" for name, code, message in TRIED))


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_line(name, stock, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    shutil.copytree(stock, folder)
    says, make, code = CASES[name]
    words = [str(word) for word in make(folder)]
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    done = CliRunner().invoke(app, words)
    said = done.stderr.replace(f"{folder}/", "")
    errors = [line for line in said.splitlines() if line.startswith("Error: ")]
    TRIED.append((name, done.exit_code, " ".join(errors).removeprefix("Error: ")))
    assert done.exit_code == code, (done.exception, said)
    assert len(errors) == 1 and says in said, said
    assert code == 2 or "\nHint: " in said, said
    assert "Traceback" not in said
    assert done.stdout == "" or words[:2] == ["presets", "check"]  # its verdict on each preset is data
    left = set(sorted(folder.rglob("*"))) - set(before)
    assert {path.name for path in left} <= {"out.jsonl.cache"}  # mix remembers its checks


def test_nothing_that_was_handed_over_has_run():
    assert not RAN.exists()

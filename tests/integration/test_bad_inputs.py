"""Whatever a stranger hands us: one line that says what, a hint that says what next, an exit code, nothing left behind.

`pytest tests/integration/test_bad_inputs.py -s` prints the table of everything that is tried here, with the message.
Faults that need a server, a full disk or a killed worker are in test_fetch, test_convert and test_train.
"""

from __future__ import annotations

import io
import json
import os
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
from llavanext_cli.weights.convert import run_convert

DRAW = random.Random(0)
RAN = Path(tempfile.gettempdir()) / "llavanext-was-here"
"""What a pickle makes, if it is run."""
PROMPT = "A chat between a curious user and an artificial intelligence assistant. "
PROMPT += "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT: "
SENTENCES = [PROMPT] * 50 + [" ".join("".join(DRAW.choices("aeinorst", k=5)) for _ in range(12)) for _ in range(200)]
TRIED: list[tuple[str, int, str]] = []

Make = Callable[[Path], list[object]]
CASES: dict[str, tuple[Make, int, str]] = {}
"""What is tried → a function that prepares a folder and returns the command, the exit code, a part of the message."""


def case(name: str, says: str, code: int = 1) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        assert name not in CASES
        CASES[name] = (make, code, says)
        return make

    return add


def simple(name: str, says: str, *words: object, code: int = 1) -> None:
    """A command that needs nothing but the folder's checkpoint, data and picture."""
    CASES[name] = (lambda folder: list(words), code, says)


# ------------------------------------------------------------------------------------------------- what is handed over


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


# ---------------------------------------------------------------------------------------------------- presets and --set

simple("no such preset", "no preset named 'tiny-stag2'", "presets", "show", "tiny-stag2")
simple("no such command", "No such command 'trian'", "trian", code=2)
simple("no such option", "No such option: --modle", "presets", "list", "--modle", code=2)
simple("a key that is none", "train.learning_rat", "presets", "show", "tiny-stage2", "-s", "train.learning_rat=1")
simple("a value of another type", "train.epochs", "presets", "show", "tiny-stage2", "-s", "train.epochs=many")
simple("a negative rate", "train.learning_rate", "presets", "show", "tiny-stage2", "-s", "train.learning_rate=-1")
simple("not a number", "train.learning_rate", "presets", "show", "tiny-stage2", "-s", "train.learning_rate=nan")
simple("no equals sign", "KEY=VALUE", "presets", "show", "tiny-stage2", "-s", "train.epochs")
simple("a preset file that is not there", "mine.yaml", "presets", "check", "none/mine.yaml")


@case("a preset that is a picture", "mine.yaml")
def _(folder):
    return ["presets", "check", put(folder / "mine.yaml", jpeg())]


@case("a preset with two faults", "wrong")
def _(folder):
    text = "extends: base/tiny\ntask: train\ntrain:\n  epoch: 1\n  learning_rate: fast\n"
    return ["presets", "check", put(folder / "mine.yaml", text)]


@case("a preset that extends itself", "extends")
def _(folder):
    return ["presets", "check", put(folder / "mine.yaml", "extends: mine\ntask: train\n")]


@case("a copy of a preset that is a picture", "not UTF-8 text")
def _(folder):
    return ["presets", "copy", put(folder / "mine.yaml", jpeg()), folder / "copy.yaml"]


@case("a copy of a preset over a device", "is a device or a pipe")
def _(folder):
    return ["presets", "copy", "tiny-ask", "/dev/null", "--force"]


simple("demo: a negative seed", "--seed", "demo", "--dir", "never", "--seed", "-1", code=2)


# ----------------------------------------------------------------------------------------------------------------- ask


@case("ask: no such picture", "none.png")
def _(folder):
    return ask(folder, "--image", folder / "none.png")


@case("ask: a folder for a picture", "base")
def _(folder):
    return ask(folder, "--image", folder / "base")


@case("ask: garbage named .jpg", "garbage.jpg")
def _(folder):
    return ask(folder, "--image", put(folder / "garbage.jpg", bytes(range(256)) * 20))


@case("ask: an empty picture", "empty.png")
def _(folder):
    return ask(folder, "--image", put(folder / "empty.png", b""))


@case("ask: a truncated JPEG", "half.jpg")
def _(folder):
    return ask(folder, "--image", put(folder / "half.jpg", jpeg()[:900]))


@case("ask: a PNG of 60 000 x 60 000 declared pixels", "bomb.png")
def _(folder):
    return ask(folder, "--image", put(folder / "bomb.png", png(60000, 60000)))


@case("ask: a text named .mp4", "clip.mp4")
def _(folder):
    return ask(folder, "--video", put(folder / "clip.mp4", "not a clip at all\n" * 99))


@case("ask: an empty clip", "empty.mp4")
def _(folder):
    return ask(folder, "--video", put(folder / "empty.mp4", b""))


@case("ask: no such checkpoint", "none")
def _(folder):
    return ["ask", "What?", "--checkpoint", folder / "none", "--preset", "tiny-ask", "--image", folder / "a.png"]


@case("ask: a Hugging Face folder for a checkpoint", "convert")
def _(folder):
    return ["ask", "What?", "--checkpoint", folder / "hf", "--preset", "tiny-ask", "--image", folder / "a.png"]


@case("ask: a train preset", "tiny-stage2")
def _(folder):
    return ["ask", "What?", "--checkpoint", folder / "base", "--preset", "tiny-stage2", "--image", folder / "a.png"]


@case("ask: more placeholders than pictures", "<image>")
def _(folder):
    command = ask(folder, "--image", folder / "a.png")
    command[1] = "<image> <image> Which?"
    return command


@case("ask: a truncated checkpoint", "the file is cut short")
def _(folder):
    shutil.copytree(folder / "base", folder / "cut")
    (file,) = (folder / "cut").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    return ["ask", "What?", "--checkpoint", folder / "cut", "--preset", "tiny-ask", "--image", folder / "a.png"]


@case("ask: a checkpoint without its tokenizer", "tokenizer")
def _(folder):
    shutil.copytree(folder / "base", folder / "cut")
    (folder / "cut" / "tokenizer.model").unlink()
    return ["ask", "What?", "--checkpoint", folder / "cut", "--preset", "tiny-ask", "--image", folder / "a.png"]


@case("ask: --show over the picture", "is what the question is about")
def _(folder):
    return ask(folder, "--image", folder / "a.png", "--show", folder / "a.png", "--force")


@case("ask: --show into a folder", "is a folder")
def _(folder):
    return ask(folder, "--image", folder / "a.png", "--show", folder, "--force")


@case("ask: --show into a device", "is a device or a pipe")
def _(folder):
    return ask(folder, "--image", folder / "a.png", "--show", "/dev/null", "--force")


@case("ask: --show without an ending", "no ending that names its format")
def _(folder):
    return ask(folder, "--image", folder / "a.png", "--show", folder / "sheet")


@case("ask: a hundred million frames, set", "data.frames")
def _(folder):
    return ask(folder, "--image", folder / "a.png", "--set", "data.frames=99999999")


@case("ask: a hundred million frames", "--frames", code=2)
def _(folder):
    return ask(folder, "--video", folder / "a.mp4", "--frames", "99999999")


@case("ask: a batch that is a picture", "no line of it is valid JSON")
def _(folder):
    words = ["--batch", folder / "a.png", "--out", folder / "answers.jsonl"]
    return ["ask", *words, "--checkpoint", folder / "base", "--preset", "tiny-ask"]


@case("ask: --show without a picture", "nothing to show")
def _(folder):
    return ask(folder, "--show", folder / "saw.png")


@case("ask: answers over a picture", "holds no answers")
def _(folder):
    questions = put(folder / "questions.jsonl", '{"question": "What is it?"}\n')
    words = ["ask", "--batch", questions, "--out", folder / "a.png", "--force", "--checkpoint", folder / "base"]
    return [*words, "--preset", "tiny-ask"]


@case("ask: an NPU without CANN", "CANN: not found", code=3)
def _(folder):
    return ask(folder, "--image", folder / "a.png", "--set", "runtime.target=Ascend")


# --------------------------------------------------------------------------------------------------------------- train


@case("train: no such data file", "none.jsonl")
def _(folder):
    return train(folder, folder / "none.jsonl")


@case("train: an empty data file", "empty.jsonl")
def _(folder):
    return train(folder, put(folder / "empty.jsonl", ""))


@case("train: a broken line", "line 3")
def _(folder):
    return train(folder, data_file(folder, sample(), '{"id": "8", "turns": ['))


@case("train: a line that is a list", "line 2")
def _(folder):
    return train(folder, data_file(folder, "[1, 2]"))


@case("train: the assistant begins", "turn 1 must be the user's")
def _(folder):
    return train(folder, data_file(folder, sample() | {"turns": [{"role": "assistant", "text": "A sign."}]}))


@case("train: two placeholders, one picture", "<image>")
def _(folder):
    return train(folder, data_file(folder, sample("<image> <image> What?")))


@case("train: a picture that is gone", "gone.png")
def _(folder):
    return train(folder, data_file(folder, sample(path="gone.png")))


@case("train: a source without a root", "elsewhere")
def _(folder):
    return train(folder, data_file(folder, sample(source="elsewhere")))


@case("train: longer than seq_length", "seq_length")
def _(folder):
    return train(folder, data_file(folder, sample(answer="It is a sign. " * 200)))


@case("train: a checkpoint of another shape", "the checkpoint's model.text.hidden_size is 128")
def _(folder):
    return train(folder, data_file(folder, sample()), "--set", "model.text.hidden_size=64")


@case("train: heads that do not divide", "num_attention_heads")
def _(folder):
    return train(folder, data_file(folder, sample()), "--set", "model.text.num_attention_heads=3")


@case("train: devices that the preset does not give", "devices")
def _(folder):
    return train(folder, data_file(folder, sample()), "--set", "parallel.devices=3", "--set", "parallel.data=2")


@case("train: an ask preset", "tiny-ask")
def _(folder):
    return ["train", "tiny-ask", "--data", data_file(folder, sample()), "-c", folder / "base", "-o", folder / "run"]


@case("train: an out folder that holds something", "holds something that is no training run")
def _(folder):
    put(folder / "run" / "precious.txt", "mine")
    return train(folder, data_file(folder, sample()))


# ----------------------------------------------------------------------------------------------------------------- mix


@case("mix: no such mix file", "none.yaml")
def _(folder):
    return ["mix", folder / "none.yaml", "--out", folder / "out.jsonl"]


@case("mix: no data sets", "datasets")
def _(folder):
    return ["mix", put(folder / "mix.yaml", "{}"), "--out", folder / "out.jsonl"]


@case("mix: a data set that is not there", "a.json")
def _(folder):
    return mix(folder, None)


@case("mix: an unknown strategy", "middle:10")
def _(folder):
    return mix(folder, [record()], "middle:10")


@case("mix: more than 100 %", "120%")
def _(folder):
    return mix(folder, [record()], "first:120%")


@case("mix: a negative count", "-3")
def _(folder):
    return mix(folder, [record()], "end:-3")


@case("mix: an unknown key", "json_pat")
def _(folder):
    return mix(folder, [record()], json_pat="x")


@case("mix: truncated JSON", "line")
def _(folder):
    return mix(folder, json.dumps([record()] * 3, indent=1)[:-40])


@case("mix: JSON that is a number", "a.json")
def _(folder):
    return mix(folder, "42")


@case("mix: over one of its pictures", "llavanext mix has not written it")
def _(folder):
    return [*mix(folder, [record()])[:-1], folder / "a.png", "--force"]


@case("mix: a report that is no page", "the report is an HTML page")
def _(folder):
    return [*mix(folder, [record()]), "--report", folder / "report.png"]


@case("mix: out to stdout", "not to stdout")
def _(folder):
    return [*mix(folder, [record()])[:-1], "-"]


@case("mix: only records that are none", "all 3 records are bad")
def _(folder):
    return mix(folder, [1, "two", None])


@case("mix: a path out of its root", "climbs out of the media folder")
def _(folder):
    return [*mix(folder, [record(image="../../etc/passwd")]), "--on-bad", "fail"]


@case("mix: a picture that is text", "a.png")
def _(folder):
    put(folder / "set" / "a.png", "text")
    return [*mix(folder, [record()]), "--on-bad", "fail", "--check", "full"]


@case("mix: an output folder that is not there", "does not exist")
def _(folder):
    return [*mix(folder, [record()])[:-1], folder / "none" / "out.jsonl"]


@case("mix: an output that is there", "out.jsonl exists")
def _(folder):
    put(folder / "out.jsonl", "mine")
    return mix(folder, [record()])


# ------------------------------------------------------------------------------------------------------------- convert


def convert(folder: Path, edit: Callable[[Path], object]) -> list[object]:
    return ["convert", changed(folder, edit), folder / "new"]


@case("convert: no such folder", "none")
def _(folder):
    return ["convert", folder / "none", folder / "new"]


@case("convert: an empty folder", "empty")
def _(folder):
    (folder / "empty").mkdir()
    return ["convert", folder / "empty", folder / "new"]


@case("convert: into itself", "inside")
def _(folder):
    return ["convert", folder / "hf", folder / "hf" / "new"]


@case("convert: a destination that is there", "base")
def _(folder):
    return ["convert", folder / "hf", folder / "base"]


@case("convert: no config.json", "config.json")
def _(folder):
    return convert(folder, lambda copy: (copy / "config.json").unlink())


@case("convert: another architecture", "no LLaVA-NeXT model")
def _(folder):
    return convert(folder, reconfigured(model_type="blip-2"))


@case("convert: an unknown activation", "projector_hidden_act")
def _(folder):
    return convert(folder, reconfigured(projector_hidden_act="mish9"))


@case("convert: heads that do not fit", "num_key_value_heads")
def _(folder):
    return convert(folder, reconfigured(text_config__num_key_value_heads=3))


@case("convert: a truncated file of weights", "safetensors")
def _(folder):
    def cut(copy: Path) -> None:
        file = next(copy.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-100])

    return convert(folder, cut)


@case("convert: a header that lies about its length", "safetensors")
def _(folder):
    def lie(copy: Path) -> None:
        file = next(copy.glob("*.safetensors"))
        file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])

    return convert(folder, lie)


@case("convert: weights that are HTML", "safetensors")
def _(folder):
    return convert(folder, lambda copy: put(next(copy.glob("*.safetensors")), "<html>404</html>"))


@case("convert: a pickle that would run code", "system")
def _(folder):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {RAN}",)

    def poison(copy: Path) -> None:
        import pickle

        next(copy.glob("*.safetensors")).unlink()
        with zipfile.ZipFile(copy / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"image_newline": Evil()}, protocol=2))
            archive.writestr("archive/version", "3\n")

    return convert(folder, poison)


# --------------------------------------------------------------------------------------------------------------- fetch


@case("fetch: no such artifact", "video-7b")
def _(folder):
    return ["fetch", "video-7", "--to", folder / "new"]


@case("fetch: nowhere to put it", "--to", code=2)
def _(folder):
    return ["fetch", "video-7b"]


@case("fetch: a file for a folder", "a.png")
def _(folder):
    return ["fetch", "video-7b", "--to", folder / "a.png"]


@case("fetch: a check of a folder that was not fetched", "base")
def _(folder):
    return ["fetch", "--check", folder / "base"]


@case("fetch: an address of no kind", "file:///etc/passwd")
def _(folder):
    return ["fetch", "file:///etc/passwd", "--to", folder / "new"]


@case("fetch: no network", "127.0.0.1")
def _(folder):
    words = ["fetch", "org/repo", "--to", folder / "new", "--endpoint", "http://127.0.0.1:9", "--retries", 0]
    return [*words, "--timeout", 1]


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A Hugging Face folder, its checkpoint and a picture."""
    folder = tmp_path_factory.mktemp("stock")
    write_model(folder / "hf", SENTENCES, seed=0)
    run_convert(folder / "hf", folder / "base")
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
    make, code, says = CASES[name]
    words = [str(word) for word in make(folder)]
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    done = CliRunner().invoke(app, words)
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    TRIED.append((name, done.exit_code, " ".join(errors).removeprefix("Error: ").replace(f"{folder}/", "")))
    assert done.exit_code == code, (done.exception, done.stderr)
    assert len(errors) == 1 and says in done.stderr, done.stderr
    assert code == 2 or [line for line in lines if line.startswith("Hint: ")], done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == "" or words[:2] == ["presets", "check"]  # its verdict on each preset is data
    left = set(sorted(folder.rglob("*"))) - set(before)
    assert {path.name for path in left} <= {"out.jsonl.cache"}  # mix remembers its checks


def test_nothing_that_was_handed_over_has_run():
    assert not RAN.exists()

"""How tests share workers and cores; and what several folders of them need: a tokenizer folder, videos, MindSpore."""

import io
import json
import os
import signal
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent
SLOWEST_FIRST = ("demo", "mindspore", "simulation", "integration/test_train", "integration", "parity")

# A machine with much else to do makes examples slowly.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# A script that starts the tests in the background makes them, and all that they start, ignore Ctrl-C; nohup, SIGHUP.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Each worker of pytest-xdist, and what it starts, gets its share of the cores; MindSpore takes as many threads.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1 and hasattr(os, "sched_setaffinity"):
    cores, worker = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, cores[worker::workers] or [cores[worker % len(cores)]])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Give tests that share something costly to one worker, and start the groups that take longest first."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=lambda item: next((i for i, name in enumerate(SLOWEST_FIRST) if _group(item).startswith(name)), 9))


def _group(item: pytest.Item) -> str:
    """`demo` for tests of the installed wheel, `simulation` and `mindspore` for shared graphs; else the test's file."""
    for fixture, group in (("built_wheel", "demo"), ("compiled", "simulation"), ("mindspore_cpu", "mindspore")):
        if fixture in item.fixturenames:
            return group
    return str(item.path.relative_to(ROOT).with_suffix(""))


def _corpus() -> list[str]:
    """Words of the prompt. USER never follows a space, so that, as in Llama's vocabulary, " USER" is two pieces."""
    prompt = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ASSISTANT: "
    )
    users = " ".join(f"{letter}USER:" for letter in string.ascii_letters)
    talk = "what is it? a grey cat on the mat, and a red ball. how many birds are there? three of them flew away."
    return [prompt] * 40 + [users] * 40 + [talk] * 40 + [string.printable] * 5


def train_sentencepiece(**options) -> bytes:
    """A tiny SentencePiece model with the options of Llama's, or others."""
    import sentencepiece

    model = io.BytesIO()
    defaults = {
        "vocab_size": 520,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 1.0,
        "hard_vocab_limit": False,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()), model_writer=model, **(defaults | options)
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    return train_sentencepiece()


@pytest.fixture
def make_tokenizer_folder(tmp_path, sentencepiece_model):
    """Write a tokenizer folder: `make(legacy=False)`; `<video>` and `<image>` follow the model's own pieces."""

    def make(legacy: bool | None = False, model: bytes | None = None, name: str = "tokenizer", **config) -> Path:
        from sentencepiece import SentencePieceProcessor

        model = model or sentencepiece_model
        folder = tmp_path / f"{name}-{legacy}"
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(model)
        size = len(SentencePieceProcessor(model_proto=model))
        (folder / "added_tokens.json").write_text(json.dumps({"<video>": size, "<image>": size + 1}))
        config = {"add_bos_token": True, "pad_token": "<unk>"} | ({} if legacy is None else {"legacy": legacy}) | config
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def write_clip(tmp_path):
    """Write a video whose frames all differ: `write("a.mp4", frames=30, size=(96, 128))` returns its path."""
    av = pytest.importorskip("av")

    def write(
        name: str = "clip.mp4",
        frames: int = 30,
        size: tuple[int, int] = (96, 128),
        codec: str = "libx264",
        key_every: int = 12,
        rate: int = 10,
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate)
            stream.height, stream.width = size
            stream.pix_fmt = "yuv420p"
            stream.gop_size = key_every
            stream.options = {"sc_threshold": "0"}  # key frames where they are asked for, and nowhere else
            for number in range(frames):
                picture = np.zeros((*size, 3), np.uint8)
                picture[..., 0] = number * 255 // max(1, frames - 1)
                picture[: size[0] // 4, : size[1] // 4, 2] = 255
                left = number * 3 % size[1]
                picture[:, left : left + 16, 1] = 255
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        return path

    return write


@pytest.fixture(scope="session")
def mindspore_cpu(tmp_path_factory) -> Path:
    """MindSpore and MindFormers, imported and set to the CPU once for the whole run; the folder they write to."""
    from llavanext_cli.model.runtime import load_libraries

    folder = tmp_path_factory.mktemp("libraries")
    load_libraries(folder, "CPU")
    return folder

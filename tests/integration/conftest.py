"""A tiny model with random weights, a few images, a video and a data file, for train and ask; and a finished demo."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavanext_cli.config.architecture import Architecture, TextArchitecture, VisionArchitecture

SIZES = [(28, 28), (56, 84), (90, 40), (30, 100), (64, 48), (57, 113)]


@pytest.fixture(scope="session")
def tokenizer_files():
    """The tokenizer's model and the number of its pieces."""
    from sentencepiece import SentencePieceProcessor

    from tests.conftest import train_sentencepiece

    model = train_sentencepiece()
    return model, len(SentencePieceProcessor(model_proto=model))


@pytest.fixture(scope="session")
def tiny_architecture(tokenizer_files) -> Architecture:
    pieces = tokenizer_files[1]
    return Architecture(
        vision=VisionArchitecture(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=7,
        ),
        text=TextArchitecture(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=-(-(pieces + 2) // 64) * 64,
            max_position_embeddings=512,
        ),
        image_token_index=pieces + 1,
        video_token_index=pieces,
        image_grid_pinpoints=((28, 56), (56, 28), (56, 56), (84, 28), (28, 84)),
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_architecture, tokenizer_files) -> Path:
    """A checkpoint folder as `convert` leaves it."""
    from llavanext_cli.config.hf_config import architecture_to_hf
    from llavanext_cli.weights.checkpoint import write_checkpoint
    from llavanext_cli.weights.keymap import expected_parameters
    from llavanext_cli.weights.stream import Stream
    from llavanext_cli.weights.tensors import GeneratedBytes, PlannedTensor

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    rng = np.random.default_rng(0)
    plan = []
    for name, shape in expected_parameters(tiny_architecture).items():
        is_norm = len(shape) == 1 and name.endswith("weight")
        array = (np.ones(shape) if is_norm else rng.normal(0, 0.08, shape)).astype(np.float32)
        plan.append(
            PlannedTensor(name, "F32", shape, (GeneratedBytes(array.nbytes, lambda a=array: iter([a.data.cast("B")])),))
        )
    with Stream(0) as stream:
        write_checkpoint(folder, plan, [], {"kind": "test"}, stream)
    (folder / "config.json").write_text(json.dumps(architecture_to_hf(tiny_architecture)))
    model, pieces = tokenizer_files
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "added_tokens.json").write_text(json.dumps({"<video>": pieces, "<image>": pieces + 1}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "legacy": False, "pad_token": "<unk>"})
    )
    return folder


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """A folder of images, 0.png to 5.png, and one video, clip.mp4."""
    import av

    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(1)
    for number, size in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in range(12):
            frame = np.full((48, 64, 3), number * 20, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return folder


def write_samples(path: Path, media: Path, samples: list[dict]) -> Path:
    header = {"llavanext_mix": 1, "roots": {"m": str(media)}, "seed": 0}
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *samples]))
    return path


def sample(name: str, kind: str | None, file: str, question: str, answer: str) -> dict:
    place = {"image": "<image>\n", "video": "<video>\n", None: ""}[kind]
    return {
        "id": name,
        "source": "m",
        "media": [{"kind": kind, "path": file}] if kind else [],
        "turns": [{"role": "user", "text": place + question}, {"role": "assistant", "text": answer}],
    }


@pytest.fixture(scope="session")
def data(tmp_path_factory, media) -> Path:
    """48 samples: images, videos and text, with answers of very different lengths."""
    words = ["a cat", "yes", "a red ball on the grey mat, and three birds", "two"]
    lines = []
    for number in range(48):
        kind, file = [("image", f"{number % 6}.png"), ("video", "clip.mp4"), (None, "")][(number % 4) % 3]
        lines.append(sample(f"s{number}", kind, file, "what is it?", words[number % 4] * (1 + number % 3)))
    return write_samples(tmp_path_factory.mktemp("data") / "data.jsonl", media, lines)


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory) -> Path:
    """$XDG_CACHE_HOME of all commands that tests run, so that each graph is compiled once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"


@pytest.fixture
def run_llavanext(tmp_path, cache_home):
    """Run the real command in an empty folder: `run("ask", ...)`; gives the finished process and that folder."""
    work = tmp_path / "work"
    work.mkdir()
    environment = os.environ | {"XDG_CACHE_HOME": str(cache_home)}

    def run(*words, timeout: int = 600, typed: str | None = None) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "llavanext_cli", *map(str, words)]
        kept = {"capture_output": True, "text": True, "timeout": timeout, "check": False}
        return subprocess.run(command, cwd=work, env=environment, input=typed, **kept)

    run.folder = work
    return run


@pytest.fixture(scope="session")
def built_wheel(tmp_path_factory) -> Path:
    """The wheel, built from the sdist beside it."""
    folder = tmp_path_factory.mktemp("dist")
    repository = Path(__file__).parents[2]
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(repository)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel_environment(built_wheel, tmp_path_factory) -> dict[str, str]:
    """Variables for a process that sees the installed wheel before the repository, and an empty home."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(built_wheel)]
    subprocess.run(command, check=True, timeout=600)
    return {"PYTHONPATH": str(target), "HOME": str(tmp_path_factory.mktemp("home"))}


@dataclass(frozen=True)
class Demo:
    """What `llavanext demo --quick` left, and the finished process.

    Attributes:
        folder: holds data/, stage2.jsonl, models/, runs/, answers.jsonl, report.json; nothing may change it.
    """

    folder: Path
    process: subprocess.CompletedProcess[str]

    @property
    def base(self) -> Path:
        """The converted checkpoint that training began with."""
        return self.folder / "models" / "base"

    @property
    def run(self) -> Path:
        """The training run of stage 3: metrics.jsonl, checkpoints/, model/, train_report.html."""
        return self.folder / "runs" / "stage3"

    @property
    def model(self) -> Path:
        """The trained checkpoint."""
        return self.run / "model"


@pytest.fixture(scope="session")
def demo(tmp_path_factory, wheel_environment, cache_home) -> Demo:
    """`llavanext demo --quick` of the installed wheel: tests of what train, ask and chat do when all is well share it.

    Every test that uses it runs in the same worker of pytest-xdist (tests/conftest.py), so that it is made once.
    """
    work = tmp_path_factory.mktemp("demo")
    environment = os.environ | wheel_environment | {"XDG_CACHE_HOME": str(cache_home)}
    command = [sys.executable, "-m", "llavanext_cli", "demo", "--dir", "d", "--quick"]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    return Demo(work / "d", done)

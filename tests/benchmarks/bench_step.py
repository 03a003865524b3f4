"""How fast a training step is on a CPU: beside transformers' model under torch, the same batches, float32, two threads.

    python tests/benchmarks/bench_step.py --dir FOLDER                    both sizes, some minutes
    python tests/benchmarks/bench_step.py --dir FOLDER --size tiny        one size alone

tiny    the demo's model and its presets' batch: 16 samples of 176 positions
small   a CLIP tower of 12 layers, 512 wide, and a Llama of 8 layers, 512 wide, with a vocabulary of 32064; one sample
        of 1000 positions

Every sample has an image that fills the grid of 2 x 2 tiles (tiny) or 1 x 2 (small) and text that fills what is left,
so that nothing is padding: both get the same ids, pixels and labels, padded alike. All parameters
learn, with AdamW, a cosine, and gradients clipped to norm 1. Ours is what a worker of `llavanext train` runs:
MindFormers' trainer with the preset's configuration, the data set and the callback that writes metrics.jsonl. torch has
scaled_dot_product_attention, its fused AdamW, and tensors that are ready before the clock starts.

Each side is a process of its own, compiled and warm; they step in turns, a round at a time, and the median step
counts. Losses of both sides are compared, so that nothing is won by computing something else.

Prints one JSON object; exit code 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from turns import Side, send

BOUND = 1.0
THREADS = 2
WARM = 3
"""Steps before the first round; the first compiles."""
CLOSE = 1e-3
"""Greatest relative difference between the losses of the two sides."""
BATCHES = 4
"""Different batches, in turns."""

SMALL: dict[str, Any] = {
    "image_token_index": 32001,
    "video_token_index": 32000,
    "image_grid_pinpoints": [[224, 448], [448, 224]],
    "text_config.hidden_size": 512,
    "text_config.intermediate_size": 1376,
    "text_config.num_hidden_layers": 8,
    "text_config.num_attention_heads": 8,
    "text_config.num_key_value_heads": 8,
    "text_config.vocab_size": 32064,
    "text_config.max_position_embeddings": 1024,
    "vision_config.hidden_size": 512,
    "vision_config.intermediate_size": 2048,
    "vision_config.num_hidden_layers": 12,
    "vision_config.num_attention_heads": 8,
    "vision_config.image_size": 224,
    "vision_config.patch_size": 14,
}


@dataclass(frozen=True)
class Size:
    """What is trained: images are (height, width); `steps` are timed in each of `rounds` rounds."""

    image: tuple[int, int]
    settings: tuple[str, ...]
    steps: int
    rounds: int

    @property
    def total(self) -> int:
        return WARM + self.rounds * (self.steps + 1)  # the first step of a round is not counted


SIZES = {
    "tiny": Size((96, 96), (), steps=8, rounds=5),
    "small": Size(
        (224, 448),
        (
            "data.seq_length=1000",
            "data.tiles=3",
            "train.batch_size=1",
            "model.text.max_position_embeddings=1024",  # the preset's own model, which the checkpoint's replaces
            "model.image_grid_pinpoints=[[48, 96], [96, 48]]",
        ),
        steps=2,
        rounds=4,
    ),
}


def make_model(folder: Path, size: str) -> None:
    """Write FOLDER/hf as it would come from the hub, and FOLDER/model as `convert` makes it of that."""
    from llavanext_cli.demo.data import QUICK, make_data
    from llavanext_cli.demo.model import write_model
    from llavanext_cli.weights.convert import run_convert
    from llavanext_cli.weights.request import ConvertRequest
    from tests.parity.models import tiny_config, write_hf_folder

    hf = folder / "hf"
    if size == "tiny":
        write_model(hf, make_data(folder / "data", QUICK, seed=0), seed=0)
    else:
        write_hf_folder(hf, tiny_config(SMALL))
        (hf / "added_tokens.json").write_text(json.dumps({"<video>": 32000, "<image>": 32001}))
    run_convert(ConvertRequest(hf, folder / "model"))


def load_preset(size: str) -> Any:
    from llavanext_cli.config import presets

    settings = ("train.learning_rate=1e-4", "train.log_every=1", f"runtime.threads={THREADS}", *SIZES[size].settings)
    return presets.load_preset("tiny-stage2", settings)


def build_samples(folder: Path, size: str, preset: Any) -> list[Any]:
    """`BATCHES` batches of encoded samples; each has as much text as there is room for."""
    from PIL import Image

    from llavanext_cli.processing.processor import Processor
    from llavanext_cli.processing.tokenizer import load_tokenizer
    from llavanext_cli.records import Medium, Sample, Turn
    from llavanext_cli.weights.checkpoint import open_checkpoint

    opened = open_checkpoint(folder / "model")
    processor = Processor(opened.architecture, load_tokenizer(opened.folder))
    rng = np.random.RandomState(0)
    words = ("red", "blue", "green", "top", "left", "bottom", "right", "circle", "square", "one", "two", "three")
    made = []
    for number in range(BATCHES * preset.train.batch_size):
        path = folder / f"image{number}.png"
        Image.fromarray(rng.randint(0, 256, (*SIZES[size].image, 3)).astype(np.uint8)).save(path)
        question = Turn("user", "<image>\nwhat is it?")
        answer: list[str] = []
        encoded = None
        while True:
            answer.append(words[rng.randint(len(words))])
            turns = (question, Turn("assistant", " ".join(answer)))
            longer = processor.encode(Sample(str(number), "", (Medium("image", str(path)),), turns), {})
            if longer.length > preset.data.seq_length:
                break
            encoded = longer
        assert encoded is not None and len(encoded.tiles) == preset.data.tiles
        made.append(encoded)
    return made


def run_torch(folder: Path, size: str) -> Iterator[float]:
    """Train; yields the loss of each step."""
    import torch
    import transformers
    from transformers import LlavaNextVideoForConditionalGeneration

    from llavanext_cli.processing.sample_layout import collate
    from llavanext_cli.weights.checkpoint import open_checkpoint

    torch.set_num_threads(THREADS)
    preset, total = load_preset(size), SIZES[size].total
    train, arch = preset.train, open_checkpoint(folder / "model").architecture
    samples = build_samples(folder, size, preset)
    batches = []
    for begin in range(0, len(samples), train.batch_size):
        part = samples[begin : begin + train.batch_size]
        packed = collate(part, preset.data.seq_length, preset.data.tiles, preset.data.frame_budget, arch)
        labels = torch.full(packed.labels.shape, -100)
        labels[:, 1:] = torch.tensor(packed.labels[:, :-1])  # transformers shifts them itself
        batch = {
            "input_ids": torch.tensor(packed.input_ids).long(),
            "attention_mask": torch.arange(labels.shape[1])[None] < torch.tensor(packed.lengths)[:, None],
            "labels": labels,
            "pixel_values": torch.tensor(packed.tiles),
            "image_sizes": torch.tensor([SIZES[size].image] * len(part)),
        }
        batches.append(batch)
    model = LlavaNextVideoForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.float32).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    options = {"lr": train.learning_rate, "betas": train.betas, "eps": train.epsilon}
    optimizer = torch.optim.AdamW(groups, fused=True, **options)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, int(total * train.warmup_ratio), total)
    for step in range(total):
        optimizer.zero_grad()
        loss = model(**batches[step % BATCHES], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, train.clip_norm)
        optimizer.step()
        schedule.step()
        yield float(loss.detach())


def run_ours(folder: Path, size: str, report: Callable[[float], None]) -> None:
    """Train as a worker of `llavanext train` does; calls `report` with the loss of each step."""
    from llavanext_cli.model.runtime import load_libraries

    preset, total = load_preset(size), SIZES[size].total
    load_libraries(folder / "libraries", "CPU", threads=THREADS)

    from mindformers import Trainer
    from mindspore import Callback

    from llavanext_cli.model.network import build_preset_network
    from llavanext_cli.training.dataset import EncodedSamples, build_dataset
    from llavanext_cli.training.freeze import freeze
    from llavanext_cli.training.metrics import TrainingMonitor
    from llavanext_cli.training.plan import RunPlan
    from llavanext_cli.weights.checkpoint import load_into, open_checkpoint

    class Encoded:
        """Replaces data file and processor: the samples are already encoded."""

        def __init__(self, samples: list[Any], arch: Any):
            self.samples, self.arch, self.roots = samples, arch, None

        def __getitem__(self, index: int) -> Any:
            return self.samples[index % len(self.samples)]

        def encode(self, sample: Any, roots: Any) -> Any:
            return sample

    class Report(Callback):
        def on_train_step_end(self, run_context: Any) -> None:
            report(float(run_context.original_args().net_outputs[0].asnumpy()))

    checkpoint = open_checkpoint(folder / "model")
    made = {"architecture": checkpoint.architecture, "folder": folder / "libraries", "steps": total}
    config, network = build_preset_network(preset, **made)
    load_into(network, checkpoint)
    freeze(network, preset.train)
    source: Any = Encoded(build_samples(folder, size, preset), checkpoint.architecture)
    data = EncodedSamples(source, range(total * preset.train.batch_size), source, preset)
    monitor = TrainingMonitor(
        folder / "metrics.jsonl",
        folder / "checkpoints",
        RunPlan(total * preset.train.batch_size, preset.train.batch_size, total, 1.0),
        preset.train,
    )
    batches = build_dataset(data, batch_size=preset.train.batch_size, workers=1)
    Trainer(args=config, model=network, train_dataset=batches, callbacks=[monitor, Report()]).train()


class Rounds:
    """Times every step, and waits for this side's turn before every round."""

    def __init__(self, size: Size):
        self.size = size
        self.done, self.begun = 0, 0.0
        self.times: list[float] = []
        self.losses: list[float] = []

    def step(self, loss: float) -> None:
        now = time.perf_counter()
        self.losses.append(loss)
        place = (self.done - WARM) % (self.size.steps + 1)
        if self.done >= WARM and place:
            self.times.append(now - self.begun)
        self.done += 1
        if self.done == self.size.total:
            send({"times": self.times, "losses": self.losses}, wait=False)
        elif self.done >= WARM and (self.done - WARM) % (self.size.steps + 1) == 0:
            send({"ready": True})
        self.begun = time.perf_counter()


def run_side(folder: Path, size: str, side: str) -> None:
    rounds = Rounds(SIZES[size])
    if side == "ours":
        run_ours(folder, size, rounds.step)
    else:
        for loss in run_torch(folder, size):
            rounds.step(loss)


def compare(folder: Path, size: str) -> dict[str, Any]:
    """Both sides in turns."""
    if not (folder / "model").exists():
        make_model(folder, size)
    names = ("ours", "torch")
    sides = []
    for name in names:  # one after the other: compiling would disturb
        sides.append(Side([sys.executable, __file__, "--dir", str(folder), "--size", size, "--side", name]))
        sides[-1].receive()
    results = [[side.step() for side in sides] for _ in range(SIZES[size].rounds)][-1]
    for side in sides:
        side.process.wait()
    ours, theirs = results
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=CLOSE, err_msg="the two sides do not learn alike")
    medians = [statistics.median(result["times"]) for result in results]
    return {
        **{name: round(median, 4) for name, median in zip(names, medians, strict=True)},
        **{
            f"{name}_fastest_slowest": [round(min(result["times"]), 4), round(max(result["times"]), 4)]
            for name, result in zip(names, results, strict=True)
        },
        "ratio": round(medians[0] / medians[1], 3),
        "first_last_loss": [round(ours["losses"][0], 4), round(ours["losses"][-1], 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--side", choices=["ours", "torch"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    if options.side:
        run_side(options.dir, options.size, options.side)
        return
    sizes = [options.size] if options.size else list(SIZES)
    report: dict[str, Any] = {size: compare(options.dir.absolute() / size, size) for size in sizes}
    report["within_bounds"] = all(report[size]["ratio"] <= BOUND for size in sizes)
    print(json.dumps(report))
    sys.exit(0 if report["within_bounds"] else 1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()

"""A preset as frozen dataclasses: every key that exists, its type, its unit and its bounds.

`presets.load_preset` makes one from YAML. What no single field can see (devices that do not multiply, a video that is
longer than the sequence) is in `rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llavanext_cli.config.architecture import PART_PREFIXES, Architecture
from llavanext_cli.config.validation import leaves, setting

Task = Literal["train", "ask"]
Part = Literal["vision", "projector", "newline", "language"]
Projection = Literal["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
DType = Literal["bfloat16", "float16", "float32"]
ParameterDType = Literal["bfloat16", "float16", "float32", "stored"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """What one sample may hold: the static shapes of the compiled graph."""

    seq_length: int | None = setting(None, doc="tokens per sample, media included", least=16, task="train")
    tiles: int = setting(0, doc="maximum number of image tiles per sample, base tiles included", least=0)
    frames: int = setting(0, doc="frames taken from a video", least=0, most=10_000)
    videos: int = setting(1, doc="maximum number of videos per sample", least=1)
    shuffle: bool = setting(True, doc="draw the samples in a random order, a new one in each epoch", task="train")
    workers: int = setting(4, doc="processes that read media, per device", least=1, most=64, task="train")

    @property
    def frame_budget(self) -> int:
        """Frames a sample has room for (F): those of all its videos."""
        return self.frames * self.videos


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Peak learning rates of parts of the model that differ from `train.learning_rate`."""

    vision: float | None = setting(None, doc="learning rate of the vision tower; null: train.learning_rate", above=0)
    projector: float | None = setting(
        None, doc="learning rate of projector, pooler and newline; null: the same", above=0
    )
    language: float | None = setting(
        None, doc="learning rate of the language model, or its LoRA; null: the same", above=0
    )


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What `train.method: lora` adds to the language model: W + alpha / rank * B A, with W frozen."""

    rank: int = setting(16, doc="columns of B and rows of A", least=1)
    alpha: float = setting(32.0, doc="B A is multiplied by alpha / rank", above=0)
    dropout: float = setting(0.0, doc="share of A's inputs that training sets to 0", least=0, below=1)
    targets: tuple[Projection, ...] = setting(
        ("wq", "wk", "wv", "wo", "w1", "w2", "w3"),
        doc="attention's query, key, value, output; gate (w1), down (w2), up (w3)",
    )


@dataclass(frozen=True, kw_only=True)
class Train:
    """How the weights are trained."""

    learning_rate: float = setting(doc="peak learning rate", above=0)
    learning_rates: LearningRates = LearningRates()
    trainable: tuple[Part, ...] = setting(tuple(PART_PREFIXES), doc="parts that are trained; the others are frozen")
    method: Literal["full", "lora"] = setting(
        "full", doc="full: train the language model's weights; lora: low-rank matrices beside them"
    )
    lora: Lora = Lora()
    epochs: int = setting(1, doc="passes over the data", least=1, most=10**6)
    steps: int | None = setting(None, doc="optimizer steps; null: as many as the epochs need", least=1, most=10**9)
    batch_size: int = setting(1, doc="samples per device and step", least=1)
    accumulate: int = setting(1, doc="batches whose gradients are summed before a step", least=1)
    final_learning_rate: float = setting(0.0, doc="learning rate at the end of the cosine", least=0)
    warmup_ratio: float = setting(0.03, doc="share of the steps in which the rate rises from 0", least=0, below=1)
    schedule: Literal["cosine", "constant"] = setting("cosine", doc="learning rate after the warm-up")
    weight_decay: float = setting(0.0, doc="AdamW's weight decay", least=0, below=1)
    betas: tuple[float, float] = setting((0.9, 0.999), doc="AdamW's decay rates of the two moments", least=0, below=1)
    epsilon: float = setting(1e-8, doc="AdamW's epsilon", above=0)
    clip_norm: float | None = setting(1.0, doc="maximum global norm of the gradients; null: not clipped", above=0)
    seed: int = setting(0, doc="seed of the sample order and of new weights", least=0, most=2**31 - 1)
    save_every: int = setting(0, doc="steps between checkpoints; 0: only at the end", least=0)
    keep: int = setting(3, doc="number of newest checkpoints that are kept", least=1)
    log_every: int = setting(1, doc="steps between lines of metrics", least=1)
    recompute: int = setting(0, doc="layers of the language model that are recomputed to save memory", least=0)

    @property
    def part_rates(self) -> dict[str, float]:
        """Part of `trainable` → its peak learning rate."""
        of = self.learning_rates
        own = {"vision": of.vision, "projector": of.projector, "newline": of.projector, "language": of.language}
        return {part: own[part] or self.learning_rate for part in self.trainable}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """How an answer is generated."""

    max_new_tokens: int = setting(512, doc="maximum length of an answer, in tokens", least=1)
    cache_tokens: int = setting(doc="room for question, media and answer, in tokens", least=16)
    block_size: int = setting(16, doc="tokens per block of the paged cache", least=1)
    temperature: float = setting(0.0, doc="0: always the likeliest token; higher: more varied", least=0)
    top_p: float = setting(1.0, doc="draw from the likeliest tokens with this share of probability", above=0, most=1)
    top_k: int = setting(0, doc="draw from this many of the likeliest tokens; 0: from all", least=0)
    repetition_penalty: float = setting(1.0, doc="above 1: tokens that already occur become less likely", above=0)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How devices share the work: data * tensor * pipeline = devices."""

    devices: int = setting(1, doc="NPUs, or worker processes on a CPU", least=1)
    data: int = setting(1, doc="groups that work on different samples", least=1)
    tensor: int = setting(1, doc="devices that share each layer", least=1)
    pipeline: int = setting(1, doc="groups of layers, on devices of their own, that work one after the other", least=1)
    optimizer_sharding: bool = setting(
        False, doc="spread the optimizer's state over the data-parallel devices", task="train"
    )


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What the graph runs on and in which precision."""

    target: Literal["Ascend", "CPU"] = setting(doc="Ascend or CPU")
    compute_dtype: DType = setting(doc="precision of the matrix products")
    parameter_dtype: ParameterDType = setting(
        "float32", doc="precision of the weights; stored (ask only): the checkpoint's on CPU, compute_dtype on Ascend"
    )
    flash_attention: bool = setting(False, doc="use the fused attention kernel (Ascend only)")
    memory: str | None = setting(None, doc='memory of each NPU that MindSpore may use, such as "57GB" (Ascend only)')
    threads: int | None = setting(None, doc="threads per worker; null: the workers share all cores (CPU only)", least=1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of a preset's file, `extends` excepted. `train` is None for the task ask, `ask` for the task train."""

    task: Task = setting(doc="train or ask")
    description: str = setting(doc="one line for `llavanext presets list`")
    model: Architecture = Architecture()
    data: Data = Data()
    train: Train | None = None
    ask: Ask | None = None
    parallel: Parallel = Parallel()
    runtime: Runtime


@dataclass(frozen=True, kw_only=True)
class Preset(Settings):
    """Everything a run needs to know except its files.

    Attributes:
        name: of a shipped preset, or of the file without its ending.
        path: the file.
    """

    name: str
    path: Path


def schema_keys() -> dict[str, Any]:
    """Every dotted key that a preset may have, `extends` excepted, with its type."""
    return {key: kind for key, _, kind in leaves(Settings)}

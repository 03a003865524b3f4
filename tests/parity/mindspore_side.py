"""Our side: the network, filled through the shipped converter, with taps that copy each stage out of the graph.

A tap wraps a cell of the shipped network and changes nothing: it assigns what the cell returned to a parameter. So
every stage comes from the compiled graph that also makes the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, nn, ops

from llavanext_cli.model.config import LlavaNextConfig
from llavanext_cli.model.llava_next import LlavaNext
from llavanext_cli.processing.processor import Processor
from llavanext_cli.processing.sample_layout import collate
from llavanext_cli.processing.tokenizer import load_tokenizer
from llavanext_cli.records import IGNORE_INDEX, Batch, EncodedSample
from llavanext_cli.weights.checkpoint import Checkpoint, load_into, open_checkpoint
from llavanext_cli.weights.convert import run_convert
from llavanext_cli.weights.keymap import build_targets
from llavanext_cli.weights.request import ConvertRequest
from tests.parity.cases import FRAMES, Case, build_cases

BATCH = 4
ROOM = 32
"""Positions beyond the longest case, for tokens that are generated without a cache."""


_kept: list[nn.Cell] = []


def keep_alive(network: nn.Cell) -> nn.Cell:
    """Hold on to a network until the process ends.

    MindSpore remembers what it has parsed by the `id` of the object. That of a network that is gone may be given to the
    next, whose compiling then fails ("the parameters number of the function is 1 ...").
    """
    _kept.append(network)
    return network


class Tap(nn.Cell):
    """A cell, and a copy of what it returns; with `features`, also of its second argument."""

    def __init__(self, cell: nn.Cell, name: str, shape: tuple[int, ...], features: tuple[int, ...] = ()):
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.copy = Parameter(ms.Tensor(np.zeros(shape, np.float32)), name=f"tap.{name}", requires_grad=False)
        self.has_features = bool(features)
        if features:
            zeros = ms.Tensor(np.zeros(features, np.float32))
            self.features = Parameter(zeros, name=f"tap.{name}.features", requires_grad=False)

    def construct(self, *args, **kwargs):
        out = self.cell(*args, **kwargs)
        ops.assign(self.copy, out.astype(ms.float32))
        if self.has_features:
            ops.assign(self.features, args[1].astype(ms.float32))
        return out


def read(parameter: Parameter) -> np.ndarray:
    """A copy: what `asnumpy` returns is the parameter's own memory, and changes with the next batch."""
    return parameter.asnumpy().copy()


def wrap(parent: nn.Cell, name: str, label: str, *shapes: tuple[int, ...]) -> Tap:
    """Put a tap in the place of a child, past `__setattr__`, which would rename the child's parameters."""
    tap = Tap(parent._cells[name], label, *shapes)
    tap.set_train(False)
    parent._cells[name] = tap
    return tap


class Model:
    """One converted checkpoint and the static shape of its batches.

    Args:
        source: a Hugging Face folder.
        folder: where the converted one goes.
        names: cases that are computed; None for all.
    """

    def __init__(self, source: Path, folder: Path, names: tuple[str, ...] | None = None):
        run_convert(ConvertRequest(source, folder))
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.arch = self.checkpoint.architecture
        self.processor = Processor(self.arch, load_tokenizer(folder), frames=FRAMES)
        self.cases = build_cases(self.processor, names)
        longest = max(case.encoded.length for case in self.cases)
        self.length = -(-(longest + ROOM) // 16) * 16
        self.tiles = max(len(case.encoded.tiles) for case in self.cases)
        self.frames = max(len(case.encoded.frames) for case in self.cases)

    def build(
        self, *, train: bool = False, dtype: str = "float32", batch: int = BATCH, lora: dict[str, Any] | None = None
    ) -> LlavaNext:
        """The network with the checkpoint's weights."""
        network = LlavaNext(
            LlavaNextConfig(
                architecture=self.arch,
                target="CPU",
                batch_size=batch,
                seq_length=self.length,
                tiles=self.tiles,
                frames=self.frames,
                compute_dtype=dtype,
                param_init_type="float32",
                use_flash_attention=False,
                calculate_per_token_loss=train,
                lora=lora,
            )
        )
        load_into(network, self.checkpoint)
        network.set_train(train)
        return keep_alive(network)

    def collate(self, samples: Sequence[EncodedSample], batch: int = BATCH) -> Batch:
        """Pad to the static shape; the last sample fills what is left of the batch."""
        samples = [*samples, *[samples[-1]] * (batch - len(samples))]
        return collate(samples, self.length, self.tiles, self.frames, self.arch)


class Forward:
    """Logits and every stage before them, from one compiled graph.

    Args:
        dtype: of the products; parameters are float32.
    """

    def __init__(self, model: Model, dtype: str = "float32"):
        self.model = model
        network = self.network = model.build(dtype=dtype)
        arch, tiles, frames = model.arch, model.tiles, model.frames
        hidden = (BATCH, model.length, arch.text.hidden_size)
        table = (BATCH, tiles * arch.tile_features + frames * arch.frame_features, arch.text.hidden_size)
        self.tower = wrap(
            network, "vision_tower", "tower", (BATCH * (tiles + frames), arch.tile_features, arch.vision.hidden_size)
        )
        pooled = arch.vision.hidden_size if arch.pool_before_projector else arch.text.hidden_size
        self.pooler = wrap(network, "pooler", "pooler", (BATCH * frames, arch.frame_features, pooled))
        self.fusion = wrap(network, "fusion", "fusion", hidden, table)
        llama = network.language_model.model
        self.layers = [
            wrap(llama.layers, str(number), f"layer{number}", hidden) for number in range(arch.text.num_hidden_layers)
        ]
        self.norm = wrap(llama, "norm_out", "norm", hidden)

    def logits(self, samples: Sequence[EncodedSample]) -> np.ndarray:
        """`float32[B, S, V]`; afterwards the taps hold the stages."""
        batch = self.model.collate(samples)
        out = self.network(ms.Tensor(batch.input_ids), ms.Tensor(batch.tiles), ms.Tensor(batch.feature_index))
        return out.astype(ms.float32).asnumpy().reshape(*batch.input_ids.shape, -1)

    def stages(self, cases: Sequence[Case]) -> list[dict[str, np.ndarray]]:
        """Each case's own stages, cut out of padded batches: the names of stages.py → arrays."""
        return [stages for begin in range(0, len(cases), BATCH) for stages in self._batch(cases[begin : begin + BATCH])]

    def _batch(self, cases: Sequence[Case]) -> list[dict[str, np.ndarray]]:
        model, arch = self.model, self.model.arch
        logits = self.logits([case.encoded for case in cases])
        tower, pooled = (read(tap.copy).reshape(BATCH, -1, *tap.copy.shape[1:]) for tap in (self.tower, self.pooler))
        table = read(self.fusion.features)
        hidden = {"fused": self.fusion, **{f"layer {i}": tap for i, tap in enumerate(self.layers)}, "norm": self.norm}
        hidden = {name: read(tap.copy) for name, tap in hidden.items()}
        made = []
        for row, case in enumerate(cases):
            sample = case.encoded
            length, tiles, frames = sample.length, len(sample.tiles), len(sample.frames)
            begin = model.tiles * arch.tile_features  # of the frames' rows in the table
            images, videos = table[row, : tiles * arch.tile_features], table[row, begin:]
            stages = {
                "pixels": np.concatenate([sample.tiles, sample.frames]),
                "ids": sample.input_ids,
                "labels": sample.labels,
                "tower": np.concatenate([tower[row, :tiles], tower[row, model.tiles :][:frames]]),
                "pooled": pooled[row, :frames],
                "projected": np.concatenate([images, videos[: frames * arch.frame_features]]),
                **{name: value[row, :length] for name, value in hidden.items()},
                "logits": logits[row, :length],
            }
            made.append(stages)
        return made


class Learning:
    """Loss and gradients, from the graph that training compiles; one case at a time, in a padded batch."""

    def __init__(self, model: Model):
        self.model = model
        network = self.network = model.build(train=True)
        weights = self.weights = ParameterTuple(network.trainable_params())

        def average(*inputs):
            total, tokens = network(*inputs)
            return (total / tokens).reshape(())

        self.step = ms.jit(ms.value_and_grad(average, None, weights))

    def __call__(self, samples: Sequence[EncodedSample]) -> tuple[float, dict[str, np.ndarray]]:
        """The loss over the supervised tokens of up to `BATCH` samples, and the gradient of every parameter."""
        batch = self.model.collate(samples)
        labels = batch.labels.copy()
        labels[len(samples) :] = IGNORE_INDEX  # what fills the batch
        inputs = (batch.input_ids, batch.tiles, batch.feature_index, labels)
        loss, gradients = self.step(*[ms.Tensor(value) for value in inputs])
        named = {weight.name: value.asnumpy().copy() for weight, value in zip(self.weights, gradients, strict=True)}
        return float(loss.asnumpy()), named


def hub_gradients(model: Model, gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients of our parameters as those of transformers', by the converter's own table."""
    return {
        source: part
        for target in build_targets(model.arch)
        for source, part in zip(
            target.sources, np.split(gradients[target.name], len(target.sources), axis=0), strict=True
        )
    }

"""Memory of one device while it trains, computed before anything is compiled.

    exact      weights, gradients, AdamW's moments: from their slices, by MindSpore's own rules (`slice_of`)
    estimated  gathered weights and what the backward pass needs of the forward one (`activation_bytes`)

A test compares the exact part with the slices that MindSpore's planner makes of every shipped preset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llavanext_cli.training.freeze import is_trainable
from llavanext_cli.weights.adapter import adapter_parameters, is_adapter
from llavanext_cli.weights.keymap import expected_parameters

if TYPE_CHECKING:
    from llavanext_cli.config.architecture import Architecture
    from llavanext_cli.config.schema import Preset

GIB = 1 << 30
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
SHARD_FROM = 64 << 10
"""MindSpore spreads a parameter's optimizer state when its slice has at least this many bytes
(`parallel_optimizer_threshold`)."""

ROWS = ("tok_embeddings", "lm_head", "wq", "wk", "wv", "w1", "w3", "projector.linear_1")
COLUMNS = ("wo", "w2", "projector.linear_2")
"""Weights that tensor parallelism cuts along the first, and along the second axis; the tower is never cut."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device. `weights`, `gradients`, `optimizer` are exact, `gathered` and `activations` estimates.

    `pool` is the preset's; None when it sets none.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    pool: int | None

    @property
    def parts(self) -> dict[str, int]:
        """Everything that counts, by name."""
        names = ("weights", "gradients", "optimizer", "gathered", "activations")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.pool is None or self.total <= self.pool


def plan_memory(preset: Preset, architecture: Architecture | None = None) -> MemoryPlan:
    """What training takes on each device.

    Args:
        preset: a train preset.
        architecture: the checkpoint's; None for the preset's.
    """
    assert preset.train is not None, "a train preset"
    model = architecture or preset.model
    weights = gradients = gathered = moments = 0
    # The gradients of a batch, and their sum over the batches of a step.
    copies = (
        2 if preset.train.accumulate > 1 and preset.parallel.devices > 1 and preset.runtime.target == "Ascend" else 1
    )
    for name, shape in trained_parameters(preset, model).items():
        size = value_bytes(name, preset)
        count = math.prod(slice_of(name, shape, preset))
        weights += count * size
        if is_trainable(name, preset.train):
            gradients += copies * count * size
            moments += count * 2 * BYTES["float32"]
        whole = math.prod(_tensor_slice(name, shape, preset.parallel.tensor))
        # A weight that is spread is gathered for its use, and kept in the compute type until the backward pass.
        gathered += whole * BYTES[preset.runtime.compute_dtype] if whole > count else 0
    pool = preset.runtime.memory and int(float(preset.runtime.memory[:-2]) * GIB)
    return MemoryPlan(weights, gradients, moments, gathered, activation_bytes(preset, model), pool or None)


def trained_parameters(preset: Preset, model: Architecture) -> dict[str, tuple[int, ...]]:
    """Name → shape of everything the network holds while it trains: its weights, and LoRA's matrices."""
    train = preset.train
    return expected_parameters(model) | (adapter_parameters(model, train.lora) if train.method == "lora" else {})


def checkpoint_bytes(preset: Preset, model: Architecture) -> tuple[int, int]:
    """Bytes on the disk of the trained model, and of one checkpoint on the way: with AdamW's moments, and LoRA's
    matrices."""
    assert preset.train is not None, "a train preset"
    written = saved = 0
    for name, shape in trained_parameters(preset, model).items():
        count, kept = math.prod(shape), value_bytes(name, preset)
        written += 0 if is_adapter(name) else count * kept
        saved += count * kept + (count * 2 * BYTES["float32"] if is_trainable(name, preset.train) else 0)
    return written, saved


def value_bytes(name: str, preset: Preset) -> int:
    """Of one value of a parameter; LoRA's matrices are float32 whatever the weights are."""
    return BYTES["float32" if is_adapter(name) else preset.runtime.parameter_dtype]


def slice_of(name: str, shape: tuple[int, ...], preset: Preset) -> tuple[int, ...]:
    """The shape of a parameter on one device: cut by tensor parallelism, then along its first axis among all devices
    that would otherwise hold the same, when optimizer sharding is on, the slice is large enough and it comes out even.
    """
    parallel = preset.parallel
    cut = _tensor_slice(name, shape, parallel.tensor)
    if not parallel.optimizer_sharding or "norm" in name:
        return cut
    copies = parallel.data * parallel.tensor // (math.prod(shape) // math.prod(cut))
    large = math.prod(cut) * value_bytes(name, preset) >= SHARD_FROM
    return (cut[0] // copies, *cut[1:]) if large and cut[0] % copies == 0 else cut


def _tensor_slice(name: str, shape: tuple[int, ...], ways: int) -> tuple[int, ...]:
    if name.startswith("vision_tower"):
        return shape
    layer, _, kind = name.rpartition(".")
    if layer.endswith(ROWS) and kind != "lora_a":
        return (shape[0] // ways, *shape[1:])
    if layer.endswith(COLUMNS) and kind in ("weight", "lora_a"):
        return (shape[0], shape[1] // ways)
    return shape


def activation_bytes(preset: Preset, model: Architecture) -> int:
    """What the backward pass needs of the forward one, an estimate.

    With c bytes a value of the compute type, a layer of width D and inner width F keeps for every token

        Llama   two inputs and two norms in float32 (8 + 2c each), q, k, v, context: (16 + 8c) D, and gate, its
                activation, up and their product: 4c F
        tower   the same with (16 + 8c) D, and fc1, its activation's two parts and the result: 4c F

    without flash attention also heads x length scores: 16 + 6c bytes each (scaled, masked, their softmax, casts,
    gradients); on a CPU 2c (weights and their gradient), of which causality spares up to half. A layer that is
    computed again keeps its input, c D. To this come the logits (float32, their softmax and gradient: 12 + c bytes
    each), on a CPU only those of positions with a label: how many is not known here, and all are counted. Tensor
    parallelism cuts all of Llama's, as sequence parallelism is on with it. Gradient accumulation changes nothing.
    """
    train, text, vision = preset.train, model.text, model.vision
    c = BYTES[preset.runtime.compute_dtype]
    score = 2 * c if preset.runtime.target == "CPU" else 0 if preset.runtime.flash_attention else 16 + 6 * c
    tokens = train.batch_size * preset.data.seq_length

    def layer(width: int, inner: int, heads: int, length: int) -> int:
        return (16 + 8 * c) * width + 4 * c * inner + heads * length * score

    full = layer(text.hidden_size, text.intermediate_size, text.num_attention_heads, preset.data.seq_length)
    again = min(train.recompute, text.num_hidden_layers)
    kept = text.num_hidden_layers - again
    llama = tokens * (kept * full + again * c * text.hidden_size + (full if again and not kept else 0))
    logits = tokens * text.vocab_size * (12 + c)
    patches = vision.patches**2 + 1
    rows = train.batch_size * (preset.data.tiles + preset.data.frame_budget) * patches
    # Without a trained tower nothing below the projector has a gradient, and nothing is kept.
    layers = model.vision_layers if "vision" in train.trainable else 1
    tower = rows * layers * layer(vision.hidden_size, vision.intermediate_size, vision.num_attention_heads, patches)
    projector = rows * (3 * text.hidden_size * c + 8 * text.hidden_size)
    return (llama + logits) // preset.parallel.tensor + tower + projector


def advice(preset: Preset, model: Architecture) -> str:
    """What to change when it does not fit: the first of these that is not yet done."""
    train, parallel = preset.train, preset.parallel
    if train.recompute < model.text.num_hidden_layers:
        return f"--set train.recompute={model.text.num_hidden_layers} computes layers again and saves most"
    if train.batch_size > 1:
        return f"--set train.batch_size=1 --set train.accumulate={train.accumulate * train.batch_size}"
    if parallel.data > 1 and not parallel.optimizer_sharding:
        return "--set parallel.optimizer_sharding=true spreads the optimizer's state"
    if parallel.tensor < 8 and parallel.data % 2 == 0:
        return f"--set parallel.tensor={parallel.tensor * 2} --set parallel.data={parallel.data // 2}"
    return "use more devices or train.method=lora, train fewer parts (train.trainable), or lower data.seq_length"

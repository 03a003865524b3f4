"""Rules between the fields of a preset. Each yields (the keys it read, what is wrong); all are tried."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace

from llavanext_cli.config.architecture import (
    ACTIVATIONS,
    POOL_MODES,
    SELECT_STRATEGIES,
    TEXT_MODEL_TYPES,
    Architecture,
    TextArchitecture,
)
from llavanext_cli.config.schema import Ask, Lora, Preset, Train

TEXT_ROOM = 64
"""Tokens that the system prompt and a short question need beside the media."""

Findings = Iterator[tuple[tuple[str, ...], str]]
Rule = Callable[[Preset], Findings]


def check_preset(preset: Preset, model: Architecture | None = None) -> list[tuple[tuple[str, ...], str]]:
    """Everything that is wrong between fields, as (dotted keys, message); empty when all is well.

    Args:
        model: of the checkpoint that a run takes; it is judged in the place of the preset's. Whether there is room is
            then left to what is really asked.
    """
    if model is None:
        rules: Sequence[Rule] = (*MODEL_RULES, *SHARING_RULES, *ROOM_RULES)
    else:
        preset, rules = replace(preset, model=model), SHARING_RULES
    found = [finding for rule in rules for finding in rule(preset)]
    if preset.train is not None:
        found += train_rules(preset, preset.train)
    if preset.ask is not None:
        found += ask_rules(preset, preset.ask)
    return found


def has_room(preset: Preset, model: Architecture) -> bool:
    """Whether a preset has room for the largest picture and clip of a checkpoint's model, and positions for both."""
    return not any(finding for rule in ROOM_RULES for finding in rule(replace(preset, model=model)))


def greatest_positions(text: TextArchitecture) -> int:
    """Tokens that the position encoding reaches: linear scaling stretches it by its factor."""
    return int(text.max_position_embeddings * (text.rope_scaling or {}).get("factor", 1))


def greatest_tiles(model: Architecture) -> int:
    """Tiles of the largest picture: its base tile and the grid of the largest pinpoint."""
    side = model.vision.image_size
    return 1 + max((height // side) * (width // side) for height, width in model.image_grid_pinpoints)


def vision_rules(preset: Preset) -> Findings:
    vision = preset.model.vision
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    ):
        yield from _positive(f"model.vision.{name}", getattr(vision, name))
    if vision.num_attention_heads > 0 and vision.hidden_size % vision.num_attention_heads:
        yield (
            ("model.vision.hidden_size", "model.vision.num_attention_heads"),
            f"{vision.hidden_size} channels cannot be shared by {vision.num_attention_heads} heads",
        )
    if vision.patch_size > 0 and vision.image_size % vision.patch_size:
        yield (
            ("model.vision.image_size", "model.vision.patch_size"),
            f"{vision.image_size} pixels are not a whole number of patches of {vision.patch_size}",
        )
    yield from _choice("model.vision.hidden_act", vision.hidden_act, ACTIVATIONS)


def text_rules(preset: Preset) -> Findings:
    text = preset.model.text
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    for name in sizes:
        yield from _positive(f"model.text.{name}", getattr(text, name))
    yield from _choice("model.text.model_type", text.model_type, TEXT_MODEL_TYPES)
    heads = text.num_attention_heads
    if heads > 0 and (text.hidden_size % heads or text.hidden_size // heads % 2):
        yield (
            ("model.text.hidden_size", "model.text.num_attention_heads"),
            f"{text.hidden_size} channels over {heads} heads must give an even whole number a head",
        )
    if text.num_key_value_heads > 0 and heads % text.num_key_value_heads:
        yield (
            ("model.text.num_key_value_heads", "model.text.num_attention_heads"),
            f"{heads} heads cannot be grouped over {text.num_key_value_heads} key-value heads",
        )
    scaling = text.rope_scaling
    if scaling is not None:
        factor = scaling.get("factor")
        stretches = isinstance(factor, (int, float)) and not isinstance(factor, bool) and 1 <= factor < math.inf
        if set(scaling) != {"type", "factor"} or scaling["type"] != "linear" or not stretches:
            yield (
                ("model.text.rope_scaling",),
                f"must be null or {{type: linear, factor: 1 or more}}, not {scaling}",
            )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        yield from _token(f"model.text.{name}", getattr(text, name), text.vocab_size)


def joint_rules(preset: Preset) -> Findings:
    model = preset.model
    side, layers = model.vision.image_size, model.vision.num_hidden_layers
    vocabulary = model.text.vocab_size
    yield from _token("model.image_token_index", model.image_token_index, vocabulary)
    yield from _token("model.video_token_index", model.video_token_index, vocabulary)
    if model.image_token_index == model.video_token_index:
        yield ("model.image_token_index", "model.video_token_index"), "pictures and clips need different token ids"
    yield from _choice("model.projector_hidden_act", model.projector_hidden_act, ACTIVATIONS)
    yield from _choice("model.spatial_pool_mode", model.spatial_pool_mode, POOL_MODES)
    yield from _choice("model.vision_feature_select_strategy", model.vision_feature_select_strategy, SELECT_STRATEGIES)
    if not model.image_grid_pinpoints:
        yield ("model.image_grid_pinpoints",), "must name at least one (height, width)"
    for pinpoint in model.image_grid_pinpoints:
        if side > 0 and any(pixels <= 0 or pixels % side for pixels in pinpoint):
            yield (
                ("model.image_grid_pinpoints", "model.vision.image_size"),
                f"{list(pinpoint)} is not a whole number of tiles of {side} pixels",
            )
    if not -layers - 1 <= model.vision_feature_layer <= layers:
        yield (
            ("model.vision_feature_layer", "model.vision.num_hidden_layers"),
            f"layer {model.vision_feature_layer} does not exist: the tower has {layers}",
        )
    if model.vision.patch_size > 0 and not 1 <= model.spatial_pool_stride <= model.vision.patches:
        yield (
            ("model.spatial_pool_stride", "model.vision.image_size", "model.vision.patch_size"),
            f"a stride of {model.spatial_pool_stride} leaves nothing of {model.vision.patches} patches a side",
        )


def uneven_shares(text: TextArchitecture, tensor: int) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) of a language model whose layers `tensor` devices cannot share."""
    for name in ("num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size"):
        size = getattr(text, name)
        if size % tensor:
            yield name, f"{tensor} devices cannot share {name} {size} evenly"


def parallel_rules(preset: Preset) -> Findings:
    parallel, text = preset.parallel, preset.model.text
    product = parallel.data * parallel.tensor * parallel.pipeline
    if product != parallel.devices:
        yield (
            ("parallel.devices", "parallel.data", "parallel.tensor", "parallel.pipeline"),
            f"{parallel.devices} devices, but data {parallel.data} x tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline} = {product}",
        )
    if preset.ask and parallel.data > 1:
        yield ("parallel.data",), "one answer has no samples to be shared: set it to 1 and use parallel.tensor"
    for name, problem in uneven_shares(text, parallel.tensor):
        yield ("parallel.tensor", f"model.text.{name}"), problem
    if parallel.pipeline > 1:
        # Compiled in simulation: "Can not find border of the pipeline", with the tower on stage 0 and without.
        yield (
            ("parallel.pipeline",),
            "MindSpore 2.9.0 finds no border between stages in this model's graph: set it to 1 and use parallel.tensor",
        )
    if preset.runtime.target == "CPU":
        if parallel.tensor > 1 and preset.train:
            yield (
                ("parallel.tensor", "runtime.target"),
                "CPU workers share the samples only: set it to 1 and use parallel.data",
            )
        if parallel.optimizer_sharding:
            yield ("parallel.optimizer_sharding", "runtime.target"), "is for Ascend only: set it to false on CPU"


def runtime_rules(preset: Preset) -> Findings:
    runtime = preset.runtime
    if runtime.target == "CPU":
        for name in ("compute_dtype", "parameter_dtype"):
            if getattr(runtime, name) == "bfloat16":
                yield (
                    (f"runtime.{name}", "runtime.target"),
                    "MindSpore has no bfloat16 matrix product on CPU: use float32",
                )
        if runtime.flash_attention:
            yield ("runtime.flash_attention", "runtime.target"), "there is no such kernel on CPU: set it to false"
        if runtime.memory is not None:
            yield ("runtime.memory", "runtime.target"), "is the memory pool of an NPU: set it to null on CPU"
    else:
        if runtime.threads is not None:
            yield ("runtime.threads", "runtime.target"), "is for CPU workers: set it to null on Ascend"
        if runtime.memory is not None and not re.fullmatch(r"(?!0+(\.0+)?GB)[0-9]+(\.[0-9]+)?GB", runtime.memory):
            yield ("runtime.memory",), f'must be a number of gigabytes such as "57GB", not {runtime.memory!r}'


def media_rules(preset: Preset) -> Findings:
    data, model = preset.data, preset.model
    if not data.tiles and not data.frames:
        yield ("data.tiles", "data.frames"), "leave room for pictures (tiles), clips (frames) or both"
    if not _measurable(model):
        return
    needed = greatest_tiles(model)
    if 0 < data.tiles < needed:
        yield (
            ("data.tiles", "model.image_grid_pinpoints", "model.vision.image_size"),
            f"{data.tiles} tiles, but one picture can take {needed}: set {needed} or more, or 0 for no pictures",
        )


def _media_tokens(preset: Preset) -> tuple[int, str]:
    """Tokens of the media that the preset must have room for, and how they come about."""
    data, model = preset.data, preset.model
    clips = data.frame_budget * model.frame_features
    picture = model.greatest_picture_tokens if data.tiles else 0
    if clips >= picture:
        return clips, f"{data.frame_budget} frames of {model.frame_features} tokens make {clips}"
    return picture, f"one picture can make {picture} tokens"


_MEDIA_KEYS = (
    "data.tiles",
    "data.frames",
    "data.videos",
    "model.image_grid_pinpoints",
    "model.spatial_pool_stride",
    "model.vision.image_size",
    "model.vision.patch_size",
)


def _measurable(model: Architecture) -> bool:
    """Whether tokens can be counted at all; if not, another rule has said why."""
    vision, factor = model.vision, (model.text.rope_scaling or {}).get("factor", 1)
    return (
        min(vision.image_size, vision.patch_size, model.spatial_pool_stride) > 0
        and bool(model.image_grid_pinpoints)
        and isinstance(factor, (int, float))
        and math.isfinite(factor)
    )


def _room(preset: Preset, key: str, tokens: int, answer: int, answer_words: str) -> Findings:
    """Rules of the longest sequence: within the positions, and with room for media, some text and an answer."""
    if not _measurable(preset.model):
        return
    positions = greatest_positions(preset.model.text)
    if tokens > positions:
        yield (
            (key, "model.text.max_position_embeddings", "model.text.rope_scaling"),
            f"{tokens} tokens, but positions reach {positions}: use at most that, or raise "
            "model.text.rope_scaling.factor",
        )
    media, reason = _media_tokens(preset)
    if media + TEXT_ROOM + answer > tokens:
        yield (
            (key, *_MEDIA_KEYS),
            f"{tokens} tokens are too few: {reason}, text needs at least {TEXT_ROOM}{answer_words}; "
            f"set {media + TEXT_ROOM + answer} or more",
        )


def room_rules(preset: Preset) -> Findings:
    length, ask = preset.data.seq_length, preset.ask
    if preset.train and length is not None:
        yield from _room(preset, "data.seq_length", length, 0, "")
    if ask and ask.cache_tokens is not None:
        answer_words = f" and the answer {ask.max_new_tokens} (ask.max_new_tokens)"
        for keys, text in _room(preset, "ask.cache_tokens", ask.cache_tokens, ask.max_new_tokens, answer_words):
            yield (*keys, "ask.max_new_tokens"), text


MODEL_RULES = (vision_rules, text_rules, joint_rules)
SHARING_RULES = (parallel_rules, runtime_rules)
ROOM_RULES = (media_rules, room_rules)


def train_rules(preset: Preset, train: Train) -> Findings:
    if not train.trainable:
        yield ("train.trainable",), "nothing would be trained: name at least one part"
    if len(set(train.trainable)) < len(train.trainable):
        yield ("train.trainable",), "a part is named twice"
    yield from _rate_rules(train)
    yield from _lora_rules(train)
    if train.recompute > preset.model.text.num_hidden_layers:
        yield (
            ("train.recompute", "model.text.num_hidden_layers"),
            f"{train.recompute} layers, but the language model has {preset.model.text.num_hidden_layers}",
        )
    if preset.runtime.compute_dtype == "float16":
        yield (
            ("runtime.compute_dtype",),
            "float16 training needs loss scaling, which is not done: use bfloat16 on Ascend, float32 on CPU",
        )


def _rate_rules(train: Train) -> Findings:
    own = {f"train.learning_rates.{part}": rate for part, rate in asdict(train.learning_rates).items()}
    for key, rate in {"train.learning_rate": train.learning_rate, **own}.items():
        if rate is not None and train.final_learning_rate > rate:
            keys = ("train.final_learning_rate", key)
            yield keys, f"{train.final_learning_rate:g} is above the learning rate {rate:g}"
    for key, rate in own.items():
        part = key.rpartition(".")[2]
        if rate is not None and not {part, "newline" if part == "projector" else part} & set(train.trainable):
            yield (key, "train.trainable"), f"the part {part} is not trained: leave its rate out, or add it"


def _lora_rules(train: Train) -> Findings:
    if train.method == "full" and train.lora != Lora():
        yield ("train.lora", "train.method"), "is read by train.method lora only: set that, or leave it out"
    if train.method == "lora" and "language" not in train.trainable:
        yield ("train.method", "train.trainable"), "lora trains the language model: add language to train.trainable"
    if not train.lora.targets:
        yield ("train.lora.targets",), "nothing would be trained: name at least one projection"
    if len(set(train.lora.targets)) < len(train.lora.targets):
        yield ("train.lora.targets",), "a projection is named twice"


def ask_rules(preset: Preset, ask: Ask) -> Findings:
    if ask.cache_tokens is None:
        return
    if ask.cache_tokens % ask.block_size:
        yield (
            ("ask.cache_tokens", "ask.block_size"),
            f"{ask.cache_tokens} tokens are not a whole number of blocks of {ask.block_size}",
        )
    if ask.top_k > preset.model.text.vocab_size:
        yield (
            ("ask.top_k", "model.text.vocab_size"),
            f"{ask.top_k} is more than the vocabulary's {preset.model.text.vocab_size}",
        )


def _positive(key: str, value: int) -> Findings:
    if value <= 0:
        yield (key,), f"must be more than 0, got {value}"


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> Findings:
    if value not in allowed:
        yield (key,), f"expected one of {', '.join(allowed)}, not {value!r}"


def _token(key: str, value: int, vocabulary: int) -> Findings:
    if not 0 <= value < vocabulary:
        yield (key, "model.text.vocab_size"), f"token {value} is outside the vocabulary of {vocabulary}"

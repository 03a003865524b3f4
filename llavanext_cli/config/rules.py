"""Rules between fields. Each yields (the keys that it read, what is wrong with the first of them); all are tried.

vision_rules, text_rules, joint_rules    of an architecture, for presets and for a checkpoint's config.json
check_preset                             those, and everything else in a preset
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

from llavanext_cli.config.architecture import Architecture, TextArchitecture, VisionArchitecture
from llavanext_cli.config.schema import Ask, Lora, Settings, Train
from llavanext_cli.config.validation import join

TEXT_ROOM = 64
"""Tokens that the system prompt and a short question need beside the media."""

Findings = Iterator[tuple[tuple[str, ...], str]]
Rule = Callable[[Settings], Findings]


def check_preset(preset: Settings, model: Architecture | None = None) -> Findings:
    """Everything that is wrong between the fields of a preset, with dotted keys.

    Args:
        model: of the checkpoint that is trained or asked with the preset; it takes the place of the preset's. It was
            checked when it was read, and the samples or questions will show whether the sequence is long enough.
    """
    if model is None:
        rules: tuple[Rule, ...] = (model_rules, parallel_rules, runtime_rules, *ROOM_RULES)
    else:
        preset, rules = replace(preset, model=model), (parallel_rules, runtime_rules)
    for rule in rules:
        yield from rule(preset)
    if preset.train is not None:
        yield from train_rules(preset, preset.train)
    if preset.ask is not None:
        yield from ask_rules(preset, preset.ask)


def has_room(preset: Settings, model: Architecture) -> bool:
    """Whether a preset has room for the largest image and video of a checkpoint's model, and positions for both."""
    return not any(finding for rule in ROOM_RULES for finding in rule(replace(preset, model=model)))


def below(prefix: str, findings: Findings) -> Findings:
    """The findings with their keys below a prefix, or as they are where that is empty."""
    for keys, text in findings:
        yield tuple(join(prefix, key) for key in keys), text


# -------------------------------------------------------------------------------------------------- the architecture


def vision_rules(vision: VisionArchitecture) -> Findings:
    if vision.hidden_size % vision.num_attention_heads:
        yield (
            ("num_attention_heads", "hidden_size"),
            f"hidden_size {vision.hidden_size} is not a multiple of the {vision.num_attention_heads} heads",
        )
    if vision.image_size % vision.patch_size:
        yield (
            ("image_size", "patch_size"),
            f"{vision.image_size} is not a multiple of patch_size {vision.patch_size}",
        )


def text_rules(text: TextArchitecture) -> Findings:
    heads = text.num_attention_heads
    if text.hidden_size % (2 * heads):  # rotary positions turn the two halves of a head
        yield (
            ("num_attention_heads", "hidden_size"),
            f"hidden_size {text.hidden_size} divided by {heads} heads must be an even integer",
        )
    if heads % text.num_key_value_heads:
        yield (
            ("num_key_value_heads", "num_attention_heads"),
            f"the {heads} attention heads are not a multiple of {text.num_key_value_heads}",
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        yield from _token_rule(name, getattr(text, name), "vocab_size", text.vocab_size)


def joint_rules(model: Architecture, vision: str = "vision", text: str = "text") -> Findings:
    """Of tower, language model and what joins them; `vision` and `text` are what the file calls these two."""
    side, layers, patches = model.vision.image_size, model.vision.num_hidden_layers, model.vision.patches
    for name in ("image_token_index", "video_token_index"):
        yield from _token_rule(name, getattr(model, name), f"{text}.vocab_size", model.text.vocab_size)
    if not model.image_grid_pinpoints:
        yield ("image_grid_pinpoints",), "must name at least one [height, width]"
    for height, width in model.image_grid_pinpoints:
        if height % side or width % side:
            yield (
                ("image_grid_pinpoints", f"{vision}.image_size"),
                f"[{height}, {width}] is not a multiple of the tile's {side} pixels",
            )
    if not -layers - 1 <= model.vision_feature_layer <= layers:
        yield (
            ("vision_feature_layer", f"{vision}.num_hidden_layers"),
            f"layer {model.vision_feature_layer} does not exist: the tower has {layers}",
        )
    if model.spatial_pool_stride > patches:
        yield (
            ("spatial_pool_stride", f"{vision}.image_size", f"{vision}.patch_size"),
            f"{model.spatial_pool_stride} is more than the {patches} patches along a side of a tile",
        )
    if model.spatial_pool_mode == "conv" and not model.pool_before_projector:
        yield (
            ("pool_before_projector", "spatial_pool_mode"),
            "must be true with spatial_pool_mode conv: its convolution pools the tower's features",
        )


def model_rules(preset: Settings) -> Findings:
    model = preset.model
    yield from below("model.vision", vision_rules(model.vision))
    yield from below("model.text", text_rules(model.text))
    yield from below("model", joint_rules(model))
    if model.image_token_index == model.video_token_index:
        yield ("model.image_token_index", "model.video_token_index"), "images and videos need different token ids"


def _token_rule(key: str, token: int, vocabulary_key: str, vocabulary: int) -> Findings:
    if token >= vocabulary:
        yield (key, vocabulary_key), f"token {token} is outside the vocabulary of {vocabulary}"


# ------------------------------------------------------------------------------------------- devices and the runtime


def parallel_rules(preset: Settings) -> Findings:
    parallel = preset.parallel
    product = parallel.data * parallel.tensor * parallel.pipeline
    if product != parallel.devices:
        yield (
            ("parallel.devices", "parallel.data", "parallel.tensor", "parallel.pipeline"),
            f"{parallel.devices} devices, but data {parallel.data} x tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline} = {product}",
        )
    if preset.ask and parallel.data > 1:
        yield ("parallel.data",), "data parallelism is for training: set it to 1 and use parallel.tensor"
    for name in ("num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size"):
        size = getattr(preset.model.text, name)
        if size % parallel.tensor:
            keys = ("parallel.tensor", f"model.text.{name}")
            yield keys, f"{parallel.tensor} devices cannot share {name} {size} evenly"
    if parallel.pipeline > 1:
        # Compiled in simulation: "Can not find border of the pipeline", with the tower on stage 0 and without.
        yield (
            ("parallel.pipeline",),
            "MindSpore 2.9.0 cannot split this model into pipeline stages: set it to 1 and use parallel.tensor",
        )
    if preset.runtime.target == "CPU":
        if parallel.tensor > 1 and preset.train:
            yield (
                ("parallel.tensor", "runtime.target"),
                "training on CPU has data parallelism only: set it to 1 and use parallel.data",
            )
        if parallel.optimizer_sharding:
            yield ("parallel.optimizer_sharding", "runtime.target"), "is for Ascend only: set it to false on CPU"


def runtime_rules(preset: Settings) -> Findings:
    runtime = preset.runtime
    on_cpu = runtime.target == "CPU"
    if on_cpu and (runtime.compute_dtype == "bfloat16" or (preset.ask and runtime.compute_dtype != "float32")):
        yield (
            ("runtime.compute_dtype", "runtime.target"),
            f"MindSpore cannot multiply {runtime.compute_dtype} matrices on CPU: use float32",
        )
    if on_cpu and preset.ask and runtime.parameter_dtype not in ("float32", "stored"):
        yield (
            ("runtime.parameter_dtype", "runtime.target"),
            "answers on CPU need stored (weights are widened when they are used) or float32 (all of them at once)",
        )
    if on_cpu and preset.train and runtime.parameter_dtype == "bfloat16":
        yield (
            ("runtime.parameter_dtype", "runtime.target"),
            "MindSpore cannot multiply bfloat16 matrices on CPU: use float32",
        )
    if preset.train and runtime.parameter_dtype == "stored":
        yield ("runtime.parameter_dtype",), "stored is for ask presets: use float32"
    if on_cpu and runtime.flash_attention:
        yield ("runtime.flash_attention", "runtime.target"), "is for Ascend only: set it to false on CPU"
    if on_cpu and runtime.memory is not None:
        yield ("runtime.memory", "runtime.target"), "is for Ascend only: set it to null on CPU"
    if not on_cpu and runtime.threads is not None:
        yield ("runtime.threads", "runtime.target"), "is for CPU only: set it to null on Ascend"
    if (
        not on_cpu
        and runtime.memory is not None
        and not re.fullmatch(r"(?=.*[1-9])[0-9]+(\.[0-9]+)?GB", runtime.memory)
    ):
        yield ("runtime.memory",), f'must be a number of gigabytes such as "57GB", not {runtime.memory!r}'


# -------------------------------------------------------------------------------------- room in a sample or a question


def media_rules(preset: Settings) -> Findings:
    data, needed = preset.data, preset.model.max_tiles
    if not data.tiles and not data.frames:
        yield ("data.tiles", "data.frames"), "set tiles for images, frames for videos, or both"
    if 0 < data.tiles < needed:
        yield (
            ("data.tiles", "model.image_grid_pinpoints", "model.vision.image_size"),
            f"{data.tiles} tiles, but one image can take {needed}: set {needed} or more, or 0 for no images",
        )


def room_rules(preset: Settings) -> Findings:
    """The longest sequence is within the positions, and has room for media, some text and an answer."""
    answer, answer_words = 0, ""
    if preset.train:
        key, tokens = "data.seq_length", preset.data.seq_length
    else:
        key, tokens = "ask.cache_tokens", preset.ask.cache_tokens if preset.ask else None
    if tokens is None:  # missing or invalid, which is reported
        return
    if preset.ask:
        answer = preset.ask.max_new_tokens
        answer_words = f", the answer up to {answer} (ask.max_new_tokens)"
    data, model = preset.data, preset.model
    if tokens > model.text.positions:
        yield (
            (key, "model.text.max_position_embeddings", "model.text.rope_scaling"),
            f"{tokens} tokens, but the model has {model.text.positions} positions: use at most that, or raise "
            "model.text.rope_scaling.factor",
        )
    frames = data.frame_budget * model.frame_features
    image = model.max_image_tokens if data.tiles else 0
    media = max(frames, image)
    words = f"{data.frame_budget} frames of {model.frame_features} tokens need {frames}"
    needed = media + TEXT_ROOM + answer
    if needed > tokens:
        yield (
            (key, *_ROOM_KEYS, *(["ask.max_new_tokens"] if preset.ask else [])),
            f"{tokens} tokens are too few: {words if frames >= image else f'one image can need {image}'}, "
            f"text at least {TEXT_ROOM}{answer_words}; set {needed} or more",
        )


_ROOM_KEYS = (
    *("data.tiles", "data.frames", "data.videos", "model.image_grid_pinpoints"),
    *("model.spatial_pool_stride", "model.vision.image_size", "model.vision.patch_size"),
)
ROOM_RULES: tuple[Rule, ...] = (media_rules, room_rules)


# ------------------------------------------------------------------------------------------------- training and asking


def train_rules(preset: Settings, train: Train) -> Findings:
    if preset.data.seq_length is None:
        yield ("data.seq_length",), "missing: tokens per sample, media included"
    yield from _list_rules("train.trainable", train.trainable, "part")
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
            "float16 training needs loss scaling, which is not supported: use bfloat16 on Ascend, float32 on CPU",
        )


def _list_rules(key: str, names: tuple[str, ...], word: str) -> Findings:
    if not names:
        yield (key,), f"nothing would be trained: name at least one {word}"
    if len(set(names)) < len(names):
        yield (key,), f"names a {word} twice"


def _rate_rules(train: Train) -> Findings:
    rates = {f"train.learning_rates.{part}": rate for part, rate in asdict(train.learning_rates).items()}
    for key, rate in {"train.learning_rate": train.learning_rate, **rates}.items():
        if rate is not None and train.final_learning_rate > rate:
            keys = ("train.final_learning_rate", key)
            yield keys, f"{train.final_learning_rate:g} is above the learning rate {rate:g} ({key})"
    for key, rate in rates.items():
        part = key.rpartition(".")[2]
        if rate is not None and not {part, "newline" if part == "projector" else part} & set(train.trainable):
            yield (key, "train.trainable"), f"{part} is not trained: leave its rate out, or add it to train.trainable"


def _lora_rules(train: Train) -> Findings:
    if train.method == "full" and train.lora != Lora():
        yield ("train.lora", "train.method"), "is for train.method lora only: set that, or leave train.lora out"
    if train.method == "lora" and "language" not in train.trainable:
        yield ("train.method", "train.trainable"), "lora trains the language model: add language to train.trainable"
    yield from _list_rules("train.lora.targets", train.lora.targets, "projection")


def ask_rules(preset: Settings, ask: Ask) -> Findings:
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

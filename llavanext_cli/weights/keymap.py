"""Which tensor of a Hugging Face folder becomes which parameter of ours: tables, and nothing but tables.

    names on disk ──hf_names──▶ hub names ──RULES──▶ our parameters
                                        ├──carried──▶ kept beside them, for the way back
                                        └──DROPPED──▶ left out, for a named reason

`{}` stands for a layer's number. Shapes are written with the letters of `dimensions`. Nothing here needs MindSpore:
completeness is checked on the host, from headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.weights.hf_names import LLAMA, RESAMPLER, TOWER
from llavanext_cli.weights.tensors import LISTED
from llavanext_cli.weights.untrusted import short

TIED_HEAD = "language_model.lm_head.weight"
WORD_EMBEDDING, WORD_HEAD = "language_model.model.tok_embeddings.embedding_weight", "language_model.lm_head.weight"
"""Our parameters with one row for each word of the vocabulary."""


@dataclass(frozen=True)
class Rule:
    """`sources` (hub names), in their order one below the other, are `target`. One source is a plain copy; several are
    stacked along the first axis, which is a concatenation of their bytes. `shape` is the target's."""

    sources: tuple[str, ...]
    target: str
    shape: tuple[str, ...]


def _pair(source: str, target: str, weight: tuple[str, ...], bias: tuple[str, ...]) -> tuple[Rule, Rule]:
    return (
        Rule((f"{source}.weight",), f"{target}.weight", weight),
        Rule((f"{source}.bias",), f"{target}.bias", bias),
    )


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{TOWER}encoder.layers.{{}}.self_attn.{part}_proj.{kind}" for part in "qkv")


VISION_RULES = (
    Rule((f"{TOWER}embeddings.class_embedding",), "vision_tower.embeddings.class_embedding", ("Dv",)),
    Rule(
        (f"{TOWER}embeddings.patch_embedding.weight",),
        "vision_tower.embeddings.patch_embedding.weight",
        ("Dv", "3", "p", "p"),
    ),
    Rule(
        (f"{TOWER}embeddings.position_embedding.weight",),
        "vision_tower.embeddings.position_embedding",
        ("PP+1", "Dv"),
    ),
    *_pair(f"{TOWER}pre_layrnorm", "vision_tower.pre_layernorm", ("Dv",), ("Dv",)),  # transformers spells it so
)
VISION_LAYER_RULES = (
    *_pair(f"{TOWER}encoder.layers.{{}}.layer_norm1", "vision_tower.layers.{}.layer_norm1", ("Dv",), ("Dv",)),
    Rule(_qkv("weight"), "vision_tower.layers.{}.attention.qkv.weight", ("3Dv", "Dv")),
    Rule(_qkv("bias"), "vision_tower.layers.{}.attention.qkv.bias", ("3Dv",)),
    *_pair(
        f"{TOWER}encoder.layers.{{}}.self_attn.out_proj",
        "vision_tower.layers.{}.attention.out",
        ("Dv", "Dv"),
        ("Dv",),
    ),
    *_pair(f"{TOWER}encoder.layers.{{}}.layer_norm2", "vision_tower.layers.{}.layer_norm2", ("Dv",), ("Dv",)),
    *_pair(f"{TOWER}encoder.layers.{{}}.mlp.fc1", "vision_tower.layers.{}.mlp.fc1", ("Fv", "Dv"), ("Fv",)),
    *_pair(f"{TOWER}encoder.layers.{{}}.mlp.fc2", "vision_tower.layers.{}.mlp.fc2", ("Dv", "Fv"), ("Dv",)),
)
POST_LAYERNORM_RULES = _pair(f"{TOWER}post_layernorm", "post_layernorm", ("Dv",), ("Dv",))
PROJECTOR_RULES = (
    *_pair("multi_modal_projector.linear_1", "projector.linear_1", ("D", "Dv"), ("D",)),
    *_pair("multi_modal_projector.linear_2", "projector.linear_2", ("D", "D"), ("D",)),
)
NEWLINE_RULES = (Rule(("image_newline",), "image_newline", ("D",)),)
POOLER_RULES = _pair(f"{RESAMPLER}pool", "pooler.conv", ("Dv", "Dv", "s", "s"), ("Dv",))
TEXT_RULES = (
    Rule((f"{LLAMA}embed_tokens.weight",), WORD_EMBEDDING, ("V", "D")),
    Rule((f"{LLAMA}norm.weight",), "language_model.model.norm_out.weight", ("D",)),
)
HEAD_RULES = (Rule((TIED_HEAD,), WORD_HEAD, ("V", "D")),)
_TEXT_LAYER = (
    ("input_layernorm", "attention_norm", ("D",)),
    ("self_attn.q_proj", "attention.wq", ("D", "D")),
    ("self_attn.k_proj", "attention.wk", ("K", "D")),
    ("self_attn.v_proj", "attention.wv", ("K", "D")),
    ("self_attn.o_proj", "attention.wo", ("D", "D")),
    ("post_attention_layernorm", "ffn_norm", ("D",)),
    ("mlp.gate_proj", "feed_forward.w1", ("F", "D")),
    ("mlp.down_proj", "feed_forward.w2", ("D", "F")),
    ("mlp.up_proj", "feed_forward.w3", ("F", "D")),
)
# Both sides rotate the halves of a head, so the rows of q and k need no permutation.
TEXT_LAYER_RULES = tuple(
    Rule((f"{LLAMA}layers.{{}}.{source}.weight",), f"language_model.model.layers.{{}}.{target}.weight", shape)
    for source, target, shape in _TEXT_LAYER
)

DROPPED = (
    (f"{TOWER}embeddings.position_ids", "the numbers 0, 1, 2 …, which every reader generates for itself"),
    (f"{LLAMA}layers.{{}}.self_attn.rotary_emb.inv_freq", "computed from rope_theta by every reader"),
    (f"{LLAMA}rotary_emb.inv_freq", "computed from rope_theta by every reader"),
)
CACHE_SUFFIXES = ("key_cache", "value_cache")
"""Ends of the names of MindFormers' paged KV cache: parameters of a network, but no weights."""


def dimensions(architecture: Architecture) -> dict[str, int]:
    """The letters of the shapes above."""
    vision, text = architecture.vision, architecture.text
    return {
        "3": 3,
        "p": vision.patch_size,
        "PP+1": vision.patches**2 + 1,
        "Dv": vision.hidden_size,
        "3Dv": 3 * vision.hidden_size,
        "Fv": vision.intermediate_size,
        "s": architecture.spatial_pool_stride,
        "D": text.hidden_size,
        "K": text.num_key_value_heads * text.head_dim,
        "F": text.intermediate_size,
        "V": text.vocab_size,
    }


@dataclass(frozen=True)
class Target:
    """A rule with its layer filled in. `shape` is the target's; each source has `source_shape`."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]

    @property
    def source_shape(self) -> tuple[int, ...]:
        return (self.shape[0] // len(self.sources), *self.shape[1:])


def _fill(rules: Iterable[Rule], sizes: dict[str, int], layers: Iterable[int] = (0,)) -> Iterator[Target]:
    rules = tuple(rules)
    for layer in layers:
        for rule in rules:
            yield Target(
                rule.target.format(layer),
                tuple(sizes[letter] for letter in rule.shape),
                tuple(source.format(layer) for source in rule.sources),
            )


def build_targets(architecture: Architecture) -> list[Target]:
    """Every parameter of our model, in data order: tower, projector, newline, pooler, language model."""
    sizes = dimensions(architecture)
    projector: tuple[Rule, ...] = PROJECTOR_RULES
    if not architecture.multimodal_projector_bias:
        projector = tuple(rule for rule in projector if not rule.target.endswith(".bias"))
    return [
        *_fill(VISION_RULES, sizes),
        *_fill(VISION_LAYER_RULES, sizes, range(architecture.vision_layers)),
        *_fill(projector, sizes),
        *_fill(NEWLINE_RULES, sizes),
        *_fill(POOLER_RULES if architecture.spatial_pool_mode == "conv" else (), sizes),
        *_fill(TEXT_RULES[:1], sizes),
        *_fill(TEXT_LAYER_RULES, sizes, range(architecture.text.num_hidden_layers)),
        *_fill(TEXT_RULES[1:], sizes),
        *_fill(() if architecture.text.tie_word_embeddings else HEAD_RULES, sizes),
    ]


def expected_parameters(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name → shape of every weight of our model, in data order. The KV cache is not among them."""
    return {target.name: target.shape for target in build_targets(architecture)}


def carried_tensors(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Hub name → shape of what transformers wants and our model does not compute: the layers of the tower behind the
    one whose features are used, and its last norm. They travel with a checkpoint so that it can go back whole."""
    sizes = dimensions(architecture)
    behind = range(architecture.vision_layers, architecture.vision.num_hidden_layers)
    targets = [*_fill(VISION_LAYER_RULES, sizes, behind), *_fill(POST_LAYERNORM_RULES, sizes)]
    return {source: target.source_shape for target in targets for source in target.sources}


def hub_tensors(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Hub name → shape of every tensor of a complete Hugging Face folder."""
    used = {source: t.source_shape for t in build_targets(architecture) for source in t.sources}
    return used | carried_tensors(architecture)


_DROPPED_PATTERNS = tuple(
    (re.compile(re.escape(pattern).replace(r"\{\}", r"\d+") + r"\Z"), reason) for pattern, reason in DROPPED
)


def drop_reason(hub_name: str) -> str | None:
    """Why a tensor is left out, or None when nothing says that it may be."""
    return next((reason for pattern, reason in _DROPPED_PATTERNS if pattern.match(hub_name)), None)


_HUB_PATTERN = re.compile(
    "|".join(
        re.escape(source).replace(r"\{\}", r"\d+")
        for rule in (
            *VISION_RULES,
            *VISION_LAYER_RULES,
            *POST_LAYERNORM_RULES,
            *PROJECTOR_RULES,
            *NEWLINE_RULES,
            *POOLER_RULES,
            *TEXT_RULES,
            *TEXT_LAYER_RULES,
            *HEAD_RULES,
        )
        for source in rule.sources
    )
)


def is_hub_name(name: str) -> bool:
    """Whether some rule knows the name, in any model."""
    return _HUB_PATTERN.fullmatch(name) is not None or drop_reason(name) is not None


def is_cache(name: str) -> bool:
    """Whether a network's parameter is part of its KV cache."""
    return name.endswith(CACHE_SUFFIXES)


_LAYER = re.compile(r"\.(0|[1-9][0-9]{0,5})\.")


def fold_names(names: Iterable[str]) -> list[str]:
    """Names with consecutive layers folded into one line each: `model.layers.{0..31}.attention.wq.weight (32)`."""
    groups: dict[str, list[int]] = {}
    for name in sorted(names):
        found = _LAYER.search(name)
        key = name if found is None else f"{name[: found.start()]}.{{}}.{name[found.end() :]}"
        groups.setdefault(short(key), []).extend([int(found[1])] if found else [])
    lines = []
    for key, layers in groups.items():
        if not layers:
            lines.append(key)
            continue
        layers = sorted(layers)
        if len(layers) == 1:
            lines.append(key.replace("{}", str(layers[0]), 1))
            continue
        whole = layers == list(range(layers[0], layers[-1] + 1))
        span = f"{layers[0]}..{layers[-1]}" if whole else short(",".join(map(str, layers)))
        lines.append(f"{key.replace('{}', '{' + span + '}', 1)} ({len(layers)})")
    return lines if len(lines) <= LISTED else [*lines[:LISTED], f"… and {len(lines) - LISTED} more"]

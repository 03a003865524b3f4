"""The demo's model before training: a Hugging Face folder with random weights, as if it was downloaded.

The initial scales let a model of under a million weights learn in minutes: every matrix keeps the variance of its
input, and the tower's position embeddings are as large as its patch embeddings, so that positions are not lost.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llavanext_cli.config.hf_config import architecture_to_hf
from llavanext_cli.config.presets import load_preset

ARCHITECTURE = load_preset("tiny-stage2").model
TILE = ARCHITECTURE.vision.image_size
"""Pixels a side of a tile."""
PIECES = ARCHITECTURE.video_token_index
"""Pieces of the tokenizer; `<video>` and `<image>` follow, as in the 7B model."""


def write_model(folder: Path, sentences: Iterable[str], seed: int) -> None:
    """Write the folder.

    Args:
        folder: must not exist.
        sentences: the tokenizer is trained on them.
        seed: of the weights.
    """
    from safetensors.numpy import save_file

    from llavanext_cli.weights.keymap import hub_tensors

    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    weights = {name: initial_weight(name, shape, rng) for name, shape in hub_tensors(ARCHITECTURE).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.model").write_bytes(train_tokenizer(sentences))
    files = {
        "config.json": architecture_to_hf(ARCHITECTURE),
        "added_tokens.json": {"<video>": PIECES, "<image>": PIECES + 1},
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def initial_weight(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """`float32[shape]`: a random start for the tensor of that (hub) name."""
    if len(shape) == 1 and "norm" in name:
        return np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    if "position_embedding" in name or "class_embedding" in name:
        scale = 1.0
    elif "embed_tokens" in name or "image_newline" in name:
        scale = 0.1
    else:
        scale = float(np.prod(shape[1:])) ** -0.5
    return rng.normal(0, scale, shape).astype(np.float32)


def train_tokenizer(sentences: Iterable[str]) -> bytes:
    """A SentencePiece model of `PIECES` pieces with Llama's settings."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()

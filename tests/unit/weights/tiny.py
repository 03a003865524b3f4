"""A model small enough to convert in milliseconds, and helpers to make and compare folders of weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from llavanext_cli.config.architecture import Architecture, TextArchitecture, VisionArchitecture
from llavanext_cli.errors import LlavaNextError

MakeHf = Callable[..., Path]
Refused = Callable[..., LlavaNextError]

TINY = Architecture(
    vision=VisionArchitecture(
        hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    ),
    text=TextArchitecture(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=128,
    ),
    image_token_index=61,
    video_token_index=60,
    image_grid_pinpoints=((28, 56), (56, 28), (56, 56)),
)


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0, dtype: type = np.float32) -> dict:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_hf(folder: Path, tensors: dict[str, np.ndarray], config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def read_all(folder: Path) -> dict[str, np.ndarray]:
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    merged = {name: array for file in files for name, array in file.items()}
    assert len(merged) == sum(map(len, files))
    return merged


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        np.testing.assert_array_equal(array, right[name], err_msg=name)

"""Tiny models as Hugging Face folders, made without torch: config.json, weights from a frozen random stream, tokenizer.

The folder is what a user would have downloaded. transformers loads it in torch_side.py and says that nothing is
missing or left over; the shipped converter brings it to MindSpore in mindspore_side.py.
"""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from llavanext_cli.config.hf_config import parse_architecture
from llavanext_cli.weights.keymap import hub_tensors

TOKENIZER = Path(__file__).parent / "goldens" / "tokenizer.model"

VOCABULARY = 448
VIDEO_TOKEN, IMAGE_TOKEN = 440, 441

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaNextVideoForConditionalGeneration"],
    "model_type": "llava_next_video",
    "ignore_index": -100,
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
    "image_token_index": IMAGE_TOKEN,
    "video_token_index": VIDEO_TOKEN,
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "spatial_pool_mode": "average",
    "spatial_pool_stride": 2,
    "tie_word_embeddings": False,
    "use_image_newline_parameter": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": 32,
        "image_size": 28,
        "intermediate_size": 64,
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "patch_size": 7,
        "projection_dim": 32,
    },
    "text_config": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    },
}


def tiny_config(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A config.json; `changes` are dotted keys, such as {"text_config.num_key_value_heads": 2}."""
    config = copy.deepcopy(CONFIG)
    for key, value in (changes or {}).items():
        section = config
        *path, last = key.split(".")
        for part in path:
            section = section[part]
        section[last] = value
    return config


def random_weights(config: dict[str, Any], seed: int = 1) -> dict[str, np.ndarray]:
    """Every tensor that transformers wants, by its name in the hub's files, `float32`.

    Each tensor has a stream of its own, and `RandomState` never changes its streams: these are the same numbers on
    every machine. Every bias and every norm differs from its initial value, queries and keys are large enough for
    attention to be uneven, and so are the media's features beside the words'.
    """
    weights = {}
    for name, shape in hub_tensors(parse_architecture(config, "config.json")).items():
        noise = np.random.RandomState(zlib.crc32(name.encode()) ^ seed).standard_normal(shape)
        if "norm" in name or "layrnorm" in name:
            value = 0.1 * noise + name.endswith("weight")
        elif name.endswith("bias"):
            value = 0.1 * noise
        elif any(part in name for part in ("embed_tokens", "embedding", "newline")) and "patch" not in name:
            value = 0.7 * noise
        else:
            gain = 1.7 if any(part in name for part in ("q_proj", "k_proj", "lm_head")) else 1.0
            value = gain * noise / np.sqrt(np.prod(shape[1:]))
        weights[name] = value.astype(np.float32)
    return weights


def write_hf_folder(folder: Path, config: dict[str, Any], seed: int = 1) -> Path:
    """Write a folder as it would come from the hub."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps({"<video>": VIDEO_TOKEN, "<image>": IMAGE_TOKEN}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": True,
                "add_eos_token": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "legacy": False,
                "pad_token": "<unk>",
                "tokenizer_class": "LlamaTokenizer",
                "unk_token": "<unk>",
            }
        )
    )
    save_file(random_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder

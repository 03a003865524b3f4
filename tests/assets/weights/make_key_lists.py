"""Writes the names and shapes of the published models' tensors, as transformers itself builds them on its meta device.

    python tests/assets/weights/make_key_lists.py FOLDER

One line a tensor; layers that are alike share one: `model.layers.{0..31}.mlp.up_proj.weight 11008x4096`.
Made with transformers 4.57.1 and torch 2.13.0; tests/integration/test_key_lists.py makes them again and compares.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
LLAMA_7B = {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "pad_token_id": 0}
LLAMA_13B = LLAMA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}


def build_models() -> dict:
    """File name → (state of a model on the meta device, rename from its own names to those on disk)."""
    import torch
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPVisionConfig,
        LlamaConfig,
        LlamaForCausalLM,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
    )

    def video(text: dict):
        config = LlavaNextVideoConfig(CLIPVisionConfig(**CLIP_L), LlamaConfig(**text))
        return LlavaNextVideoForConditionalGeneration(config)

    with torch.device("meta"):
        return {
            "llava-next-video-7b": video(LLAMA_7B),
            "llava-next-video-13b": video(LLAMA_13B),
            "llava-v1.6-vicuna-7b": LlavaNextForConditionalGeneration(
                LlavaNextConfig(CLIPVisionConfig(**CLIP_L), LlamaConfig(**LLAMA_7B))
            ),
            "vicuna-7b-v1.5": LlamaForCausalLM(LlamaConfig(**LLAMA_7B | {"vocab_size": 32000})),
            "clip-vit-large-patch14-336": CLIPModel(
                CLIPConfig(
                    vision_config=CLIP_L,
                    text_config={
                        "hidden_size": 768,
                        "intermediate_size": 3072,
                        "num_hidden_layers": 12,
                        "num_attention_heads": 12,
                    },
                    projection_dim=768,
                )
            ),
        }


def names_on_disk(model) -> dict[str, tuple[int, ...]]:
    """What save_pretrained would write: parameters, under the names of the model's reverse conversion."""
    mapping = {new: old.lstrip("^") for old, new in getattr(model, "_checkpoint_conversion_mapping", {}).items()}
    names = {}
    for name, tensor in model.state_dict().items():
        for new, old in mapping.items():
            if re.match(re.escape(new), name):
                name = old + name[len(new) :]
                break
        names[name] = tuple(tensor.shape)
    return names


def fold(names: dict[str, tuple[int, ...]]) -> list[str]:
    """One line for all layers of a kind, which must follow each other from 0."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, shape in names.items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        key = name.replace(layer[0], ".layers.{}.", 1) if layer else name
        groups.setdefault((key, "x".join(map(str, shape)) or "scalar"), []).append(int(layer[1]) if layer else 0)
    lines = []
    for (key, shape), layers in sorted(groups.items()):
        if sorted(layers) != list(range(len(layers))):
            raise SystemExit(f"{key}: layers {layers} of one shape are not consecutive")
        lines.append(f"{key.replace('{}', f'{{0..{len(layers) - 1}}}')} {shape}")
    return lines


def write_lists(folder: Path) -> list[Path]:
    written = []
    for name, model in build_models().items():
        path = folder / f"{name}.txt"
        path.write_text("\n".join(fold(names_on_disk(model))) + "\n", encoding="utf-8")
        written.append(path)
    return written


if __name__ == "__main__":
    for path in write_lists(Path(sys.argv[1])):
        print(path)

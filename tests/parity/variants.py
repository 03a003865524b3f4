"""Models beyond the 7B: what a config.json may say instead, one row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MEDIA_CASES = ("100x99", "two images", "text only", "image and video")
IMAGE_CASES = ("100x99", "57x113", "two images", "text only")


@dataclass(frozen=True)
class Variant:
    """What a row changes in the tiny model's config.json, by dotted key, and the cases that are computed with it."""

    changes: dict[str, Any]
    cases: tuple[str, ...] = MEDIA_CASES


NINE_GRIDS = [[28 * rows, 28 * columns] for rows in range(1, 4) for columns in range(1, 4)]
ODD_GRID = {  # 5 x 5 patches: pooling leaves a row and a column over
    "vision_config.image_size": 30,
    "vision_config.patch_size": 6,
    "image_grid_pinpoints": [[30, 60], [60, 30], [60, 60]],
}
MISTRAL = {
    "text_config.model_type": "mistral",
    "text_config.architectures": ["MistralForCausalLM"],
    "text_config.num_key_value_heads": 2,
    "text_config.rope_theta": 1000000.0,
    "text_config.sliding_window": None,
}
VARIANTS: dict[str, Variant] = {
    "grouped queries": Variant({"text_config.num_key_value_heads": 2}),
    "one key head": Variant({"text_config.num_key_value_heads": 1}),
    "llava-v1.6-mistral": Variant(
        {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"], **MISTRAL}, IMAGE_CASES
    ),
    "llava-v1.6-vicuna": Variant(
        {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]}, IMAGE_CASES
    ),
    # 40 layers, 40 heads of 128, 5120 wide, 13824 in between: the same proportions, an odd number of heads, deeper
    "13B shapes": Variant(
        {
            "text_config.hidden_size": 80,
            "text_config.intermediate_size": 216,
            "text_config.num_attention_heads": 5,
            "text_config.num_key_value_heads": 5,
            "text_config.num_hidden_layers": 3,
        }
    ),
    "rope_scaling linear": Variant({"text_config.rope_scaling": {"type": "linear", "factor": 2.5}}),
    "feature strategy full": Variant({"vision_feature_select_strategy": "full"}),
    "pooling max": Variant({"spatial_pool_mode": "max"}),
    "pooling conv": Variant({"spatial_pool_mode": "conv"}),
    "tied embeddings": Variant({"tie_word_embeddings": True, "text_config.tie_word_embeddings": True}),
    "nine grids": Variant({"image_grid_pinpoints": NINE_GRIDS}),
    "tiles of 30 pixels": Variant(ODD_GRID),
    "stride 3": Variant({"spatial_pool_stride": 3}),
    "other activations": Variant(
        {
            "vision_config.hidden_act": "gelu",
            "projector_hidden_act": "quick_gelu",
            "multimodal_projector_bias": False,  # and no biases there
        }
    ),
    "other epsilons": Variant({"vision_config.layer_norm_eps": 3e-2, "text_config.rms_norm_eps": 5e-2}),
    "features of the last layer": Variant({"vision_feature_layer": -1}),
    "features of layer 1": Variant({"vision_feature_layer": 1}),
}
COMBINED = (
    ("llava-v1.6-mistral", "nine grids"),
    ("llava-v1.6-vicuna", "rope_scaling linear", "other epsilons"),
    ("13B shapes", "stride 3", "features of the last layer"),
    ("one key head", "pooling conv", "tied embeddings"),
    ("feature strategy full", "pooling max", "features of layer 1"),
    ("tiles of 30 pixels", "other activations", "grouped queries"),
)
"""Variants that do not touch each other share a graph; `-m full` computes each of them alone, too."""


def combine(names: tuple[str, ...]) -> Variant:
    """All changes of the variants at once. One without videos decides the cases."""
    changes = {key: value for name in names for key, value in VARIANTS[name].changes.items()}
    return Variant(changes, VARIANTS[names[0]].cases)


CACHED = {
    "text_config.num_key_value_heads": 2,
    "text_config.rope_scaling": {"rope_type": "linear", "factor": 4.0},
}
"""What the cells with a cache compute on their own: heads that share keys, and positions."""
SMALLER = {"text_config.num_hidden_layers": 1, "vision_config.num_hidden_layers": 2}
"""Fewer layers than the model that the rest of the suite shares, as the graph of each row must be compiled."""

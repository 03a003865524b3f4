"""A model's architecture as frozen dataclasses: what a checkpoint's `config.json` and a preset's `model` section hold.

Names, defaults and meanings are those of transformers' `LlavaNextVideoConfig`, `CLIPVisionConfig` and `LlamaConfig`.
`hf_config.py` reads it from a config.json; what the fields must be to each other is in `rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from llavanext_cli.config.validation import setting

Activation = Literal["quick_gelu", "gelu"]

PART_PREFIXES = {
    "vision": ("vision_tower.",),
    "projector": ("projector.", "pooler."),
    "newline": ("image_newline",),
    "language": ("language_model.",),
}
"""The parts of the model that can be trained or frozen, and how the names of their parameters begin."""

_size = partial(setting, least=1, most=2**31 - 1)
_layers = partial(setting, least=1, most=1000)  # beyond this a file is damaged
_token = partial(setting, least=0)


@dataclass(frozen=True)
class VisionArchitecture:
    """The CLIP vision tower."""

    hidden_size: int = _size(1024, doc="channels")
    intermediate_size: int = _size(4096, doc="channels inside the MLP")
    num_hidden_layers: int = _layers(24, doc="layers")
    num_attention_heads: int = _size(16, doc="attention heads")
    image_size: int = _size(336, doc="pixels along a side of a tile")
    patch_size: int = _size(14, doc="pixels along a side of a patch")
    hidden_act: Activation = setting("quick_gelu", doc="activation of the MLP")
    layer_norm_eps: float = setting(1e-5, doc="epsilon of the layer norms", above=0)

    @property
    def patches(self) -> int:
        """Patches along one side of a tile (P)."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class RopeScaling:
    """Rotary positions divided by a factor, so that they reach further (position interpolation)."""

    type: Literal["linear"] = setting(doc="how positions are scaled")
    factor: float = setting(doc="factor by which positions reach further", least=1)


@dataclass(frozen=True)
class TextArchitecture:
    """The language model: Llama, or Mistral, which computes the same but was trained on another conversation format."""

    model_type: Literal["llama", "mistral"] = setting("llama", doc="decides the conversation format")
    hidden_size: int = _size(4096, doc="channels")
    intermediate_size: int = _size(11008, doc="channels inside the MLP")
    num_hidden_layers: int = _layers(32, doc="layers")
    num_attention_heads: int = _size(32, doc="attention heads")
    num_key_value_heads: int = _size(32, doc="heads of keys and values; fewer: each is shared by several queries")
    vocab_size: int = _size(32064, doc="rows of the embedding table")
    max_position_embeddings: int = _size(4096, doc="positions without rope_scaling")
    rms_norm_eps: float = setting(1e-5, doc="epsilon of the norms", above=0)
    rope_theta: float = setting(10000.0, doc="base of the rotary positions", above=0)
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = setting(False, doc="the output layer shares the embedding table")
    bos_token_id: int = _token(1, doc="begins a text")
    eos_token_id: int = _token(2, doc="ends an answer")
    pad_token_id: int = _token(0, doc="fills short sequences")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def positions(self) -> int:
        """Positions that the encoding reaches; linear scaling multiplies them by its factor."""
        return int(self.max_position_embeddings * (self.rope_scaling.factor if self.rope_scaling else 1))


@dataclass(frozen=True)
class Architecture:
    """LLaVA-NeXT(-Video): vision tower, language model, and how they are joined."""

    vision: VisionArchitecture = VisionArchitecture()
    text: TextArchitecture = TextArchitecture()
    image_token_index: int = _token(32001, doc="token id that stands for an image")
    video_token_index: int = _token(32000, doc="token id that stands for a video")
    image_grid_pinpoints: tuple[tuple[int, int], ...] = _size(
        ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
        doc="height and width, in pixels, of the grids of tiles that an image can be scaled to",
    )
    projector_hidden_act: Activation = setting("gelu", doc="activation between the projector's layers")
    multimodal_projector_bias: bool = setting(True, doc="the projector's layers have a bias")
    spatial_pool_mode: Literal["average", "max", "conv", "interpolate"] = setting(
        "average", doc="how the patches of a frame are pooled"
    )
    spatial_pool_stride: int = setting(2, doc="patches along a side of what is pooled into one", least=1)
    vision_feature_layer: int = setting(
        -2, doc="hidden state of the tower that is used: 0 the embeddings, -1 the last layer's output"
    )
    vision_feature_select_strategy: Literal["default", "full"] = setting(
        "default", doc="default: without the class token; full: with it"
    )
    pool_before_projector: bool = setting(
        True, doc="true as in transformers; false projects first, as the original training code did"
    )

    @property
    def conversation(self) -> str:
        """Name of the conversation format, one of `processing.prompt.CONVERSATIONS`."""
        return "mistral_instruct" if self.text.model_type == "mistral" else "vicuna_v1"

    @property
    def vision_layers(self) -> int:
        """Layers of the tower that are computed: hidden state k is the output of layer k, -1 that of the last."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision.num_hidden_layers + 1 + layer

    @property
    def tile_features(self) -> int:
        """Features of one tile in the table (Q): patches, and the class token with the "full" strategy."""
        return self.vision.patches**2 + (self.vision_feature_select_strategy == "full")

    @property
    def max_tiles(self) -> int:
        """Tiles of the largest image: its base tile and the grid of the largest pinpoint."""
        side = self.vision.image_size
        return 1 + max(((h // side) * (w // side) for h, w in self.image_grid_pinpoints), default=0)

    def image_tokens(self, rows: int, columns: int) -> int:
        """Tokens of an image whose unpadded grid has so many patches: base tile, grid, a newline after each row."""
        return self.tile_features + rows * columns + rows

    @property
    def max_image_tokens(self) -> int:
        """Tokens of the largest image: one that fills its grid."""
        side, patches = self.vision.image_size, self.vision.patches
        grids = ((h // side * patches, w // side * patches) for h, w in self.image_grid_pinpoints)
        return max((self.image_tokens(rows, columns) for rows, columns in grids), default=0)

    @property
    def frame_side(self) -> int:
        """Pooled patches along one side of a frame."""
        if self.spatial_pool_mode == "interpolate":
            return -(-self.vision.patches // self.spatial_pool_stride)
        return self.vision.patches // self.spatial_pool_stride

    @property
    def frame_features(self) -> int:
        """Features of one pooled frame (Qv)."""
        return self.frame_side**2

"""What a checkpoint's `config.json` says about the model, as frozen dataclasses with the field's own names.

Names, defaults and meanings are those of transformers' `LlavaNextVideoConfig`, `CLIPVisionConfig` and `LlamaConfig`, so
that a config.json can be read without translation. `load_architecture` refuses by name what the model cannot compute.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ACTIVATIONS = ("quick_gelu", "gelu")
POOL_MODES = ("average", "max", "conv", "interpolate")
SELECT_STRATEGIES = ("default", "full")
MODEL_TYPES = ("llava_next_video", "llava_next")
TEXT_MODEL_TYPES = ("llama", "mistral")


@dataclass(frozen=True)
class VisionArchitecture:
    """The CLIP tower. Sizes in pixels (image_size, patch_size) and channels."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def patches(self) -> int:
        """Patches along one side of a tile (P)."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextArchitecture:
    """The Llama language model, or a Mistral, which computes the same and is spoken to in another form. `rope_scaling`
    is None or {"type": "linear", "factor": float}."""

    model_type: str = "llama"
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    vocab_size: int = 32064
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Architecture:
    """LLaVA-NeXT(-Video): the two towers and how they are joined. `image_grid_pinpoints` are (height, width) pixels."""

    vision: VisionArchitecture = field(default_factory=VisionArchitecture)
    text: TextArchitecture = field(default_factory=TextArchitecture)
    image_token_index: int = 32001
    video_token_index: int = 32000
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    spatial_pool_mode: str = "average"
    spatial_pool_stride: int = 2
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    pool_before_projector: bool = True
    """True as in transformers; False projects first, as the original training code did."""

    @property
    def conversation(self) -> str:
        """The form in which conversations are written, one of `processing.prompt.CONVERSATIONS`."""
        return "mistral_instruct" if self.text.model_type == "mistral" else "vicuna_v1"

    @property
    def vision_layers(self) -> int:
        """Layers of the tower that are computed: hidden state k is the output of layer k, -1 that of the last."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision.num_hidden_layers + 1 + layer

    @property
    def tile_features(self) -> int:
        """Features of one tile in the table (Q): patches, and the class token under the "full" strategy."""
        return self.vision.patches**2 + (self.vision_feature_select_strategy == "full")

    def picture_tokens(self, rows: int, columns: int) -> int:
        """Positions of a picture whose grid, unpadded, has so many patches: base, grid, a newline after each row."""
        return self.tile_features + rows * columns + rows

    @property
    def greatest_picture_tokens(self) -> int:
        """Positions of the picture that takes most: one that fills its grid."""
        side, patches = self.vision.image_size, self.vision.patches
        grids = self.image_grid_pinpoints
        return max(self.picture_tokens(height // side * patches, width // side * patches) for height, width in grids)

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


def load_architecture(folder: str | Path) -> Architecture:
    """Read the architecture from a folder's `config.json`.

    Raises:
        CheckpointError: there is no readable config.json, or it describes a model that this program cannot compute, or
            a preprocessor_config.json beside it prepares pictures in another way; every fault is a line of `details`.
    """
    from llavanext_cli.config.hf_config import read_config
    from llavanext_cli.config.preprocessor import check_preprocessor

    architecture = parse_architecture(read_config(folder), str(Path(folder) / "config.json"))
    check_preprocessor(folder, architecture)
    return architecture


def parse_architecture(config: Any, where: str) -> Architecture:
    """Read the architecture from the parsed content of a config.json; `where` names it in a `CheckpointError`."""
    from llavanext_cli.config import hf_config

    return hf_config.parse_architecture(config, where)


def architecture_to_hf(architecture: Architecture) -> dict[str, Any]:
    """The content of a config.json that transformers and `parse_architecture` read back as the same model."""
    from llavanext_cli.config import hf_config

    return hf_config.architecture_to_hf(architecture)

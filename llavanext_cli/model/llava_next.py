"""LLaVA-NeXT(-Video): vision tower, pooler, projector, fusion, and MindFormers' `LlamaForCausalLM`.

Source: Liu et al. 2024 (LLaVA-NeXT); numerics of transformers' `LlavaNextVideoForConditionalGeneration`.
Shapes: the legend in records.py.
"""

from __future__ import annotations

import numpy as np
from mindformers.models.llama import LlamaForCausalLM
from mindformers.models.modeling_utils import PreTrainedModel
from mindformers.models.utils import lazy_inline
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Parameter, Tensor
from mindspore import dtype as mstype
from mindspore.context import ParallelMode
from mindspore.ops import operations as P
from mindspore.parallel._utils import _get_parallel_mode

from llavanext_cli.model.backend.cpu import use_cpu_cells
from llavanext_cli.model.config import LlavaNextConfig
from llavanext_cli.model.fusion import Fusion
from llavanext_cli.model.lora import add_lora
from llavanext_cli.model.projector import Pooler, Projector
from llavanext_cli.model.vision_tower import VisionTower
from llavanext_cli.records import IGNORE_INDEX


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class LlavaNext(PreTrainedModel):
    """The whole model.

    Args:
        config: `LlavaNextConfig`.

    Inputs:
        - **input_ids** - `int32[B, S]`.
        - **tiles** - `float32[B, G + F, 3, R, R]`, or None without media, as when one token is decoded.
        - **feature_index** - `int32[B, S]`, rows of the feature table; None when `tiles` is None.
        - **labels** - `int32[B, S]`, already shifted (records.Batch); None when not training.
        - **batch_valid_length** - `int32[B]`, with a KV cache: tokens of each sequence so far, this call's included.
        - **block_tables**, **slot_mapping** - the paged cache's bookkeeping, as in MindFormers (Ascend).
        - **frames** (int) - how many of `tiles`, the last ones, are frames; constant in a graph. Default: the config's.

    Outputs:
        Training: the loss averaged over supervised tokens, or the pair (sum, number of tokens) when
        `calculate_per_token_loss` and on a CPU. Otherwise logits: `float32[B, V]` of the last position of each sequence
        with a KV cache, `float32[B, S, V]` without.
    """

    config_class = LlavaNextConfig
    base_model_prefix = "llava_next"

    @lazy_inline
    def __init__(self, config: LlavaNextConfig):
        super().__init__(config, auto_prefix=True)
        self.config = config
        arch = config.architecture
        self.frames = config.frames
        self.side, self.width = arch.vision.image_size, arch.text.hidden_size
        self.vision_width, self.tile_rows = arch.vision.hidden_size, arch.tile_features
        self.pool_first = arch.pool_before_projector
        self.vision_tower = VisionTower(config)
        self.projector = Projector(config)
        self.pooler = Pooler(config, arch.vision.hidden_size if self.pool_first else arch.text.hidden_size)
        scale = 1 / np.sqrt(arch.text.hidden_size)
        newline = np.random.default_rng(0).normal(0, scale, arch.text.hidden_size)
        self.image_newline = Parameter(Tensor(newline, config.param_init_type), name="image_newline")
        self.fusion = Fusion(config)
        self.language_model = LlamaForCausalLM(config=config.llama_config())
        if config.lora:
            add_lora(self.language_model, config.lora)
        self.reshape = P.Reshape()
        self.slice = P.StridedSlice()
        self.concat = P.Concat(axis=1)
        self.shape = P.Shape()
        self.not_equal = P.NotEqual()
        self.cast_mask = P.Cast()
        self.cast_words = P.Cast()
        self.dtype = config.compute_dtype
        self.on_cpu = config.target == "CPU"
        if self.on_cpu:
            use_cpu_cells(self, config)
        if _get_parallel_mode() in (ParallelMode.SEMI_AUTO_PARALLEL, ParallelMode.AUTO_PARALLEL):
            self.shard(config.parallel_config)

    def construct(
        self,
        input_ids,
        tiles=None,
        feature_index=None,
        labels=None,
        batch_valid_length=None,
        block_tables=None,
        slot_mapping=None,
        frames=None,
    ):
        embeddings = None
        if tiles is not None:
            embeddings = self.embed(input_ids, tiles, feature_index, self.frames if frames is None else frames)
        if self.on_cpu and self.training and labels is not None:
            return self.supervised_loss(self.language_model.model(input_ids, embeddings), labels)
        loss_mask = None
        if labels is not None:
            loss_mask = self.cast_mask(self.not_equal(labels, IGNORE_INDEX), mstype.float32)
        output = self.language_model(
            input_ids,
            labels=labels,
            input_embeds=embeddings,
            batch_valid_length=batch_valid_length,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            loss_mask=loss_mask,
        )
        if self.training or self.language_model.predict_run_mode:
            return output
        return output[0]  # MindFormers also returns tokens and mask

    def embed(self, input_ids, tiles, feature_index, frames):
        """`[B, S, D]`: token embeddings, with the media's features in the places of their placeholders."""
        words = self.cast_words(self.language_model.to_embeddings(input_ids), self.dtype)
        return self.fusion(words, self.features(tiles, frames), self.image_newline, feature_index)

    def features(self, tiles, frames):
        """Tiles and frames to rows of the feature table: `[B, G + F, 3, R, R]` → `[B, N, D]`.

        Image tiles go through tower and projector; frames through tower, pooler and projector (the last two in the
        other order when `pool_before_projector` is false).
        """
        batch, count = self.shape(tiles)[:2]
        features = self.vision_tower(self.reshape(tiles, (batch * count, 3, self.side, self.side)))
        if frames == 0:
            return self.reshape(self.projector(features), (batch, -1, self.width))
        if frames == count:
            return self.reshape(self.pool_and_project(features), (batch, -1, self.width))
        images = self.projector(self.slice_tiles(features, batch, count, 0, count - frames))
        videos = self.pool_and_project(self.slice_tiles(features, batch, count, count - frames, count))
        images = self.reshape(images, (batch, -1, self.width))
        return self.concat((images, self.reshape(videos, (batch, -1, self.width))))

    def slice_tiles(self, features, batch, count, begin, end):
        """Tiles `begin` to `end` of every sample: `[B * (end - begin), Q, Dv]`."""
        rows, width = self.tile_rows, self.vision_width
        features = self.reshape(features, (batch, count, rows, width))
        features = self.slice(features, (0, begin, 0, 0), (batch, end, rows, width), (1, 1, 1, 1))
        return self.reshape(features, (batch * (end - begin), rows, width))

    def pool_and_project(self, features):
        """Frames to rows of the feature table: `[T, Q, Dv]` → `[T, Qv, D]`."""
        if self.pool_first:
            return self.projector(self.pooler(features))
        return self.pooler(self.projector(features))

    def shard(self, parallel_config):
        dp = parallel_config.data_parallel
        self.vision_tower.shard(parallel_config)
        self.projector.shard(parallel_config)
        self.pooler.shard(parallel_config)
        self.fusion.shard(parallel_config)
        self.slice.shard(((dp, 1, 1, 1),))
        self.concat.shard(((dp, 1, 1), (dp, 1, 1)))
        self.not_equal.shard(((dp, 1), ()))
        self.cast_mask.shard(((dp, 1),))
        self.cast_words.shard(((dp, 1, 1),))

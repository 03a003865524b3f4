"""The model's configuration as MindFormers carries it: our architecture, the static shapes and the run-time choices.

MindFormers builds a network from `model.model_config` of its YAML; `LlavaNextConfig` is that section.
`config.mindformers.expand` writes it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.models.llama import LlamaConfig
from mindformers.models.utils import convert_mstype
from mindformers.modules.layers import SeqExtendMethod
from mindformers.modules.transformer.transformer import default_transformer_config
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.validation import build


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class LlavaNextConfig(PretrainedConfig):
    """Everything `LlavaNext` needs to be built.

    Args:
        architecture: `Architecture`, or the mapping it was dumped to.
        target: "Ascend" or "CPU"; the CPU gets the cells of `model.backend`.
        batch_size: samples a device and step.
        seq_length: positions of the static graph (training), or of the KV cache (inference).
        frames: static number of frames (F) of a sample; the other tiles belong to its images.
        compute_dtype, param_init_type: "float32", "float16" or "bfloat16".
        use_flash_attention: fused attention in the tower and the language model (Ascend only).
        use_past: True builds the inference graph with the paged KV cache.
        num_blocks, block_size: size of that cache, in blocks and tokens a block.
        calculate_per_token_loss: return (sum of losses, number of supervised tokens) instead of their quotient, so that
            several workers can average over the supervised tokens of the global batch.
        lora: rank, alpha, dropout, targets and seed of the language model's LoRA matrices; None without LoRA.
        lazy_inline: let the compiler inline the model late, which saves compile time (Ascend only). Llama always does.
        parallel_config: MindFormers' `TransformerOpParallelConfig`, or its mapping.
    """

    model_type = "llava_next"

    def __init__(
        self,
        architecture: Architecture | dict[str, Any] | None = None,
        target: str = "Ascend",
        batch_size: int = 1,
        seq_length: int = 4096,
        frames: int = 0,
        compute_dtype: str = "bfloat16",
        param_init_type: str = "float32",
        use_flash_attention: bool = True,
        use_past: bool = False,
        num_blocks: int = 512,
        block_size: int = 16,
        calculate_per_token_loss: bool = False,
        lora: dict[str, Any] | None = None,
        lazy_inline: bool = True,
        parallel_config: Any = default_transformer_config,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.disable_lazy_inline = target == "CPU" or not lazy_inline  # MindSpore has it for Ascend only
        self.architecture_fields = _fields(architecture)
        self.target = target
        self.batch_size = batch_size
        self.seq_length = seq_length
        self.frames = frames
        self.compute_dtype = convert_mstype(compute_dtype)
        self.param_init_type = convert_mstype(param_init_type)
        self.use_flash_attention = use_flash_attention
        self.use_past = use_past
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.calculate_per_token_loss = calculate_per_token_loss
        self.lora = lora
        self.parallel_config = parallel_config

    @property
    def architecture(self) -> Architecture:
        """Kept as plain fields, because MindFormers writes its configurations as JSON."""
        return build(Architecture, self.architecture_fields, problems=[])

    @property
    def compresses_mask(self) -> bool:
        """Whether flash attention gets one fixed 2048 x 2048 triangle instead of an S x S mask for each sample.

        Both masks are causal, and no more is needed: padding is on the right, where no supervised position attends.
        The full mask would also hide every `<unk>` of the text, whose id is that of padding. MindFormers compresses
        masks from 2048 tokens on; shorter sequences need the full mask.
        """
        return self.use_flash_attention and not self.use_past and self.seq_length >= 2048

    def llama_config(self) -> LlamaConfig:
        """The language model's section, in MindFormers' own words."""
        text = self.architecture.text
        on_cpu = self.target == "CPU"
        scaling = text.rope_scaling
        return LlamaConfig(
            disable_lazy_inline=on_cpu,
            batch_size=self.batch_size,
            seq_length=self.seq_length,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            n_kv_heads=text.num_key_value_heads,
            max_position_embedding=max(text.max_position_embeddings, self.seq_length),
            vocab_size=text.vocab_size,
            rms_norm_eps=text.rms_norm_eps,
            theta=text.rope_theta,
            # Linear scaling is position interpolation (Chen et al. 2023). MindFormers 1.9.0 also has LINEAR, but its
            # check rejects every number.
            extend_method=(SeqExtendMethod.PI if scaling else SeqExtendMethod.NONE).value,
            scaling_factor=scaling.factor if scaling else 1.0,
            tie_word_embeddings=text.tie_word_embeddings,
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
            compute_dtype=self.compute_dtype,
            param_init_type=self.param_init_type,
            layernorm_compute_type="float32",
            softmax_compute_type="float32",
            rotary_dtype="float32",
            use_past=self.use_past,
            is_dynamic=self.use_past and not on_cpu,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            use_flash_attention=self.use_flash_attention,
            use_attn_mask_compression=self.compresses_mask,
            parallel_optimizer=True,  # the embedding table's too, where optimizer sharding is on
            use_rope_slice=on_cpu,
            fused_rms_norm=not on_cpu,
            input_sliced_sig=True,
            calculate_per_token_loss=self.calculate_per_token_loss,
            parallel_config=self.parallel_config,
        )


def _fields(architecture: Architecture | dict[str, Any] | None) -> dict[str, Any]:
    if isinstance(architecture, dict):
        return dict(architecture)
    fields = asdict(architecture or Architecture())
    return fields | {"image_grid_pinpoints": [list(size) for size in fields["image_grid_pinpoints"]]}

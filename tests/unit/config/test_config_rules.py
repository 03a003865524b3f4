"""Each rule between fields: what breaks it, what it says, and the nearest value that is still right."""

from __future__ import annotations

import dataclasses

import pytest

from llavanext_cli.config.architecture import Architecture, RopeScaling, TextArchitecture, VisionArchitecture
from llavanext_cli.config.presets import load_preset
from llavanext_cli.errors import ConfigError

TRAIN, CPU_TRAIN, ASK, CLIP = "video-7b-stage2", "tiny-stage2", "video-7b-ask-image", "video-7b-ask-video"

BROKEN = [
    (TRAIN, ["parallel.devices=4"], "parallel.devices: 4 devices, but data 8 x tensor 1 x pipeline 1 = 8"),
    (
        TRAIN,
        ["parallel.tensor=3", "parallel.data=1", "parallel.devices=3"],
        "parallel.tensor: 3 devices cannot share num_attention_heads 32 evenly",
    ),
    (
        TRAIN,
        ["model.text.vocab_size=32065", "parallel.tensor=2", "parallel.data=4"],
        "parallel.tensor: 2 devices cannot share vocab_size 32065 evenly",
    ),
    (
        TRAIN,
        ["parallel.pipeline=2", "parallel.data=4"],
        "parallel.pipeline: MindSpore 2.9.0 cannot split this model into pipeline stages: set it to 1 and use "
        "parallel.tensor",
    ),
    (
        CPU_TRAIN,
        ["parallel.tensor=2", "parallel.devices=2"],
        "parallel.tensor: training on CPU has data parallelism only: set it to 1 and use parallel.data",
    ),
    (
        ASK,
        ["parallel.data=2", "parallel.devices=2"],
        "parallel.data: data parallelism is for training: set it to 1 and use parallel.tensor",
    ),
    (
        CPU_TRAIN,
        ["parallel.optimizer_sharding=true"],
        "parallel.optimizer_sharding: is for Ascend only: set it to false on CPU",
    ),
    (
        CPU_TRAIN,
        ["runtime.compute_dtype=bfloat16"],
        "runtime.compute_dtype: MindSpore cannot multiply bfloat16 matrices on CPU: use float32",
    ),
    (
        CPU_TRAIN,
        ["runtime.parameter_dtype=bfloat16"],
        "runtime.parameter_dtype: MindSpore cannot multiply bfloat16 matrices on CPU: use float32",
    ),
    (
        CPU_TRAIN,
        ["runtime.flash_attention=true"],
        "runtime.flash_attention: is for Ascend only: set it to false on CPU",
    ),
    (CPU_TRAIN, ["runtime.memory=8GB"], "runtime.memory: is for Ascend only: set it to null on CPU"),
    (TRAIN, ["runtime.threads=8"], "runtime.threads: is for CPU only: set it to null on Ascend"),
    (TRAIN, ["runtime.memory=57"], "runtime.memory: expected text or null, not 57"),
    (TRAIN, ["runtime.memory=57 GB"], "must be a number of gigabytes such as \"57GB\", not '57 GB'"),
    (
        TRAIN,
        ["runtime.compute_dtype=float16"],
        "float16 training needs loss scaling, which is not supported: use bfloat16 on Ascend, float32 on CPU",
    ),
    (TRAIN, ["data.tiles=0"], "data.tiles: set tiles for images, frames for videos, or both"),
    (TRAIN, ["data.tiles=4"], "data.tiles: 4 tiles, but one image can take 5: set 5 or more, or 0 for no images"),
    (
        TRAIN,
        ["data.seq_length=2991"],
        "data.seq_length: 2991 tokens are too few: one image can need 2928, text at least 64; set 2992 or more",
    ),
    (
        TRAIN,
        ["data.seq_length=4097"],
        "data.seq_length: 4097 tokens, but the model has 4096 positions: use at most that, or raise "
        "model.text.rope_scaling.factor",
    ),
    (
        "video-7b-stage3",
        ["data.videos=2"],
        "data.seq_length: 4096 tokens are too few: 32 frames of 144 tokens need 4608, text at least 64; "
        "set 4672 or more",
    ),
    (
        CLIP,
        ["ask.max_new_tokens=3521"],
        "ask.cache_tokens: 8192 tokens are too few: 32 frames of 144 tokens need 4608, text at least 64, the "
        "answer up to 3521 (ask.max_new_tokens); set 8193 or more",
    ),
    (CLIP, ["model.text.rope_scaling=null"], "ask.cache_tokens: 8192 tokens, but the model has 4096 positions"),
    (ASK, ["ask.block_size=48"], "ask.cache_tokens: 4096 tokens are not a whole number of blocks of 48"),
    (ASK, ["ask.top_k=40000"], "ask.top_k: 40000 is more than the vocabulary's 32064"),
    (TRAIN, ["train.trainable=[]"], "train.trainable: nothing would be trained: name at least one part"),
    (TRAIN, ["train.trainable=[vision, vision]"], "train.trainable: names a part twice"),
    (TRAIN, ["train.final_learning_rate=1e-5"], "1e-05 is above the learning rate 2e-06 (train.learning_rate)"),
    (
        TRAIN,
        ["train.learning_rates.vision=1e-6", "train.final_learning_rate=2e-6"],
        "2e-06 is above the learning rate 1e-06 (train.learning_rates.vision)",
    ),
    (
        TRAIN,
        ["train.learning_rates.vision=1e-6", "train.trainable=[projector]"],
        "train.learning_rates.vision: vision is not trained: leave its rate out, or add it to train.trainable",
    ),
    (TRAIN, ["train.lora.rank=8"], "train.lora: is for train.method lora only: set that, or leave train.lora out"),
    (
        TRAIN,
        ["train.method=lora", "train.trainable=[projector]"],
        "train.method: lora trains the language model: add language to train.trainable",
    ),
    (TRAIN, ["train.method=lora", "train.lora.targets=[]"], "train.lora.targets: nothing would be trained"),
    (TRAIN, ["train.method=lora", "train.lora.targets=[wq, wq]"], "train.lora.targets: names a projection twice"),
    (TRAIN, ["train.recompute=33"], "train.recompute: 33 layers, but the language model has 32"),
    (TRAIN, ["model.text.hidden_size=0"], "model.text.hidden_size: must be at least 1, not 0 (channels)"),
    (TRAIN, ["model.vision.patch_size=0"], "model.vision.patch_size: must be at least 1, not 0 (pixels along"),
    (TRAIN, ["model.text.num_attention_heads=33"], "hidden_size 4096 over 33 heads must be a whole, even number"),
    (TRAIN, ["model.text.num_key_value_heads=5"], "5 does not divide the 32 attention heads"),
    (TRAIN, ["model.vision.num_attention_heads=15"], "15 heads do not divide hidden_size 1024"),
    (TRAIN, ["model.vision.patch_size=16", "model.vision.image_size=337"], "337 is not a multiple of patch_size 16"),
    (TRAIN, ["model.vision.hidden_act=relu"], "expected quick_gelu or gelu, not 'relu'"),
    (TRAIN, ["model.spatial_pool_mode=mean"], "expected one of average, max, conv, interpolate, not 'mean'"),
    (TRAIN, ["model.vision_feature_select_strategy=cls"], "expected default or full, not 'cls'"),
    (TRAIN, ["model.image_grid_pinpoints=[]"], "must name at least one [height, width]"),
    (TRAIN, ["model.image_grid_pinpoints=[[336, 500]]"], "[336, 500] is not a multiple of the tile's 336 pixels"),
    (TRAIN, ["model.vision_feature_layer=-26"], "layer -26 does not exist: the tower has 24"),
    (TRAIN, ["model.spatial_pool_stride=0"], "spatial_pool_stride: must be at least 1, not 0"),
    (TRAIN, ["model.spatial_pool_stride=25"], "25 is more than the 24 patches along a side of a tile"),
    (TRAIN, ["model.image_token_index=32064"], "token 32064 is outside the vocabulary of 32064"),
    (TRAIN, ["model.image_token_index=32000"], "images and videos need different token ids"),
    (
        TRAIN,
        ["model.text.rope_scaling={type: dynamic, factor: 2}"],
        "model.text.rope_scaling.type: expected linear, not 'dynamic'",
    ),
    (TRAIN, ["model.text.rope_scaling={type: linear, factor: x}"], "rope_scaling.factor: expected a number, not 'x'"),
    (
        TRAIN,
        ["model.text.rope_scaling={type: linear, factor: 0.5}"],
        "rope_scaling.factor: must be at least 1, not 0.5",
    ),
]


@pytest.mark.parametrize(("name", "changes", "message"), BROKEN, ids=[" ".join(row[1]) for row in BROKEN])
def test_a_broken_rule_says_what_to_change(name, changes, message):
    with pytest.raises(ConfigError) as caught:
        load_preset(name, changes)
    assert any(message in line for line in caught.value.details), caught.value.details
    assert all(line.startswith("--set ") for line in caught.value.details), "the place is what the user changed"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (TRAIN, ["data.seq_length=2992"]),
        (TRAIN, ["data.seq_length=10240", "model.text.rope_scaling={type: linear, factor: 2.5}"]),
        (TRAIN, ["data.tiles=6"]),
        (TRAIN, ["parallel.tensor=8", "parallel.data=1"]),
        (TRAIN, ["train.learning_rates.projector=1e-5", "train.trainable=[newline]"]),
        (TRAIN, ["train.method=lora", "train.lora.targets=[w2]", "train.lora.rank=1", "train.lora.alpha=0.5"]),
        (TRAIN, ["train.recompute=32", "train.clip_norm=null", "train.schedule=constant"]),
        (CLIP, ["ask.max_new_tokens=3520"]),
        (ASK, ["runtime.compute_dtype=float16", "runtime.parameter_dtype=float16"]),
        (CPU_TRAIN, ["parallel.data=2", "parallel.devices=2", "runtime.threads=1"]),
        (CPU_TRAIN, ["model.spatial_pool_stride=4"]),
        (CPU_TRAIN, ["model.vision_feature_layer=-1"]),
    ],
)
def test_the_nearest_sound_value_is_taken(name, changes):
    assert load_preset(name, changes).name == name


def test_a_rule_is_silent_about_a_field_that_is_wrong_by_itself():
    with pytest.raises(ConfigError) as caught:
        load_preset(TRAIN, ["parallel.devices=many", "parallel.data=4"])
    assert caught.value.details == (
        "--set parallel.devices=many: parallel.devices: expected a whole number, not 'many'",
    )


def test_sizes_of_the_published_model():
    model = Architecture()
    assert model.max_tiles == 5
    assert model.max_image_tokens == 2928  # 672 x 672: 48*48 + 48 newlines + 576
    assert model.text.positions == 4096
    scaled = dataclasses.replace(model.text, rope_scaling=RopeScaling("linear", 2.5))
    assert scaled.positions == 10240


def test_sizes_follow_the_tile():
    model = Architecture(
        vision=VisionArchitecture(image_size=56), text=TextArchitecture(), image_grid_pinpoints=((56, 168), (112, 112))
    )
    assert model.max_tiles == 5
    assert model.max_image_tokens == 8 * 9 + 16

"""Each rule between fields: what breaks it, what it says, and the nearest valid value."""

from __future__ import annotations

import dataclasses

import pytest

from llavanext_cli.config.architecture import Architecture, RopeScaling, TextArchitecture, VisionArchitecture
from llavanext_cli.config.presets import load_preset
from llavanext_cli.errors import ConfigError

TRAIN, CPU_TRAIN, ASK, VIDEO = "video-7b-stage2", "tiny-stage2", "video-7b-ask-image", "video-7b-ask-video"

BROKEN = {  # preset → settings: what is said of the first key, or of another one
    "video-7b-stage2": {
        "parallel.devices=4": "4 devices, but data 8 x tensor 1 x pipeline 1 = 8",
        "parallel.tensor=3; parallel.data=1; parallel.devices=3": (
            "3 devices cannot share num_attention_heads 32 evenly"
        ),
        "parallel.tensor=2; parallel.data=4; model.text.vocab_size=32065": (
            "2 devices cannot share vocab_size 32065 evenly"
        ),
        "parallel.pipeline=2; parallel.data=4": (
            "MindSpore 2.9.0 cannot split this model into pipeline stages: set it to 1 and use parallel.tensor"
        ),
        "runtime.threads=8": "is for CPU only: set it to null on Ascend",
        "runtime.memory=57": "expected text or null, not 57",
        "runtime.memory=57 GB": "must be a number of gigabytes such as \"57GB\", not '57 GB'",
        "runtime.compute_dtype=float16": (
            "float16 training needs loss scaling, which is not supported: use bfloat16 on Ascend, float32 on CPU"
        ),
        "data.tiles=0": "set tiles for images, frames for videos, or both",
        "data.tiles=4": "4 tiles, but one image can take 5: set 5 or more, or 0 for no images",
        "data.seq_length=2991": "2991 tokens are too few: one image can need 2928, text at least 64; set 2992 or more",
        "data.seq_length=4097": (
            "4097 tokens, but the model has 4096 positions: use at most that, or raise model.text.rope_scaling.factor"
        ),
        "train.trainable=[]": "nothing would be trained: name at least one part",
        "train.trainable=[vision, vision]": "names a part twice",
        "train.final_learning_rate=1e-5": "1e-05 is above the learning rate 2e-06 (train.learning_rate)",
        "train.learning_rates.vision=1e-6; train.final_learning_rate=2e-6": (
            "2e-06 is above the learning rate 1e-06 (train.learning_rates.vision)"
        ),
        "train.learning_rates.vision=1e-6; train.trainable=[projector]": (
            "vision is not trained: leave its rate out, or add it to train.trainable"
        ),
        "train.lora.rank=8": "train.lora: is for train.method lora only: set that, or leave train.lora out",
        "train.method=lora; train.trainable=[projector]": (
            "lora trains the language model: add language to train.trainable"
        ),
        "train.method=lora; train.lora.targets=[]": "train.lora.targets: nothing would be trained",
        "train.method=lora; train.lora.targets=[wq, wq]": "train.lora.targets: names a projection twice",
        "train.recompute=33": "33 layers, but the language model has 32",
        "model.text.hidden_size=0": "must be at least 1, not 0 (channels)",
        "model.vision.patch_size=0": "must be at least 1, not 0 (pixels along",
        "model.text.num_attention_heads=33": "hidden_size 4096 divided by 33 heads must be an even integer",
        "model.text.num_key_value_heads=5": "the 32 attention heads are not a multiple of 5",
        "model.vision.num_attention_heads=15": "hidden_size 1024 is not a multiple of the 15 heads",
        "model.vision.patch_size=16; model.vision.image_size=337": "337 is not a multiple of patch_size 16",
        "model.vision.hidden_act=relu": "expected quick_gelu or gelu, not 'relu'",
        "model.spatial_pool_mode=mean": "expected one of average, max, conv, interpolate, not 'mean'",
        "model.vision_feature_select_strategy=cls": "expected default or full, not 'cls'",
        "model.image_grid_pinpoints=[]": "must name at least one [height, width]",
        "model.image_grid_pinpoints=[[336, 500]]": "[336, 500] is not a multiple of the tile's 336 pixels",
        "model.vision_feature_layer=-26": "layer -26 does not exist: the tower has 24",
        "model.spatial_pool_stride=0": "spatial_pool_stride: must be at least 1, not 0",
        "model.spatial_pool_stride=25": "25 is more than the 24 patches along a side of a tile",
        "model.image_token_index=32064": "token 32064 is outside the vocabulary of 32064",
        "model.image_token_index=32000": "images and videos need different token ids",
        "model.text.rope_scaling={type: dynamic, factor: 2}": (
            "model.text.rope_scaling.type: expected linear, not 'dynamic'"
        ),
        "model.text.rope_scaling={type: linear, factor: x}": "rope_scaling.factor: expected a number, not 'x'",
        "model.text.rope_scaling={type: linear, factor: 0.5}": "rope_scaling.factor: must be at least 1, not 0.5",
    },
    "tiny-stage2": {
        "parallel.tensor=2; parallel.devices=2": (
            "training on CPU has data parallelism only: set it to 1 and use parallel.data"
        ),
        "parallel.optimizer_sharding=true": "is for Ascend only: set it to false on CPU",
        "runtime.compute_dtype=bfloat16": "MindSpore cannot multiply bfloat16 matrices on CPU: use float32",
        "runtime.parameter_dtype=bfloat16": "MindSpore cannot multiply bfloat16 matrices on CPU: use float32",
        "runtime.flash_attention=true": "is for Ascend only: set it to false on CPU",
        "runtime.memory=8GB": "is for Ascend only: set it to null on CPU",
    },
    "video-7b-ask-image": {
        "parallel.data=2; parallel.devices=2": "data parallelism is for training: set it to 1 and use parallel.tensor",
        "ask.block_size=48": "ask.cache_tokens: 4096 tokens are not a whole number of blocks of 48",
        "ask.top_k=40000": "40000 is more than the vocabulary's 32064",
    },
    "video-7b-stage3": {
        "data.videos=2": (
            "data.seq_length: 4096 tokens are too few: 32 frames of 144 tokens need 4608, text at least 64; set "
            "4672 or more"
        ),
    },
    "video-7b-ask-video": {
        "ask.max_new_tokens=3521": (
            "ask.cache_tokens: 8192 tokens are too few: 32 frames of 144 tokens need 4608, text at least 64, "
            "the answer up to 3521"
        ),
        "model.text.rope_scaling=null": "ask.cache_tokens: 8192 tokens, but the model has 4096 positions",
    },
}


@pytest.mark.parametrize(("name", "settings"), [(name, settings) for name in BROKEN for settings in BROKEN[name]])
def test_a_broken_rule_says_what_to_change(name, settings):
    with pytest.raises(ConfigError) as caught:
        load_preset(name, settings.split("; "))
    assert any(BROKEN[name][settings] in line for line in caught.value.details), caught.value.details
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
        (VIDEO, ["ask.max_new_tokens=3520"]),
        (ASK, ["runtime.compute_dtype=float16", "runtime.parameter_dtype=float16"]),
        (CPU_TRAIN, ["parallel.data=2", "parallel.devices=2", "runtime.threads=1"]),
        (CPU_TRAIN, ["model.spatial_pool_stride=4"]),
        (CPU_TRAIN, ["model.vision_feature_layer=-1"]),
    ],
)
def test_the_nearest_valid_value_is_taken(name, changes):
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

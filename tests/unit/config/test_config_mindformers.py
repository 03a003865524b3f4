"""What LoRA and the learning rates of parts become in MindFormers' configuration."""

from __future__ import annotations

from llavanext_cli.config.mindformers import expand
from llavanext_cli.config.presets import load_preset

STAGE2 = "video-7b-stage2"


def expanded(*settings: str) -> dict:
    return expand(load_preset(STAGE2, settings), steps=100)


def test_lora_is_part_of_the_models_configuration():
    assert expanded()["model"]["model_config"]["lora"] is None
    lora = expanded("train.method=lora", "train.lora={rank: 8, targets: [wq, wv]}", "train.seed=3")
    assert lora["model"]["model_config"]["lora"] == {
        "rank": 8,
        "alpha": 32.0,
        "dropout": 0.0,
        "targets": ["wq", "wv"],
        "seed": 3,
    }


def test_batches_that_are_accumulated_are_averaged_over_their_tokens():
    for config, several in ((expanded(), False), (expanded("train.accumulate=4"), True)):
        model = config["model"]["model_config"]
        assert config["calculate_per_token_loss"] == model["calculate_per_token_loss"] == several
        assert model["lazy_inline"] == (not several)
        assert config["parallel"]["parallel_optimizer_config"] == {"gradient_accumulation_shard": several}
        assert config["runner_config"]["gradient_accumulation_steps"] == (4 if several else 1)


def test_one_rate_is_one_schedule():
    config = expanded("train.learning_rates.vision=2e-6")  # the same as for all
    assert config["lr_schedule"]["learning_rate"] == 2e-6
    assert "grouped_lr_schedule" not in config


def test_parts_with_a_rate_of_their_own_have_a_schedule_of_their_own():
    config = expanded("train.learning_rates={vision: 1e-6, projector: 1e-5}", "train.final_learning_rate=1e-7")
    assert "lr_schedule" not in config
    groups = config["grouped_lr_schedule"]
    assert groups["default"]["learning_rate"] == 2e-6
    assert [(g["learning_rate"], g["params"]) for g in groups["grouped"]] == [
        (1e-6, ["vision_tower."]),
        (1e-5, ["projector.", "pooler.", "image_newline"]),
    ]
    assert {g["type"] for g in groups["grouped"]} == {"CosineWithWarmUpLR"}
    assert {(g["total_steps"], g["lr_end"]) for g in groups["grouped"]} == {(100, 1e-7)}


def test_the_cpu_asks_without_the_paged_cache():
    """Its engine has a cache of its own; the losses of training are not computed either."""
    model = expand(load_preset("tiny-ask"))["model"]["model_config"]
    assert (model["use_past"], model["calculate_per_token_loss"], model["seq_length"]) == (False, False, 256)
    assert expand(load_preset("video-7b-ask-image"), batch=2)["model"]["model_config"]["num_blocks"] == 512

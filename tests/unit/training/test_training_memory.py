"""Memory of a device: what is exact is summed here by hand, what is estimated follows what changes it."""

from __future__ import annotations

import pytest

from llavanext_cli.config.presets import load_preset
from llavanext_cli.training.memory import GIB, advice, plan_memory, slice_of

STAGE2 = "video-7b-stage2"
SHARDED = ("parallel.data=1", "parallel.devices=1", "parallel.optimizer_sharding=false")


def test_one_device_holds_everything():
    preset = load_preset(STAGE2, SHARDED)
    plan = plan_memory(preset)
    text = 2 * 32064 * 4096 + 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    layer = 4 * 1024**2 + 4 * 1024 + 2 * 4096 * 1024 + 4096 + 1024 + 4 * 1024
    tower = 1024 + 1024 * 3 * 14**2 + 577 * 1024 + 2 * 1024 + 23 * layer
    projector = 4096 * 1024 + 4096 + 4096**2 + 4096 + 4096  # and the newline
    assert plan.weights == 4 * (text + tower + projector)
    assert (plan.gradients, plan.optimizer, plan.gathered) == (plan.weights, 2 * plan.weights, 0)
    assert not plan.fits


def test_optimizer_sharding_spreads_almost_everything():
    alone, spread = plan_memory(load_preset(STAGE2, SHARDED)), plan_memory(load_preset(STAGE2))
    assert alone.weights / 8 < spread.weights < alone.weights / 8 * 1.01
    assert spread.optimizer == 2 * spread.gradients == 2 * spread.weights
    assert spread.fits
    assert spread.pool == 57 * GIB


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("language_model.model.layers.0.attention.wq.weight", (4096, 4096), (512, 4096)),
        ("language_model.model.layers.0.attention.wo.weight", (4096, 4096), (1024, 2048)),
        ("language_model.model.layers.0.ffn_norm.weight", (4096,), (4096,)),
        ("projector.linear_1.bias", (4096,), (2048,)),
        ("vision_tower.embeddings.position_embedding", (577, 1024), (577, 1024)),
        ("vision_tower.layers.0.attention.qkv.weight", (3072, 1024), (384, 1024)),
        ("vision_tower.layers.0.attention.qkv.bias", (3072,), (3072,)),
        ("language_model.model.layers.0.attention.wq.lora_a", (16, 4096), (2, 4096)),
        ("language_model.model.layers.0.attention.wq.lora_b", (4096, 16), (512, 16)),
        ("language_model.model.layers.0.feed_forward.w2.lora_a", (16, 11008), (4, 5504)),
        ("language_model.model.layers.0.feed_forward.w2.lora_b", (4096, 16), (512, 16)),
    ],
)
def test_slices_of_four_by_two(name, shape, expected):
    assert slice_of(name, shape, load_preset(STAGE2, ("parallel.data=4", "parallel.tensor=2"))) == expected


def test_frozen_parts_cost_their_weights_only():
    preset = load_preset(STAGE2, ("train.trainable=[projector]", *SHARDED))
    assert plan_memory(preset).gradients == 4 * (4096 * 1024 + 4096 + 4096**2 + 4096)


def test_accumulated_gradients_are_held_beside_those_of_a_batch():
    once, twice = (plan_memory(load_preset(STAGE2, [f"train.accumulate={n}"])) for n in (1, 2))
    assert twice.gradients == 2 * once.gradients
    assert (twice.weights, twice.optimizer) == (once.weights, once.optimizer)


def test_lora_costs_its_matrices():
    settings = ("train.method=lora", "train.trainable=[language]", "runtime.parameter_dtype=bfloat16", *SHARDED)
    plan = plan_memory(load_preset(STAGE2, settings))
    matrices = 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert plan.gradients == 4 * matrices, "float32, whatever the weights are"
    assert plan.optimizer == 8 * matrices
    full = load_preset(STAGE2, ("runtime.parameter_dtype=bfloat16", *SHARDED))
    assert plan.weights == plan_memory(full).weights + 4 * matrices


def test_activations_follow_what_makes_them():
    def activations(*settings: str) -> int:
        return plan_memory(load_preset(STAGE2, settings)).activations

    usual = activations()
    assert activations("train.recompute=32") < usual < activations("train.recompute=0")
    assert 1.9 * usual < activations("train.batch_size=2") < 2.1 * usual
    assert activations("parallel.data=4", "parallel.tensor=2") < usual
    assert activations("train.trainable=[projector]") < usual
    assert activations("runtime.flash_attention=false") > 2 * usual
    assert activations("train.accumulate=4") == usual


def test_advice_goes_on_until_there_is_none():
    settings = ["train.batch_size=16", *SHARDED, "train.recompute=0"]
    seen = []
    for step in ("train.recompute=32", "train.batch_size=1", "parallel.devices=8"):
        preset = load_preset(STAGE2, settings)
        seen.append(advice(preset, preset.model))
        settings += [step] if step != "parallel.devices=8" else []
    assert "train.recompute=32" in seen[0]
    assert "train.batch_size=1" in seen[1]
    assert "train.accumulate=16" in seen[1]
    assert "use more devices" in seen[2]

"""The tables of names, at full size: the committed lists are what transformers builds (see assets/weights)."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from llavanext_cli.config.architecture import Architecture, TextArchitecture
from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights import hf_names, keymap
from llavanext_cli.weights.plan import plan_export, plan_import
from llavanext_cli.weights.slices import SlicedTensor
from llavanext_cli.weights.tensors import TensorSpec

ASSETS = Path(__file__).parents[2] / "assets" / "weights"
LLAMA_13B = TextArchitecture(
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
)
MODELS = {
    "llava-next-video-7b": (Architecture(), None),
    "llava-next-video-13b": (Architecture(text=LLAMA_13B), None),
    "llava-v1.6-vicuna-7b": (Architecture(image_token_index=32000, video_token_index=32000), None),
    "vicuna-7b-v1.5": (Architecture(text=TextArchitecture(vocab_size=32000)), "language"),
    "clip-vit-large-patch14-336": (Architecture(), "vision"),
}


def read_list(name: str) -> dict[str, tuple[int, ...]]:
    names = {}
    for line in (ASSETS / f"{name}.txt").read_text().splitlines():
        key, shape = line.rsplit(" ", 1)
        layers = re.search(r"\{0\.\.(\d+)\}", key)
        for layer in range(int(layers[1]) + 1 if layers else 1):
            filled = key.replace(layers[0], str(layer)) if layers else key
            names[filled] = () if shape == "scalar" else tuple(map(int, shape.split("x")))
    return names


def specs_of(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, TensorSpec]:
    specs, offset = {}, 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * 2
        specs[name] = TensorSpec(name, dtype, shape, Path("full-size"), offset, nbytes)
        offset += nbytes
    return specs


@pytest.mark.parametrize("model", MODELS)
def test_full_size_models_are_planned_completely(model: str) -> None:
    architecture, part = MODELS[model]
    names = read_list(model)
    plan = plan_import(specs_of(names), architecture, model, part)
    prefix = {"vision": "vision_tower.", "language": "language_model.", None: ""}[part]
    wanted = {n: s for n, s in keymap.expected_parameters(architecture).items() if n.startswith(prefix)}
    assert {t.name: t.shape for t in plan.tensors} == wanted
    used = sum(len(t.pieces) for t in (*plan.tensors, *plan.carried))
    assert used + len(plan.dropped) == len(names)


@pytest.mark.parametrize("model", [name for name, (_, part) in MODELS.items() if part is None])
def test_full_size_export_has_every_name_and_shape(model: str) -> None:
    architecture, _ = MODELS[model]
    ours = {n: SlicedTensor.of_one(s) for n, s in specs_of(keymap.expected_parameters(architecture)).items()}
    carried = specs_of(keymap.carried_tensors(architecture))
    plan = plan_export(ours, carried, architecture, model)
    assert {t.name: t.shape for t in plan.tensors} == read_list(model)


def test_a_7b_model_has_its_parameters() -> None:
    expected = keymap.expected_parameters(Architecture())
    assert expected["language_model.model.layers.31.feed_forward.w2.weight"] == (4096, 11008)
    assert expected["vision_tower.layers.22.attention.qkv.weight"] == (3072, 1024)
    assert "vision_tower.layers.23.attention.qkv.weight" not in expected
    total = sum(map(math.prod, expected.values())) + sum(
        map(math.prod, keymap.carried_tensors(Architecture()).values())
    )
    assert total == sum(map(math.prod, read_list("llava-next-video-7b").values())) == 7_063_431_168


def test_buffers_of_the_published_pickles_are_dropped_for_a_reason() -> None:
    names = read_list("vicuna-7b-v1.5")
    names |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (64,) for i in range(32)}
    plan = plan_import(specs_of(names), MODELS["vicuna-7b-v1.5"][0], "vicuna", "language")
    assert len(plan.dropped) == 32 and all("rope_theta" in reason for _, reason in plan.dropped)
    names = read_list("clip-vit-large-patch14-336") | {"vision_model.embeddings.position_ids": (1, 577)}
    plan = plan_import(specs_of(names), Architecture(), "clip", "vision")
    reasons = dict(plan.dropped)
    assert "for itself" in reasons["vision_model.embeddings.position_ids"]
    assert "text tower" in reasons["text_model.final_layer_norm.bias"]


RENAMES = {
    "hub": [],
    "wrapped": [
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head", "lm_head"),
        (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
    ],
    "flat": [
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head", "lm_head"),
        (r"^vision_tower\.vision_model\.", "model.vision_tower."),
        (r"^(multi_modal_projector|image_newline)", r"model.\1"),
    ],
    "original": [
        (r"^language_model\.model\.", "model."),
        (r"^language_model\.lm_head", "lm_head"),
        (r"^vision_tower", "model.vision_tower.vision_tower"),
        (r"^multi_modal_projector\.linear_1", "model.mm_projector.0"),
        (r"^multi_modal_projector\.linear_2", "model.mm_projector.2"),
        (r"^(image_newline)", r"model.\1"),
    ],
}


def rename(name: str, scheme: str) -> str:
    for pattern, replacement in RENAMES[scheme]:
        changed = re.sub(pattern, replacement, name)
        if changed != name:
            return changed
    return name


@pytest.mark.parametrize("scheme", RENAMES)
@pytest.mark.parametrize("pooling", ["average", "conv"])
def test_each_naming_scheme_is_recognised_and_planned_alike(scheme: str, pooling: str) -> None:
    architecture = replace(Architecture(), spatial_pool_mode=pooling)
    hub = keymap.hub_tensors(architecture)
    renamed = {rename(name, scheme): shape for name, shape in hub.items()}
    assert len(renamed) == len(hub) and (scheme == "hub" or renamed != hub)
    plan = plan_import(specs_of(renamed), architecture, scheme)
    assert plan.naming == scheme and not plan.dropped
    shift = {old: new for old, new in zip(hub, renamed, strict=True)}
    for target in keymap.build_targets(architecture):
        planned = next(t for t in plan.tensors if t.name == target.name)
        assert planned.origin == " + ".join(shift[source] for source in target.sources)


def test_names_of_another_model_are_refused_with_the_known_schemes() -> None:
    with pytest.raises(CheckpointError, match="do not have the names of a LLaVA-NeXT model") as caught:
        plan_import(specs_of({f"transformer.h.{i}.attn.weight": (2, 2) for i in range(4)}), Architecture(), "gpt2")
    assert "hub (" in caught.value.hint and "original (" in caught.value.hint


def test_every_rule_is_used_once() -> None:
    architecture = replace(Architecture(), spatial_pool_mode="conv")
    targets = keymap.build_targets(architecture)
    names = [t.name for t in targets]
    sources = [source for t in targets for source in t.sources]
    assert len(set(names)) == len(names) and len(set(sources)) == len(sources)
    assert not set(sources) & set(keymap.carried_tensors(architecture))
    assert all(keymap.is_hub_name(source) for source in sources)


def test_the_layer_that_is_used_decides_what_is_carried() -> None:
    last = replace(Architecture(), vision_feature_layer=-1)
    assert set(keymap.carried_tensors(last)) == {
        f"{hf_names.TOWER}post_layernorm.weight",
        f"{hf_names.TOWER}post_layernorm.bias",
    }
    assert len(keymap.carried_tensors(Architecture())) == 18
    assert keymap.hub_tensors(last).keys() == keymap.hub_tensors(Architecture()).keys()


def test_tied_embeddings_have_no_head() -> None:
    tied = replace(Architecture(), text=TextArchitecture(tie_word_embeddings=True))
    assert "language_model.lm_head.weight" not in keymap.expected_parameters(tied)
    with_head = specs_of(keymap.hub_tensors(Architecture()))
    plan = plan_import(with_head, tied, "tied")
    assert plan.dropped == ((keymap.TIED_HEAD, "config.json ties it to the embedding, so it is not used"),)


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        (["a.0.w", "a.1.w", "a.2.w", "b"], ["a.{0..2}.w (3)", "b"]),
        (["a.0.w", "a.2.w"], ["a.{0,2}.w (2)"]),
        (["a.7.w"], ["a.7.w"]),
        ([f"n{i:03d}" for i in range(50)], [*(f"n{i:03d}" for i in range(20)), "… and 30 more"]),
    ],
)
def test_names_are_folded(names: list[str], lines: list[str]) -> None:
    assert keymap.fold_names(names) == lines


def test_only_plain_numbers_are_layers_and_names_are_cut() -> None:
    names = ["a.007.w", "a.٣.w", f"a.{'9' * 5000}.w", "a.1.w", "a.2.w", "b\x1b[31m\nError: c"]
    lines = keymap.fold_names(names)
    assert "a.{1..2}.w (2)" in lines and "a.007.w" in lines and "b\\x1b[31m\\nError: c" in lines
    assert len(lines) == 5 and max(map(len, lines)) == 120


def test_caches_are_not_weights() -> None:
    assert keymap.is_cache("language_model.model.layers.0.attention.infer_attention.paged_attention_mgr.key_cache")
    assert not keymap.is_cache("language_model.model.norm_out.weight")

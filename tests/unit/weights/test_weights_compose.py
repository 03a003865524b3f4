"""Models put together of parts, and the authors' own repositories."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.model_folder import load_architecture
from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights import keymap
from llavanext_cli.weights.checkpoint import open_checkpoint
from tests.loading import convert, load_parameters
from tests.unit.weights.test_weights_keymap import rename
from tests.unit.weights.tiny import Refused, random_tensors, read_all, write_hf

TOWER, LLAMA = "vision_tower.vision_model.", "language_model.model."
TABLE, HEAD = f"{LLAMA}embed_tokens.weight", "language_model.lm_head.weight"


def text_config(tiny: Architecture, **changes: Any) -> dict[str, Any]:
    text = vars(tiny.text) | changes
    return {"model_type": "llama", **{k: v for k, v in text.items() if v is not None}}


def vision_config(tiny: Architecture) -> dict[str, Any]:
    return vars(tiny.vision) | {"model_type": "clip_vision_model"}


@pytest.fixture
def clip_folder(tmp_path: Path, tiny: Architecture) -> Path:
    """CLIP as published: both towers, the projections, the buffer of positions."""
    shapes = {n.removeprefix("vision_tower."): s for n, s in keymap.hub_tensors(tiny).items() if n.startswith(TOWER)}
    tensors = random_tensors(shapes, seed=1)
    tensors |= random_tensors({"text_model.final_layer_norm.weight": (8,), "visual_projection.weight": (4, 8)}, seed=2)
    tensors["logit_scale"] = np.ones((), np.float32)
    tensors["vision_model.embeddings.position_ids"] = np.arange(5, dtype=np.int64)[None]
    config = {"model_type": "clip", "vision_config": {"hidden_size": 999}, "vision_config_dict": vision_config(tiny)}
    return write_hf(tmp_path / "clip", tensors, config)


@pytest.fixture
def llama_folder(tmp_path: Path, tiny: Architecture) -> Path:
    """Vicuna as published: float16, no media tokens, a buffer for each layer."""
    small = replace(tiny, text=replace(tiny.text, vocab_size=50))
    shapes = {
        n.removeprefix("language_model."): s
        for n, s in keymap.hub_tensors(small).items()
        if n.startswith("language_model.")
    }
    tensors = random_tensors(shapes, seed=3, dtype=np.float16)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    folder = write_hf(tmp_path / "llama", tensors, text_config(tiny, vocab_size=50))
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"0": {"content": "<unk>"}}}))
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 0, "content": "<unk>"}], "model": {}}))
    (folder / "added_tokens.json").write_text('{"<pad>": 49}')
    return folder


def test_a_base_model_of_two_parts(clip_folder: Path, llama_folder: Path, tmp_path: Path, tiny: Architecture) -> None:
    report = convert(None, tmp_path / "base", vision=clip_folder, language=llama_folder, verify=True)
    base = open_checkpoint(tmp_path / "base")
    assert base.architecture == replace(
        tiny,
        text=replace(tiny.text, vocab_size=64),
        video_token_index=50,
        image_token_index=51,
        image_grid_pinpoints=((28, 56), (56, 28), (56, 56), (84, 28), (28, 84)),
    )
    clip, llama, ours = read_all(clip_folder), read_all(llama_folder), read_all(tmp_path / "base")
    np.testing.assert_array_equal(
        ours["vision_tower.layers.1.mlp.fc1.weight"], clip["vision_model.encoder.layers.1.mlp.fc1.weight"]
    )
    for name, source in (("model.tok_embeddings.embedding_weight", "model.embed_tokens.weight"),
                         ("lm_head.weight", "lm_head.weight")):  # fmt: skip
        table = ours[f"language_model.{name}"]
        np.testing.assert_array_equal(table[:50], llama[source])
        mean = llama[source].astype(np.float64).mean(axis=0).astype(np.float16)
        np.testing.assert_array_equal(table[50:], np.tile(mean, (14, 1)))
    for name in ("projector.linear_1.weight", "projector.linear_2.bias", "image_newline"):
        assert ours[name].dtype == np.float16 and ours[name].std() > 0.05
    reasons = " ".join(report.dropped)
    assert "text tower" in reasons and "rope_theta" in reasons and "contrastive" in reasons
    assert report.naming == "clip + llama" and "random" in report.facts[0]


def test_two_names_are_added_to_the_tokenizer(clip_folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    convert(None, tmp_path / "base", vision=clip_folder, language=llama_folder)
    read = {name: json.loads((tmp_path / "base" / name).read_text()) for name in
            ("added_tokens.json", "tokenizer_config.json", "tokenizer.json", "preprocessor_config.json")}  # fmt: skip
    assert read["added_tokens.json"] == {"<pad>": 49, "<video>": 50, "<image>": 51}
    decoder = read["tokenizer_config.json"]["added_tokens_decoder"]
    assert {k: v["content"] for k, v in decoder.items()} == {"0": "<unk>", "50": "<video>", "51": "<image>"}
    assert [t["id"] for t in read["tokenizer.json"]["added_tokens"]] == [0, 50, 51]
    assert read["preprocessor_config.json"]["crop_size"] == {"height": 28, "width": 28}


def test_a_tower_trained_on_images_of_another_scale(clip_folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    """Its settings are not among the base model's files, which get our own."""
    (clip_folder / "preprocessor_config.json").write_text('{"image_std": [0.5, 0.5, 0.5], "size": 28, "crop_size": 28}')
    with pytest.raises(CheckpointError, match="image_std") as caught:
        convert(None, tmp_path / "base", vision=clip_folder, language=llama_folder)
    assert len(caught.value.details) == 1 and not (tmp_path / "base").exists()


def test_the_seed_decides(clip_folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert(None, tmp_path / name, vision=clip_folder, language=llama_folder, seed=seed)
    a, b, c = (load_parameters(tmp_path / name) for name in "abc")
    random = {"image_newline", *(n for n in a if n.startswith("projector."))}
    assert all((a[n] == b[n]).all() for n in a)
    assert {n for n in a if not (a[n] == c[n]).all()} == random


def test_parts_converted_before_give_the_same_model(clip_folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    convert(clip_folder, tmp_path / "v", part="vision", verify=True)
    convert(llama_folder, tmp_path / "l", part="language", verify=True)
    assert all(n.startswith("vision_tower.") for n in read_all(tmp_path / "v"))
    assert all(n.startswith("language_model.") for n in read_all(tmp_path / "l"))
    convert(None, tmp_path / "direct", vision=clip_folder, language=llama_folder)
    convert(None, tmp_path / "joined", vision=tmp_path / "v", language=tmp_path / "l")
    direct, joined = read_all(tmp_path / "direct"), read_all(tmp_path / "joined")
    assert all((direct[n] == joined[n]).all() for n in direct) and direct.keys() == joined.keys()
    with pytest.raises(CheckpointError, match="holds the vision model alone"):
        open_checkpoint(tmp_path / "v")
    with pytest.raises(CheckpointError, match="already converted") as caught:
        convert(tmp_path / "v", tmp_path / "again", part="vision")
    assert "--vision DIR --language DIR" in caught.value.hint


def test_a_tokenizer_with_more_ids_than_the_language_models_rows(
    clip_folder: Path, llama_folder: Path, refused: Refused
) -> None:
    """The rows that are added for <video> and <image> are theirs: `<pad>` would share one."""
    (llama_folder / "added_tokens.json").write_text('{"<pad>": 50}')
    match = r"50 rows, and the tokenizer \(added_tokens\.json\) uses id 50"
    refused(None, match, vision=clip_folder, language=llama_folder)
    refused(llama_folder, match, part="language")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("added_tokens.json", "[]", "expected a JSON object"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("tokenizer.json", "[]", "expected a JSON object"),
        ("tokenizer.json", '{"added_tokens": 3}', "added_tokens must be a list, not 3"),
    ],
)
def test_tokenizer_files_of_another_kind(
    name: str, content: str, match: str, clip_folder: Path, llama_folder: Path, refused: Refused
) -> None:
    (llama_folder / name).write_text(content)
    refused(None, f"{name}: {match}", vision=clip_folder, language=llama_folder)


@pytest.mark.parametrize("key", ["vision_config", "vision_config_dict"])
def test_a_clip_whose_section_is_a_list(key: str, clip_folder: Path, refused: Refused) -> None:
    (clip_folder / "config.json").write_text(json.dumps({"model_type": "clip", key: [1]}))
    refused(clip_folder, "vision_config must be an object", part="vision")


def test_parts_in_the_wrong_place(clip_folder: Path, llama_folder: Path, refused: Refused) -> None:
    refused(None, "not a CLIP model", vision=llama_folder, language=llama_folder)
    fault = refused(None, "a setting of this model is not supported", vision=clip_folder, language=clip_folder)
    assert "model_type: expected llama or mistral, not 'clip'" in fault.details


# ------------------------------------------------------------------------------------------- the authors' repositories


def original_config(tiny: Architecture, **changes: Any) -> dict[str, Any]:
    return {
        **text_config(tiny, vocab_size=50),
        "model_type": "llava_llama",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[336, 672], [672, 672]],
        "mm_spatial_pool_stride": 2,
        **changes,
    }


@pytest.fixture
def original(tmp_path: Path, tiny: Architecture) -> tuple[Path, dict[str, np.ndarray]]:
    """The tower of the real size (the authors name it, they don't describe it), everything else tiny."""
    whole = replace(Architecture(), text=replace(tiny.text, vocab_size=50))
    shapes = {rename(n, "original"): s for n, s in keymap.hub_tensors(whole).items()}
    tensors = {n: np.zeros(s, np.float16) for n, s in shapes.items()}
    tensors |= random_tensors({n: s for n, s in shapes.items() if "vision_tower" not in n}, dtype=np.float16)
    return write_hf(tmp_path / "original", tensors, original_config(tiny)), tensors


def test_an_original_repository(original: tuple[Path, dict], tmp_path: Path, tiny: Architecture) -> None:
    folder, tensors = original
    report = convert(folder, tmp_path / "out", verify=True)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert report.naming == "original"
    assert checkpoint.architecture == replace(
        Architecture(),
        text=replace(tiny.text, vocab_size=64),
        video_token_index=50,
        image_token_index=51,
        image_grid_pinpoints=((672, 336), (672, 672)),  # the authors write (width, height)
    )
    ours = read_all(tmp_path / "out")
    np.testing.assert_array_equal(ours["projector.linear_2.weight"], tensors["model.mm_projector.2.weight"])
    table = ours["language_model.model.tok_embeddings.embedding_weight"]
    np.testing.assert_array_equal(table[:50], tensors["model.embed_tokens.weight"])
    convert(tmp_path / "out", tmp_path / "hf", to="hf")
    assert load_architecture(tmp_path / "hf") == checkpoint.architecture


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"mm_vision_tower": "google/siglip-so400m"}, "mm_vision_tower: 'google/siglip-so400m' is not supported"),
        ({"mm_projector_type": "linear"}, "mm_projector_type: 'linear' is not supported; supported: 'mlp2x_gelu'"),
        ({"model_type": "llava_qwen"}, "model_type: 'llava_qwen'"),
        ({"model_type": [1]}, "model_type: [1]"),
        ({"image_grid_pinpoints": "[[1, 1]," * 10_000}, "image_grid_pinpoints: expected a list, each"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end: True"),
        ({"mm_vision_select_feature": "cls"}, "vision_feature_select_strategy: expected default or full, not 'cls'"),
        ({"image_grid_pinpoints": "(1x1),(6x6)"}, "image_grid_pinpoints: expected a list, each"),
    ],
)
def test_original_settings_that_cannot_be_followed(
    changes: dict, fault: str, tiny: Architecture, tmp_path: Path, refused: Refused
) -> None:
    folder = write_hf(tmp_path / "o", {"x": np.zeros(1, np.float32)}, original_config(tiny, **changes))
    details = refused(folder, "a setting of this model is not supported").details
    assert any(fault in line for line in details) and max(map(len, details)) <= 300

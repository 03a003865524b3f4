"""`run_convert` on tiny folders: what it writes, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.hf_config import architecture_to_hf
from llavanext_cli.errors import CheckpointError, LlavaNextError
from llavanext_cli.weights import convert as convert_module
from llavanext_cli.weights import keymap, stream
from llavanext_cli.weights.checkpoint import open_checkpoint
from tests.loading import convert
from tests.unit.weights.tiny import MakeHf, Refused, assert_same, read_all

TOWER, LLAMA = "vision_tower.vision_model.", "language_model.model."


def test_parameters_get_their_names_and_bytes(
    hf_folder: Path, hub_tensors: dict, tmp_path: Path, tiny: Architecture
) -> None:
    report = convert(hf_folder, tmp_path / "out", verify=True)
    ours = read_all(tmp_path / "out")
    assert {n: a.shape for n, a in ours.items()} == keymap.expected_parameters(tiny)
    qkv = np.concatenate([hub_tensors[f"{TOWER}encoder.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"])
    np.testing.assert_array_equal(ours["vision_tower.layers.1.attention.qkv.weight"], qkv)
    np.testing.assert_array_equal(
        ours["language_model.model.layers.1.feed_forward.w2.weight"],
        hub_tensors[f"{LLAMA}layers.1.mlp.down_proj.weight"],
    )
    np.testing.assert_array_equal(ours["vision_tower.pre_layernorm.bias"], hub_tensors[f"{TOWER}pre_layrnorm.bias"])
    assert report.verified and report.naming == "hub" and report.tensors == len(ours) + len(report.carried)
    assert report.nbytes == sum(a.nbytes for a in hub_tensors.values()) and report.notes == (
        f"no tokenizer.model in {hf_folder}: train and ask need one beside the weights",
    )


def test_shards_on_both_sides(hf_folder: Path, hub_tensors: dict, tmp_path: Path) -> None:
    (hf_folder / "tokenizer_config.json").write_text('{"legacy": false}')
    report = convert(hf_folder, tmp_path / "out", shard_bytes=4000)
    sizes: dict[str, list[int]] = {}
    for spec in open_checkpoint(tmp_path / "out").parameters.values():
        sizes.setdefault(spec.path.name, []).append(spec.nbytes)
    assert len(report.files) - 1 == len(sizes) > 3
    assert all(sum(tensors) <= 4000 or len(tensors) == 1 for tensors in sizes.values())
    name_map = json.loads((tmp_path / "out" / "param_name_map.json").read_text())
    assert name_map == {n: s.path.name for n, s in open_checkpoint(tmp_path / "out").parameters.items()}
    report = convert(tmp_path / "out", tmp_path / "back", to="hf", shard_bytes=4000)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.nbytes and index["weight_map"].keys() == hub_tensors.keys()
    assert_same(read_all(tmp_path / "back"), hub_tensors)
    for name in ("config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf_folder / name).read_bytes()
    assert not (tmp_path / "back" / "llavanext_manifest.json").exists()
    convert(tmp_path / "back", tmp_path / "again")
    assert_same(read_all(tmp_path / "again"), read_all(tmp_path / "out"))


def test_many_shards_need_few_open_files(hf_folder: Path, hub_tensors: dict, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    report = convert(hf_folder, tmp_path / "out", shard_bytes=1)
    assert len(report.files) > 50
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, hard))
    try:
        convert(tmp_path / "out", tmp_path / "back", to="hf", verify=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert_same(read_all(tmp_path / "back"), hub_tensors)


def test_the_manifest_describes_every_tensor(hf_folder: Path, tmp_path: Path) -> None:
    import hashlib

    convert(hf_folder, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "llavanext_manifest.json").read_text())
    arrays = read_all(tmp_path / "out")
    assert manifest["tensors"].keys() == arrays.keys() and manifest["source"] == {
        "kind": "hf",
        "name": ["hf"],
        "naming": "hub",
    }
    entry = manifest["tensors"]["vision_tower.layers.0.attention.qkv.bias"]
    array = arrays["vision_tower.layers.0.attention.qkv.bias"]
    assert entry == {
        "file": "model-00001-of-00001.safetensors",
        "dtype": "F32",
        "shape": [24],
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        "from": " + ".join(f"{TOWER}encoder.layers.0.self_attn.{p}_proj.bias" for p in "qkv"),
    }
    assert str(tmp_path) not in json.dumps(manifest)


def test_force_replaces_what_was_there(hf_folder: Path, tmp_path: Path) -> None:
    convert(hf_folder, tmp_path / "out")
    with pytest.raises(LlavaNextError, match="out already holds a checkpoint"):
        convert(hf_folder, tmp_path / "out")
    convert(hf_folder, tmp_path / "out", force=True, dtype="float16")
    assert {s.dtype for s in open_checkpoint(tmp_path / "out").parameters.values()} == {"F16"}
    (tmp_path / "out" / "notes.md").write_text("precious")
    with pytest.raises(LlavaNextError, match=r"holds 'notes\.md' beside a checkpoint"):
        convert(hf_folder, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "notes.md").read_text() == "precious"


def test_progress_ends_at_the_total(hf_folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = convert(hf_folder, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (report.nbytes, report.nbytes)
    calls.clear()
    convert(hf_folder, tmp_path / "again", verify=True, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls) and calls[-1] == (2 * report.nbytes, 2 * report.nbytes)


# ---------------------------------------------------------------------------------------------------------------- types


def test_types_change_when_asked(make_hf: MakeHf, tiny: Architecture, hub_tensors: dict, tmp_path: Path) -> None:
    name = f"{LLAMA}layers.0.mlp.up_proj.weight"
    hub_tensors[name][:2, 0] = 1e5, -2e6
    config = architecture_to_hf(tiny) | {"torch_dtype": "float32"}
    folder = make_hf(hub_tensors)
    (folder / "config.json").write_text(json.dumps(config))
    report = convert(folder, tmp_path / "out", dtype="float16", verify=True)
    arrays = read_all(tmp_path / "out")
    assert {a.dtype for a in arrays.values()} == {np.dtype(np.float16)}
    w3 = arrays["language_model.model.layers.0.feed_forward.w3.weight"]
    assert w3[:2, 0].tolist() == [65504.0, -65504.0]
    np.testing.assert_array_equal(w3[2:], hub_tensors[name][2:].astype(np.float16))
    assert report.notes[:-1] == (
        "language_model.model.layers.0.feed_forward.w3.weight: 2 values were clamped to the type's "
        "largest finite value",
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("kind", "part"),
    [("clip", "vision"), ("clip_vision_model", "vision"), ("llama", "language"), ("mistral", "language")],
)
def test_a_part_alone_says_how_it_is_converted(kind: str, part: str, hf_folder: Path, refused: Refused) -> None:
    (hf_folder / "config.json").write_text(json.dumps({"model_type": kind}))
    assert f"--from-{part}" in refused(hf_folder, f"holds only a {part} model").hint


def test_missing_unknown_and_wrong_tensors_are_all_listed(make_hf: MakeHf, hub_tensors: dict, refused: Refused) -> None:
    for layer in range(2):
        del hub_tensors[f"{LLAMA}layers.{layer}.mlp.up_proj.weight"]
    del hub_tensors[f"{TOWER}encoder.layers.0.self_attn.k_proj.bias"]
    hub_tensors["language_model.model.layers.0.self_attn.q_proj.lora_A"] = np.zeros((2, 2), np.float32)
    hub_tensors["visitor.weight"] = np.zeros(2, np.float32)
    hub_tensors["multi_modal_projector.linear_1.weight"] = np.zeros((12, 9), np.float32)
    hub_tensors["image_newline"] = np.zeros(12, np.int64)
    fault = refused(make_hf(hub_tensors), "3 missing, 2 unknown, 2 with an invalid shape or type")
    assert set(fault.details) == {
        f"missing: {LLAMA}layers.{{0..1}}.mlp.up_proj.weight (2)",
        f"missing: {TOWER}encoder.layers.0.self_attn.k_proj.bias",
        f"unknown: {LLAMA}layers.0.self_attn.q_proj.lora_A",
        "unknown: visitor.weight",
        "multi_modal_projector.linear_1.weight: shape [12, 9], config.json implies [12, 8]",
        "image_newline: type I64 is not supported; supported: F32, F16, BF16",
    }


@pytest.mark.parametrize("missing", ["intermediate_size", None])
def test_sizes_that_config_does_not_give_come_first(missing: str | None, hf_folder: Path, refused: Refused) -> None:
    config = json.loads((hf_folder / "config.json").read_text())
    if missing:
        del config["text_config"][missing]
        line = "not in config.json, so transformers' defaults are used: text_config.intermediate_size 11008"
    else:
        del config["text_config"]
        line = "not in config.json, so transformers' defaults are used: text_config.hidden_size 4096, "
    (hf_folder / "config.json").write_text(json.dumps(config))
    fault = refused(hf_folder, "do not fit")
    assert fault.details[0].startswith(line)


def test_parts_of_a_stack_must_have_one_type(make_hf: MakeHf, hub_tensors: dict, refused: Refused) -> None:
    name = f"{TOWER}encoder.layers.0.self_attn.q_proj.weight"
    hub_tensors[name] = hub_tensors[name].astype(np.float16)
    fault = refused(make_hf(hub_tensors), "1 with an invalid shape or type")
    assert "its sources have different types (F16, F32)" in fault.details[0]


def test_a_name_in_two_schemes_at_once(make_hf: MakeHf, tiny: Architecture, refused: Refused) -> None:
    conv = replace(tiny, spatial_pool_mode="conv")
    tensors = {n: np.zeros(s, np.float32) for n, s in keymap.hub_tensors(conv).items()}
    tensors["vision_resampler.pool.bias"] = tensors["model.vision_resampler.pool.bias"]
    fault = refused(make_hf(tensors, spatial_pool_mode="conv"), "1 with an invalid shape or type")
    assert fault.details[0].startswith("two names for one tensor: ")


def test_a_source_that_only_transformers_misses_something_of(
    make_hf: MakeHf, hub_tensors: dict, tmp_path: Path
) -> None:
    del hub_tensors[f"{TOWER}post_layernorm.bias"]
    report = convert(make_hf(hub_tensors), tmp_path / "out")
    assert "1 tensors that only transformers needs" in report.notes[0]
    with pytest.raises(CheckpointError, match="1 missing") as caught:
        convert(tmp_path / "out", tmp_path / "back", to="hf")
    assert caught.value.details == (f"missing: {TOWER}post_layernorm.bias",)


def test_the_wrong_direction_is_explained(hf_folder: Path, tmp_path: Path, refused: Refused) -> None:
    refused(hf_folder, "already a Hugging Face folder", to="hf")
    convert(hf_folder, tmp_path / "ours")
    fault = refused(tmp_path / "ours", "already converted")
    assert "--to hf" in fault.hint
    refused(hf_folder / "model.safetensors", "is a file; name the folder")


def test_a_disk_too_small(hf_folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("llavanext_cli.weights.folder.shutil.disk_usage", lambda _: usage)
    refused(hf_folder, "1 kB are free")


def test_a_tokenizer_with_more_ids_than_rows(
    hf_folder: Path, make_tokenizer_folder: Callable[..., Path], tmp_path: Path, refused: Refused
) -> None:
    (hf_folder / "added_tokens.json").write_text('{"<image>": 64}')
    refused(hf_folder, r"64 rows, and the tokenizer \(added_tokens\.json\) uses id 64")
    (hf_folder / "added_tokens.json").write_text('{"<image>": 63}')
    convert(hf_folder, tmp_path / "fits")
    shutil.copy(make_tokenizer_folder() / "tokenizer.model", hf_folder)
    refused(hf_folder, r"64 rows, and the tokenizer \(tokenizer\.model\) uses id \d\d\d")


def test_names_in_a_file_are_short_and_printable_in_errors(
    make_hf: MakeHf, hub_tensors: dict, refused: Refused
) -> None:
    for name in ("evil\x1b[31m", "two\nlines", "x" * 50_000, f"{LLAMA}layers.{'9' * 5000}.mlp.up_proj.weight"):
        hub_tensors[name] = np.zeros(1, np.float32)
    fault = refused(make_hf(hub_tensors), "4 unknown")
    assert all(line.isprintable() and len(line) < 200 for line in fault.details)
    assert "unknown: evil\\x1b[31m" in fault.details


def test_a_write_that_fails_leaves_nothing(hf_folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream.os, "write", full)
    refused(hf_folder, "the disk is full")


def test_an_interrupt_leaves_nothing(hf_folder: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(hf_folder, tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("options", [{}, {"weight_format": "ckpt"}, {"to": "hf"}])
def test_verify_finds_a_byte_that_changed_on_the_disk(
    options: dict, hf_folder: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(hf_folder, tmp_path / "ours")
    export = options.get("to") == "hf"
    source, writer = (tmp_path / "ours", "_write_hf") if export else (hf_folder, "_write_checkpoint")
    write = getattr(convert_module, writer)

    def write_and_damage(folder: Path, *arguments: object) -> object:
        written = write(folder, *arguments)
        (path,) = folder.glob("model*")
        path.write_bytes(path.read_bytes()[:-3] + b"!!!")
        return written

    monkeypatch.setattr(convert_module, writer, write_and_damage)
    refused(source, "differs from what was written", verify=True, **options)


def test_verify_compares_a_checkpoint_with_its_manifest(hf_folder: Path, tmp_path: Path) -> None:
    """A byte that changed since the checkpoint was written would be exported as if it were right."""
    ours = tmp_path / "ours"
    convert(hf_folder, ours)
    done: list[int] = []
    report = convert(ours, tmp_path / "back", to="hf", verify=True, progress=lambda now, total: done.append(now))
    assert report.verified and done[-1] == 3 * report.nbytes
    (weights,) = ours.glob("model*.safetensors")
    damaged = bytearray(weights.read_bytes())
    damaged[-3] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="differs from its manifest"):
        convert(ours, tmp_path / "again", to="hf", verify=True)
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".again*"))

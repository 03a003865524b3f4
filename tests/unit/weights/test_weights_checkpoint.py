"""Our checkpoint folder: opened, refused, written by a training run, and taken back to Hugging Face."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.errors import CheckpointError
from llavanext_cli.training.slices import plan_array
from llavanext_cli.weights.checkpoint import open_checkpoint, save_checkpoint_folder
from tests.loading import convert, load_parameters
from tests.unit.weights.tiny import assert_same, read_all


def test_a_checkpoint_is_opened(hf_folder: Path, tmp_path: Path, tiny: Architecture) -> None:
    convert(hf_folder, tmp_path / "out", shard_bytes=4000)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.architecture == tiny
    assert [f.name for f in checkpoint.files] == sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(checkpoint.carried) == 18


def test_what_is_no_checkpoint_says_what_to_do(hf_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    convert(hf_folder, run / "model")
    for path, message, hint in (
        (hf_folder, "not yet converted", f"llavanext convert {hf_folder} hf-ms"),
        (tmp_path / "none", "no such folder", "llavanext convert"),
        (hf_folder / "config.json", "not a folder", "llavanext convert"),
        (tmp_path, "not a checkpoint folder", "llavanext train"),
        (run, "not a checkpoint folder", f"is in {run / 'model'}"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(path)
        assert hint in caught.value.hint


def test_a_checkpoint_that_was_changed_is_not_opened(hf_folder: Path, tmp_path: Path) -> None:
    convert(hf_folder, tmp_path / "out")
    path = tmp_path / "out" / "model-00001-of-00001.safetensors"
    whole = path.read_bytes()
    arrays = load_file(path)

    save_file({n: a for n, a in arrays.items() if n != "image_newline"}, path)
    with pytest.raises(CheckpointError, match="1 missing"):
        open_checkpoint(tmp_path / "out")
    save_file(arrays | {"more": np.zeros(1, np.float32)}, path)
    with pytest.raises(CheckpointError, match="1 unknown"):
        open_checkpoint(tmp_path / "out")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors is missing"):
        open_checkpoint(tmp_path / "out")
    path.write_bytes(whole)
    manifest = tmp_path / "out" / "llavanext_manifest.json"
    good = manifest.read_text()
    for bad, message in (
        (good.replace('"llavanext_manifest": 1', '"llavanext_manifest": 2'), "version 2; this program reads version 1"),
        (good.replace("model-00001-of", "../model-00001-of"), "is outside the folder"),
        (good.replace('"shape": [\n    12\n   ]', '"shape": 5', 1), "has no shape"),
        (good.replace('"shape": [\n    12\n   ]', '"shape": true', 1), "has no shape"),
        (good.replace('"format": "safetensors"', '"format": "x\\u001b[31m"'), r"holds weights as x\\x1b\[31m,"),
        ("{}", "version None"),
        ("{", "not a JSON file"),
        ('{"llavanext_manifest": 1, "format": "safetensors"}', "no object 'tensors'"),
    ):
        manifest.write_text(bad)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "out")
    manifest.write_text(good)
    assert open_checkpoint(tmp_path / "out")


def test_ckpt_files_are_for_mindspore(hf_folder: Path, tmp_path: Path) -> None:
    convert(hf_folder, tmp_path / "out", weight_format="ckpt", verify=True)
    with pytest.raises(CheckpointError, match="holds weights as ckpt") as caught:
        open_checkpoint(tmp_path / "out")
    assert "--format safetensors" in caught.value.hint


def test_a_trained_model_goes_back_to_hugging_face(hf_folder: Path, hub_tensors: dict, tmp_path: Path) -> None:
    convert(hf_folder, tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    trained = {name: plan_array(name, array + 1) for name, array in load_parameters(base).items()}
    save_checkpoint_folder(tmp_path / "tuned", trained, base, {"step": 7})
    tuned = open_checkpoint(tmp_path / "tuned")
    assert tuned.manifest["extra"] == {"step": 7} and tuned.manifest["source"]["from"] == base.manifest["source"]
    convert(tmp_path / "tuned", tmp_path / "back", to="hf", verify=True)
    carried = base.carried.keys()
    assert_same(read_all(tmp_path / "back"), {n: a if n in carried else a + 1 for n, a in hub_tensors.items()})


def test_a_training_run_cannot_write_half_a_model(hf_folder: Path, tmp_path: Path) -> None:
    convert(hf_folder, tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    arrays = load_parameters(base)
    del arrays["image_newline"]
    arrays["projector.linear_1.bias"] = np.zeros(5, np.float32)
    arrays["adam_m"] = np.zeros(5, np.float32)
    with pytest.raises(CheckpointError, match="1 missing, 1 unknown, 1 with an invalid shape or type"):
        save_checkpoint_folder(tmp_path / "out", {name: plan_array(name, a) for name, a in arrays.items()}, base)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []

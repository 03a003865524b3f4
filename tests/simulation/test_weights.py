"""Converted weights of the 7B's shapes (2 layers), sliced by MindSpore with the strategy of that very compile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from llavanext_cli.config.hf_config import architecture_to_hf
from llavanext_cli.weights.convert import run_convert
from llavanext_cli.weights.keymap import expected_parameters, hub_tensors
from llavanext_cli.weights.request import ConvertRequest
from tests.simulation.conftest import Compile

STAGE2, SPLIT = "video-7b-stage2", ("parallel.data=4", "parallel.tensor=2")
DATA, TENSOR = 4, 2
ROWS = ("tok_embeddings.embedding_weight", "lm_head.weight", "wq.weight", "wk.weight", "wv.weight", "w1.weight")
ROWS += ("w3.weight", "projector.linear_1.weight", "projector.linear_1.bias")
COLUMNS = ("wo.weight", "w2.weight", "projector.linear_2.weight")


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("mindspore_cpu")
def test_slices_of_every_rank_are_numpy_slices(compiled: Compile, tmp_path: Path):
    import mindspore as ms

    report = compiled(STAGE2, *SPLIT)
    assert report.fault == ""
    model = report.preset.model
    hub, converted, run = tmp_path / "hub", tmp_path / "converted", tmp_path / "run"
    write_random_hub(hub, model)
    run_convert(ConvertRequest(hub, converted))
    (tmp_path / "hub" / "model.safetensors").unlink()
    whole = {name: reader for reader in map(open_file, converted.glob("*.safetensors")) for name in reader.keys()}  # noqa: SIM118
    assert whole.keys() == expected_parameters(model).keys()

    cut = 0
    for rank in range(DATA * TENSOR):
        ms.load_distributed_checkpoint(
            network=None,
            predict_strategy=str(report.strategy),
            unified_safetensors_dir=str(converted),
            dst_safetensors_dir=str(run),
            rank_id=rank,
            format="safetensors",
        )
        file = run / f"rank_{rank}" / "net.safetensors"
        with safe_open(file, "numpy") as slices:
            assert set(slices.keys()) == whole.keys()
            for name in slices.keys():  # noqa: SIM118
                array, expected = slices.get_tensor(name), numpy_slice(name, whole[name].get_tensor(name), rank)
                np.testing.assert_array_equal(bits(array), bits(expected), err_msg=f"{name}, rank {rank}")
                cut += array.size < np.prod(whole[name].get_slice(name).get_shape())
                if rank == 0:
                    assert array.shape == report.slices[name].shape, name
        file.unlink()
    assert cut >= 8 * 20


def write_random_hub(folder: Path, model) -> None:
    """A Hugging Face folder of random float16 bits: comparing is exact, and making them takes seconds."""
    import json

    folder.mkdir()
    generator = np.random.default_rng(0)
    tensors = {
        name: generator.integers(0, 0x7C00, shape, np.uint16).view(np.float16)
        for name, shape in hub_tensors(model).items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(architecture_to_hf(model)))


def numpy_slice(name: str, array: np.ndarray, rank: int) -> np.ndarray:
    """Rank r is device r % 2 of its tensor-parallel pair and r // 2 of the four pairs."""
    copies, copy = DATA * TENSOR, rank
    if name.endswith(ROWS):
        array, copies, copy = np.split(array, TENSOR, axis=0)[rank % TENSOR], DATA, rank // TENSOR
    elif name.endswith(COLUMNS):
        array, copies, copy = np.split(array, TENSOR, axis=1)[rank % TENSOR], DATA, rank // TENSOR
    spread = "norm" not in name and array.size * 4 >= 65536 and len(array) % copies == 0  # float32 while training
    return np.split(array, copies)[copy] if spread else array


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint16)


def open_file(path: Path):
    return safe_open(path, "numpy")

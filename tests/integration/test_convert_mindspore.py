"""What MindSpore and MindFormers make of a converted folder: strict loading, and slices for eight devices.

The strategies are real ones of the tiny model, compiled for 8 Ascend devices in MindSpore's simulation mode
(assets/weights/strategies).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llavanext_cli.weights.checkpoint import open_checkpoint
from llavanext_cli.weights.ranks import read_strategy
from tests.integration.test_convert import bytes_of
from tests.loading import convert, load_parameters

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("mindspore_cpu")  # whoever loads MindSpore first sets it up for all
STRATEGIES = Path(__file__).parents[1] / "assets" / "weights" / "strategies"


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    from llavanext_cli.config.hf_config import architecture_to_hf
    from tests.assets.weights.strategies.make_strategies import TINY

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "hf"
    config = LlavaNextVideoConfig.from_dict(architecture_to_hf(TINY))
    LlavaNextVideoForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(hf_folder: Path) -> Path:
    folder = hf_folder.parent / "ours"
    convert(hf_folder, folder, shard_bytes=100_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def build_network(folder: Path):
    from llavanext_cli.model.config import LlavaNextConfig
    from llavanext_cli.model.registry import LlavaNext

    return LlavaNext(
        LlavaNextConfig(
            architecture=open_checkpoint(folder).architecture,
            target="CPU",
            seq_length=64,
            tiles=3,
            compute_dtype="float32",
            use_flash_attention=False,
        )
    )


def test_mindformers_own_loader(converted: Path) -> None:
    """With the settings of a YAML that names the folder: single card, load_ckpt_format safetensors."""
    from mindformers.tools.register import MindFormerConfig
    from mindformers.utils.load_checkpoint_utils import (
        CheckpointFileMode,
        _get_checkpoint_mode,
        load_safetensors_checkpoint,
    )

    config = MindFormerConfig(
        use_parallel=False,
        auto_trans_ckpt=False,
        load_ckpt_format="safetensors",
        load_checkpoint=str(converted),
        checkpoint={"load_path": str(converted)},
        model={"model_config": {}},
        resume_training=False,
    )
    assert _get_checkpoint_mode(config) == CheckpointFileMode.MULTI_CHECKPOINT_FILE.value
    network = build_network(converted)
    files = sorted(map(str, converted.glob("*.safetensors")))
    load_safetensors_checkpoint(config, files, network, None, str(converted), None)
    reference = load_parameters(converted)
    filled = {name: parameter.asnumpy() for name, parameter in network.parameters_dict().items()}
    assert filled.keys() == reference.keys()
    for name, array in reference.items():
        np.testing.assert_array_equal(filled[name], array, err_msg=name)


@pytest.mark.parametrize("strategy", ["dp4_mp2", "dp8"])
def test_sliced_for_eight_ranks_and_merged_again(
    strategy: str, converted: Path, hf_folder: Path, tmp_path: Path
) -> None:
    """auto_trans_ckpt's own slicing (load_distributed_checkpoint) gives NumPy slices of the source; merging the slices
    gives the source."""
    import mindspore as ms
    from safetensors.numpy import load_file

    layouts = read_strategy(STRATEGIES / f"{strategy}.ckpt")
    reference = load_parameters(converted)
    seen = {"whole": 0, "cut": 0}
    for rank in range(8):
        ms.load_distributed_checkpoint(
            network=None,
            predict_strategy=str(STRATEGIES / f"{strategy}.ckpt"),
            unified_safetensors_dir=str(converted),
            dst_safetensors_dir=str(tmp_path / "run"),
            rank_id=rank,
            format="safetensors",
        )
        slices = load_file(tmp_path / "run" / f"rank_{rank}" / "net.safetensors")
        assert slices.keys() == reference.keys()
        for name, array in reference.items():
            box = layouts[name].box(array.shape, rank)
            expected = array[tuple(slice(*span) for span in box)]
            np.testing.assert_array_equal(slices[name], expected, err_msg=f"{name}, rank {rank}")
            seen["whole" if expected.shape == array.shape else "cut"] += 1
        strategies = tmp_path / "run" / "strategy"
        strategies.mkdir(exist_ok=True)
        (strategies / f"ckpt_strategy_rank_{rank}.ckpt").symlink_to(STRATEGIES / f"{strategy}.ckpt")
    assert min(seen.values()) > 100

    report = convert(tmp_path / "run", tmp_path / "merged", base_checkpoint=converted, verify=True)
    assert report.facts[0] == "slices of 8 ranks, epoch 0, step 0"
    merged = load_parameters(tmp_path / "merged")
    for name, array in reference.items():
        np.testing.assert_array_equal(merged[name], array, err_msg=name)
    convert(tmp_path / "run", tmp_path / "back", base_checkpoint=converted, to="hf", verify=True)
    assert bytes_of(tmp_path / "back") == bytes_of(hf_folder)


def test_a_large_tensor_in_ckpt_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore joins the slices of one tensor by their order; 512 MB each in life, 1 kB here."""
    import mindspore as ms

    from llavanext_cli.weights import ckpt_format
    from llavanext_cli.weights.stream import Stream
    from llavanext_cli.weights.tensors import FileRange, PlannedTensor

    monkeypatch.setattr(ckpt_format, "SLICE_BYTES", 1024)
    arrays = {
        "a.weight": np.arange(3000, dtype=np.float32).reshape(30, 100),
        "b.bias": np.arange(5, dtype=np.float32),
    }
    planned = []
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(array.tobytes())
        planned.append(PlannedTensor(name, "F32", array.shape, (FileRange(tmp_path / name, 0, array.nbytes),)))
    with Stream(0) as stream:
        ckpt_format.write_ckpt(tmp_path / "x.ckpt", planned, stream)
    loaded = ms.load_checkpoint(str(tmp_path / "x.ckpt"))
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name].asnumpy(), array)

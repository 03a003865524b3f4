"""Slices of several ranks, put together again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights import keymap
from llavanext_cli.weights.checkpoint import open_checkpoint
from llavanext_cli.weights.protobuf import write_delimited, write_varint
from llavanext_cli.weights.ranks import read_strategy
from llavanext_cli.weights.readers import read_safetensors_header
from llavanext_cli.weights.slices import SliceLayout, join_slices
from llavanext_cli.weights.stream import read_chunks
from tests.loading import convert, load_parameters
from tests.unit.weights.tiny import Refused, assert_same, read_all

STRATEGIES = Path(__file__).parents[2] / "assets" / "weights" / "strategies"


def cut(array: np.ndarray, layout: SliceLayout | None, rank: int) -> np.ndarray:
    if layout is None:
        return array
    return np.ascontiguousarray(array[tuple(slice(*span) for span in layout.box(array.shape, rank))])


def test_ranks_stand_in_a_grid_with_the_last_axis_fastest() -> None:
    rows = SliceLayout((4, 2), ((0,), ()))
    columns = SliceLayout((4, 2), ((), (0,)))
    assert [rows.box((6, 4), rank)[0] for rank in range(4)] == [(0, 3), (3, 6), (0, 3), (3, 6)]
    assert [columns.box((6, 4), rank) for rank in (2, 5)] == [((0, 6), (0, 2)), ((0, 6), (2, 4))]
    both = SliceLayout((4, 2), ((1, 0),))  # one axis cut along both: the first is the coarser
    assert [both.box((16,), rank)[0] for rank in (0, 1, 2, 7)] == [(0, 2), (2, 4), (4, 6), (14, 16)]


def test_the_optimizer_cuts_the_first_axis_again() -> None:
    columns = SliceLayout((4, 2), ((), (0,)), optimizer_step=2, optimizer_size=-1)
    assert columns.box((8, 6), 0) == ((0, 2), (0, 3))
    assert columns.box((8, 6), 5) == ((4, 6), (3, 6))
    half = SliceLayout((8,), ((), ()), optimizer_step=1, optimizer_size=2)
    assert [half.box((8, 6), rank)[0] for rank in range(4)] == [(0, 4), (4, 8), (0, 4), (4, 8)]


def test_real_strategy_files_are_read() -> None:
    layouts = read_strategy(STRATEGIES / "dp4_mp2.ckpt")
    model = "language_model.model.layers.1."
    assert layouts[f"{model}attention.wo.weight"] == SliceLayout((4, 2), ((), (0,)), 2, -1)
    assert layouts[f"{model}attention.wq.weight"] == SliceLayout((4, 2), ((0,), ()), 2, -1)
    assert layouts[f"{model}ffn_norm.weight"] == SliceLayout((4, 2), ((),))
    alone = read_strategy(STRATEGIES / "dp8.ckpt")
    assert alone[f"{model}attention.wo.weight"] == SliceLayout((8,), ((), ()), 1, -1)
    assert len(layouts) == len(alone) == 165


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_was_cut_is_joined_to_the_bit(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    grid = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3)))
    ndim = data.draw(st.integers(1, 3))
    axes = data.draw(st.permutations(range(len(grid))))
    homes = [data.draw(st.integers(-1, ndim - 1)) for _ in axes]
    tensor_map = tuple(tuple(a for a, home in zip(axes, homes, strict=True) if home == i) for i in range(ndim))
    # Optimizer groups as MindSpore makes them: the ranks that hold copies, when the grid's first axis is one of them.
    repeated = homes[list(axes).index(len(grid) - 1)] == -1 and all(
        home != -1 for axis, home in zip(axes, homes, strict=True) if axis != len(grid) - 1
    )
    step = int(np.prod(grid[1:])) if repeated and data.draw(st.booleans()) else 0
    layout = SliceLayout(grid, tensor_map, step, -1 if step else 0)
    shape = tuple(
        int(np.prod([grid[len(grid) - 1 - a] for a in one])) * data.draw(st.integers(1, 3)) for one in tensor_map
    )
    shape = (shape[0] * (grid[0] if step else 1), *shape[1:])
    array = np.arange(np.prod(shape), dtype=np.float16).reshape(shape)

    folder = tmp_path_factory.mktemp("ranks")
    ranks = range(int(np.prod(grid)))
    specs = {}
    for rank in ranks:
        save_file({"w": cut(array, layout, rank)}, folder / f"{rank}.safetensors")
        specs[rank] = read_safetensors_header(folder / f"{rank}.safetensors")["w"]
    merged = join_slices("w", shape, specs, dict.fromkeys(ranks, layout))
    start = data.draw(st.integers(0, shape[0]))
    end = data.draw(st.integers(start, shape[0]))
    joined = b"".join(bytes(chunk) for piece in merged.rows(start, end) for chunk in read_chunks(piece))
    assert joined == array[start:end].tobytes()


@pytest.fixture
def base(hf_folder: Path, tmp_path: Path) -> Path:
    convert(hf_folder, tmp_path / "base")
    return tmp_path / "base"


def write_strategy(path: Path, layouts: dict[str, SliceLayout]) -> None:
    """MindSpore's message, written by hand."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"".join(write_varint(1 << 3) + write_varint(value & (1 << 64) - 1) for value in values)

    data = b""
    for name, layout in layouts.items():
        flat = tuple(one[0] if one else -1 for one in layout.tensor_map)
        inner = write_delimited(1, numbers(layout.grid)) + write_delimited(2, numbers(flat))
        for field, value in ((5, 0), (6, layout.optimizer_step), (7, layout.optimizer_size)):
            inner += write_varint(field << 3) + write_varint(value & (1 << 64) - 1)
        data += write_delimited(3, write_delimited(1, name.encode()) + write_delimited(2, inner))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A run of four ranks (a grid of 2 by 2) that added 1 to every weight: slices, state of the optimizer, counters."""
    weights = {name: array + 1 for name, array in load_parameters(base).items()}
    layouts = {}
    for name, array in weights.items():
        columns = name.endswith(("wo.weight", "w2.weight"))
        if array.ndim == 2 and array.shape[0] % 4 == 0 and array.shape[1] % 2 == 0:
            layouts[name] = SliceLayout((2, 2), ((), (0,)) if columns else ((0,), ()), 2, -1)
    assert 10 < len(layouts) < len(weights)
    for rank in range(4):
        folder = tmp_path / "run" / "checkpoint" / f"rank_{rank}"
        folder.mkdir(parents=True)
        slices = {name: cut(array, layouts.get(name), rank) for name, array in weights.items()}
        state = {"adam_m.image_newline": slices["image_newline"], "global_step": np.array([9], np.int32)}
        save_file(slices | state, folder / f"tiny_rank_{rank}-1_20.safetensors")
        save_file({"image_newline": slices["image_newline"]}, folder / f"tiny_rank_{rank}-1_10.safetensors")
        write_strategy(tmp_path / "run" / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt", layouts)
    return tmp_path / "run"


def test_a_distributed_run_becomes_a_checkpoint(run: Path, base: Path, tmp_path: Path) -> None:
    report = convert(run, tmp_path / "out", base_checkpoint=base, verify=True)
    expected = {name: array + 1 for name, array in load_parameters(base).items()}
    assert_same(load_parameters(open_checkpoint(tmp_path / "out")), expected)
    wanted = keymap.carried_tensors(open_checkpoint(base).architecture)
    assert open_checkpoint(tmp_path / "out").carried.keys() == wanted.keys()
    assert report.facts[0] == "slices of 4 ranks, epoch 1, step 20"
    assert report.dropped == ("adam_m.image_newline: state of the optimizer", "global_step: a counter of the run")


def test_and_a_hugging_face_folder_at_once(run: Path, base: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "direct", base_checkpoint=base, to="hf", verify=True, dtype="float16")
    convert(run, tmp_path / "merged", base_checkpoint=base)
    convert(tmp_path / "merged", tmp_path / "two-steps", to="hf", dtype="float16")
    assert_same(read_all(tmp_path / "direct"), read_all(tmp_path / "two-steps"))


def test_what_is_missing_is_said(run: Path, base: Path, refused: Refused) -> None:
    fault = refused(run, base_checkpoint=None, match="slices of several ranks")
    assert "--like CHECKPOINT" in fault.hint
    refused(base, base_checkpoint=base, match="no rank_")
    for rank in range(4):
        (run / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt").rename(run / f"hidden_{rank}")
    refused(run, base_checkpoint=base, match=r"rank 0 holds \[\d+, \d+\], but its strategy says")


def test_missing_ranks_and_steps(run: Path, base: Path, refused: Refused) -> None:
    ranks = run / "checkpoint"
    (ranks / "rank_1" / "tiny_rank_1-1_20.safetensors").unlink()
    fault = refused(run, base_checkpoint=base, match="weights are missing")  # step 10 is incomplete
    assert "missing: projector.linear_1.bias" in fault.details
    (ranks / "rank_1" / "tiny_rank_1-1_10.safetensors").unlink()
    refused(run, base_checkpoint=base, match="no step was saved by all 4 ranks")
    (ranks / "rank_1").rmdir()
    refused(run, base_checkpoint=base, match="no folder for rank 1")


def test_slices_that_leave_a_part_open(tmp_path: Path) -> None:
    save_file({"w": np.zeros((2, 4), np.float32)}, tmp_path / "0.safetensors")
    spec = read_safetensors_header(tmp_path / "0.safetensors")["w"]
    rows = SliceLayout((2,), ((0,), ()))
    with pytest.raises(CheckpointError, match="8 of 16 elements"):
        join_slices("w", (4, 4), {0: spec}, {0: rows})
    with pytest.raises(CheckpointError, match="does not fit"):
        join_slices("w", (5, 4), {0: spec}, {0: rows})


def test_slices_that_contradict_each_other(tmp_path: Path) -> None:
    """Three strategies: together as many elements as the whole, but rows 1 twice and row 3 not at all."""
    for rank, rows in enumerate((2, 1, 1)):
        save_file({"w": np.zeros((rows, 4), np.float32)}, tmp_path / f"{rank}.safetensors")
    specs = {rank: read_safetensors_header(tmp_path / f"{rank}.safetensors")["w"] for rank in range(3)}
    half, quarter = SliceLayout((2,), ((0,), ())), SliceLayout((4,), ((0,), ()))
    with pytest.raises(CheckpointError, match="some slices overlap"):
        join_slices("w", (4, 4), specs, {0: half, 1: quarter, 2: quarter})


def test_slices_of_different_types(run: Path, base: Path, refused: Refused) -> None:
    path = run / "checkpoint" / "rank_3" / "tiny_rank_3-1_20.safetensors"
    arrays = load_file(path)
    save_file(arrays | {"image_newline": arrays["image_newline"].astype(np.float16)}, path)
    refused(run, base_checkpoint=base, match=r"image_newline: the slices have different types \(F16, F32\)")


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        (SliceLayout((2,), ((0,), (0,)), 1, -1), "an axis of the grid cuts twice"),
        (SliceLayout((2,), ((5,), ())), "a layout outside its grid"),
    ],
)
def test_a_strategy_that_cannot_be(layout: SliceLayout, match: str, tmp_path: Path) -> None:
    write_strategy(tmp_path / "s" / "x.ckpt", {"w": layout})
    with pytest.raises(CheckpointError, match=match):
        read_strategy(tmp_path / "s" / "x.ckpt")


@pytest.mark.parametrize("damage", [b"\x0a\xff", b"\x1a\x02\x0a\x00", b"\x18\x05", b"\xff" * 12, b"PK\x03\x04"])
def test_a_damaged_strategy_file(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.ckpt").write_bytes(damage)
    with pytest.raises(CheckpointError, match="not a strategy file of MindSpore"):
        read_strategy(tmp_path / "s.ckpt")

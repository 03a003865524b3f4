"""Checkpoints of a run: whole or absent, whatever ends the writer; and how slices of devices are joined."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llavanext_cli.config.architecture import Architecture, TextArchitecture, VisionArchitecture
from llavanext_cli.config.schema import Parallel
from llavanext_cli.errors import CheckpointError, TrainingError
from llavanext_cli.training import session
from llavanext_cli.training.run_checkpoints import (
    RunState,
    check_settings,
    find_run_state,
    keep_newest,
    open_run_state,
    read_exact,
    remove_leftovers,
    step_folder,
)
from llavanext_cli.training.session import TrainingSession
from llavanext_cli.training.slices import write_slices
from llavanext_cli.weights.checkpoint import open_checkpoint, write_checkpoint
from llavanext_cli.weights.keymap import expected_parameters
from llavanext_cli.weights.slices import SliceLayout
from llavanext_cli.weights.stream import Stream
from llavanext_cli.weights.tensors import GeneratedBytes, PlannedTensor
from tests.loading import load_parameters

SETTINGS = {"train.seed": 0, "samples": 48}
ARCHITECTURE = Architecture(
    vision=VisionArchitecture(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    ),
    text=TextArchitecture(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=128,
    ),
    image_token_index=101,
    video_token_index=100,
    image_grid_pinpoints=((28, 56),),
)


def arrays_of(step: int) -> dict[str, np.ndarray]:
    """Weights and optimizer of a step: every number is the step, so a mixture would show."""
    shapes = expected_parameters(ARCHITECTURE)
    arrays = {name: np.full(shape, step, np.float32) for name, shape in shapes.items()}
    arrays |= {f"adam_m.{name}": np.full(shape, -step, np.float32) for name, shape in shapes.items()}
    return arrays | {"global_step": np.array([step], np.int32)}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    from llavanext_cli.config.hf_config import architecture_to_hf

    folder = tmp_path_factory.mktemp("base") / "model"
    folder.mkdir()
    plan = []
    for name, shape in expected_parameters(ARCHITECTURE).items():
        zeros = np.zeros(shape, np.float32)
        plan.append(
            PlannedTensor(name, "F32", shape, (GeneratedBytes(zeros.nbytes, lambda a=zeros: iter([a.data.cast("B")])),))
        )
    with Stream(0) as stream:
        write_checkpoint(folder, plan, [], {"kind": "test"}, stream)
    (folder / "config.json").write_text(json.dumps(architecture_to_hf(ARCHITECTURE)))
    return folder


class FakeCell:
    """A training cell. Compiling it slices its parameters: here whoever sets `arrays` does."""

    def __init__(self, arrays):
        self.arrays = arrays

    def parameters_dict(self):
        return {name: SimpleNamespace(shape=a.shape, asnumpy=lambda a=a: a) for name, a in self.arrays.items()}


def save(base: Path, folder: Path, step: int, final: bool = False) -> None:
    session = TrainingSession(open_checkpoint(base), settings=SETTINGS)
    session.begin(FakeCell(arrays_of(step)))
    session.save(folder, step, final)


def read_all(state: RunState) -> dict[str, np.ndarray]:
    return {name: read_exact(spec) for name, spec in state.tensors.items()}


WRITER = """
import sys
import time
from pathlib import Path
from tests.unit.training.test_training_run_checkpoints import save
from llavanext_cli.training.run_checkpoints import keep_newest, step_folder
base, checkpoints = Path(sys.argv[1]), Path(sys.argv[2])
step = int(sys.argv[3])
while True:
    step += 1
    begun = time.monotonic()
    save(base, step_folder(checkpoints, step), step)
    keep_newest(checkpoints, 2)
    print(time.monotonic() - begun, flush=True)
"""


def test_a_writer_killed_at_twenty_random_moments_never_leaves_a_checkpoint_that_loads_wrong(base, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    moments = random.Random(7)
    last = leftovers = 0
    for _ in range(20):
        words = [sys.executable, "-c", WRITER, str(base), str(checkpoints), str(last)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)
        seconds = float(process.stdout.readline() or process.stderr.read())  # that one checkpoint takes here and now
        time.sleep(moments.uniform(0.0, 3 * seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        leftovers += bool(list(checkpoints.glob(".step-*")))
        state, damaged = find_run_state(checkpoints)
        assert damaged == {}, "every folder that has its name is whole"
        step = state.step if state else 0
        assert step > last, "an earlier checkpoint was lost"
        if state is not None:
            assert all((array == step).all() for array in load_parameters(state.model).values())
            tensors = read_all(state)
            assert tensors.pop("global_step") == step
            assert all((array == -step).all() for array in tensors.values())
        last = step
        remove_leftovers(checkpoints, tmp_path / "model")
    assert leftovers > 3, "writers were killed in the middle"


def test_a_checkpoint_that_was_changed_is_skipped(base, tmp_path):
    for step in (1, 2, 3, 4):
        save(base, step_folder(tmp_path, step), step)
    (tmp_path / "step-00000004" / "training" / "state.json").unlink()
    weights = next((tmp_path / "step-00000003").glob("model-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    state = tmp_path / "step-00000002" / "training" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    found, damaged = find_run_state(tmp_path)
    assert found.step == 1
    assert [folder.name for folder in damaged] == ["step-00000004", "step-00000003", "step-00000002"]
    reasons = list(damaged.values())
    assert "training/state.json is missing" in reasons[0]
    assert "is damaged" in reasons[1]
    assert find_run_state(tmp_path / "empty") == (None, {})


def test_a_full_disk_leaves_the_earlier_checkpoint(base, tmp_path, monkeypatch):
    import errno

    from llavanext_cli.weights import stream

    save(base, tmp_path / "step-00000001", 1)
    monkeypatch.setattr(stream.os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(CheckpointError, match="the disk is full"):
        save(base, tmp_path / "step-00000002", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert open_run_state(tmp_path / "step-00000001").step == 1


def test_the_newest_are_kept(base, tmp_path):
    for step in (8, 9, 10):
        save(base, step_folder(tmp_path, step), step)
    keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000009", "step-00000010"]


def test_other_settings_are_refused_with_both_values(base, tmp_path):
    save(base, tmp_path / "run" / "checkpoints" / "step-00000001", 1)
    state, _ = find_run_state(tmp_path / "run" / "checkpoints")
    check_settings(state, SETTINGS)
    with pytest.raises(TrainingError, match="other settings") as fault:
        check_settings(state, SETTINGS | {"samples": 47})
    assert fault.value.details == ("samples: 48 until now, 47 with this command",)


def test_the_final_model_has_no_state(base, tmp_path):
    save(base, tmp_path / "model", 3, final=True)
    opened = open_checkpoint(tmp_path / "model")
    assert opened.manifest["extra"] == {"step": 3}
    assert not (tmp_path / "model" / "training").exists()


GRID = (4, 2)
"""8 ranks: data parallel 4, tensor parallel 2."""


def layouts_and_arrays():
    """Random arrays, cut as dp 4 x mp 2 cuts them, moments over the data-parallel ranks as well."""
    rng = np.random.default_rng(3)
    arrays, layouts = {}, {}
    for name, array in arrays_of(0).items():
        arrays[name] = rng.normal(size=array.shape).astype(array.dtype) if array.dtype == np.float32 else array + 5
        rows = array.shape[0] if array.ndim else 0
        if array.ndim == 2 and rows % 8 == 0 and not name.startswith("adam"):
            layouts[name] = SliceLayout(GRID, ((0,), ()), optimizer_step=2, optimizer_size=4)
        elif array.ndim == 2 and not name.startswith("adam"):
            layouts[name] = SliceLayout(GRID, ((), (0,)))
    return arrays, layouts


def cut(arrays, layouts, rank):
    def slices(name, array):
        layout = layouts.get(name) or layouts.get(name.partition(".")[2])
        return tuple(slice(*part) for part in layout.box(array.shape, rank)) if layout else ()

    return {name: array[slices(name, array)] for name, array in arrays.items()}


@pytest.fixture
def sliced(base, monkeypatch):
    """`sliced(rank, ranks)` is the session of one rank whose cell was compiled, and so holds slices."""
    arrays, layouts = layouts_and_arrays()
    monkeypatch.setattr(TrainingSession, "_layouts", lambda self: layouts)

    def build(rank: int, ranks: int) -> TrainingSession:
        parallel = Parallel(devices=ranks, data=ranks)
        result = TrainingSession(open_checkpoint(base), settings=SETTINGS, rank=rank, parallel=parallel)
        cell = FakeCell(arrays)
        result.begin(cell)
        assert not result.sliced
        cell.arrays = cut(arrays, layouts, rank)
        assert result.sliced
        return result

    build.arrays = arrays
    return build


def test_slices_of_eight_ranks_become_one_folder(sliced, tmp_path):
    folder, parts = tmp_path / "step-00000005", tmp_path / ".step-00000005.parts"
    for rank in range(1, 8):
        sliced(rank, 8).save(folder, 5)
    sizes = [(parts / f"rank_{rank}.safetensors").stat().st_size for rank in range(1, 8)]
    assert max(sizes) < 0.2 * sum(array.nbytes for array in sliced.arrays.values()), "copies are written once"
    sliced(0, 8).save(folder, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    state = open_run_state(folder)
    back = load_parameters(state.model) | read_all(state)
    assert back.keys() == sliced.arrays.keys()
    assert all(np.array_equal(back[name], sliced.arrays[name]) for name in back)


def test_a_rank_that_fails_ends_the_wait_of_the_first(sliced, tmp_path, monkeypatch):
    folder = tmp_path / "step-00000005"
    with monkeypatch.context() as patch:
        patch.setattr(session, "write_slices", full)
        with pytest.raises(CheckpointError, match="the disk is full"):
            sliced(1, 2).save(folder, 5)
    with pytest.raises(CheckpointError, match=r"ranks \[1\] did not write"):
        sliced(0, 2).save(folder, 5)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_on_the_first_rank_waits_for_the_others_and_leaves_nothing(sliced, tmp_path, monkeypatch):
    folder, first, second = tmp_path / "model", sliced(0, 2), sliced(1, 2)

    def late(*words, rank, **more) -> None:
        if rank == 0:
            full()
        time.sleep(0.5)
        write_slices(*words, rank=rank, **more)

    monkeypatch.setattr(session, "write_slices", late)
    other = threading.Thread(target=second.save, args=(folder, 5, True))
    other.start()
    with pytest.raises(CheckpointError, match="the disk is full"):
        first.save(folder, 5, True)
    other.join()
    assert list(tmp_path.iterdir()) == [], "what is left would be joined with the slices of the next attempt"


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_what_a_killed_run_left_of_its_slices_is_removed_before_the_next_start(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for name in ("checkpoints/.step-00000005.parts", "checkpoints/step-00000004", ".model.parts", "model"):
        (tmp_path / name).mkdir(parents=True)
    remove_leftovers(checkpoints, tmp_path / "model")
    assert sorted(path.name for path in (*tmp_path.iterdir(), *checkpoints.iterdir())) == [
        "checkpoints", "model", "step-00000004",
    ]  # fmt: skip

"""What a worker keeps while MindFormers trains: the parameters of the run, how they are filled, and how they are saved.

On a CPU every worker holds every weight, and the first one writes. On Ascend a weight, or its moments, may be sliced
over the devices: see slices.py.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli.config.schema import Parallel
from llavanext_cli.errors import CheckpointError
from llavanext_cli.training.run_checkpoints import RunState, read_exact, save_run_state
from llavanext_cli.training.slices import join_slices, parts_of, plan_array, wait_for_ranks, write_slices
from llavanext_cli.weights.adapter import merge_adapter
from llavanext_cli.weights.checkpoint import Checkpoint, save_checkpoint_folder
from llavanext_cli.weights.ranks import read_strategy
from llavanext_cli.weights.slices import SliceLayout
from llavanext_cli.weights.stream import disk_error
from llavanext_cli.weights.tensors import PlannedTensor

if TYPE_CHECKING:
    from mindspore import Parameter, nn

    from llavanext_cli.config.schema import Lora

NOT_SAVED = ("accu_grads.",)
"""Sums of gradients: zero between two steps."""


class TrainingSession:
    """The parameters of a run.

    Args:
        base: the checkpoint that the run began with.
        rank: this worker.
        parallel: how the work is shared.
        settings: what the losses depend on, see `plan.run_settings`.
        note: kept in the manifests of the checkpoints.
        state: what to continue from, or None.
        lora: of a run that trains low-rank matrices. They are merged into the weights that are written.
    """

    def __init__(
        self,
        base: Checkpoint,
        *,
        rank: int = 0,
        parallel: Parallel = Parallel(),  # noqa: B008 - it is frozen
        settings: Mapping[str, Any] | None = None,
        note: Mapping[str, Any] | None = None,
        state: RunState | None = None,
        lora: Lora | None = None,
    ):
        self.base, self.rank, self.parallel = base, rank, parallel
        self.settings, self.note = settings or {}, note or {}
        self.state, self.lora = state, lora
        self.cell: nn.Cell | None = None
        self.whole: dict[str, tuple[int, ...]] = {}

    def begin(self, cell: nn.Cell) -> None:
        """Remember the training cell and the whole shapes; fill optimizer and counters of a run that is resumed.

        Called before the step is compiled: compiling slices these values like all others.
        """
        self.cell = cell
        parameters = self.parameters()
        self.whole = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        if self.state is not None:
            fill_state(parameters, self.state, self.base.parameters.keys())

    def parameters(self) -> dict[str, Parameter]:
        """Everything that changes while training, by name."""
        assert self.cell is not None, "training has started"
        return {n: p for n, p in self.cell.parameters_dict().items() if not n.startswith(NOT_SAVED)}

    @property
    def sliced(self) -> bool:
        """Whether devices hold slices of parameters: compiling the step slices them, on all devices alike."""
        return any(tuple(parameter.shape) != self.whole[name] for name, parameter in self.parameters().items())

    def save(self, folder: Path, step: int, final: bool = False) -> None:
        """Write a checkpoint, or the finished model (`final`), which needs no state. Every worker calls this after the
        same step.

        Raises:
            CheckpointError: it cannot be written, or another worker's slices are missing.
        """
        sliced = self.sliced
        if self.rank and not sliced:
            return
        arrays = {name: parameter.asnumpy() for name, parameter in self.parameters().items()}
        if not sliced:
            self._write(folder, {name: plan_array(name, array) for name, array in arrays.items()}, step, final)
            return
        parts = parts_of(folder)
        try:
            parts.mkdir(parents=True, exist_ok=True)
            stage = self.parallel.devices // self.parallel.pipeline
            write_slices(parts, arrays, self.whole, self._layouts(), rank=self.rank, stage=stage)
        except BaseException as fault:
            self._give_up(parts)
            if isinstance(fault, OSError):
                raise disk_error(parts, fault) from fault
            raise
        if self.rank == 0:
            try:
                wait_for_ranks(parts, self.parallel.devices)
                self._write(folder, join_slices(parts), step, final)
            finally:
                shutil.rmtree(parts, ignore_errors=True)

    def _give_up(self, parts: Path) -> None:
        """Say that this rank's slices will not come. The first removes what all have written."""
        with contextlib.suppress(OSError):
            (parts / f"rank_{self.rank}.safetensors").unlink(missing_ok=True)
            (parts / f"rank_{self.rank}.failed").touch()
        if self.rank == 0:
            with contextlib.suppress(CheckpointError):
                wait_for_ranks(parts, self.parallel.devices)
            shutil.rmtree(parts, ignore_errors=True)

    def _write(self, folder: Path, tensors: Mapping[str, PlannedTensor], step: int, final: bool) -> None:
        names, note = self.base.parameters.keys(), {**self.note, "step": step}
        weights = {name: tensors[name] for name in names}
        if self.lora is not None:
            weights |= merge_adapter(tensors, self.lora)
        if final:
            save_checkpoint_folder(folder, weights, base=self.base, extra=note)
        else:
            state = [tensor for name, tensor in tensors.items() if name not in names]
            save_run_state(folder, weights, state, self.base, step=step, settings=self.settings, note=note)

    def _layouts(self) -> dict[str, SliceLayout]:
        """From the strategy file that MindSpore wrote when it compiled the step."""
        import mindspore as ms

        return read_strategy(Path(ms.get_auto_parallel_context("strategy_ckpt_save_file")))


def fill_state(parameters: Mapping[str, Parameter], state: RunState, weights: Collection[str]) -> None:
    """Give the optimizer's parameters, and LoRA's matrices, the values they had.

    Args:
        parameters: all of the training cell, by name.
        weights: names of the model's own parameters, which are filled elsewhere.

    Raises:
        CheckpointError: the state belongs to another optimizer or model.
    """
    import mindspore as ms

    wanted = {name: parameter for name, parameter in parameters.items() if name not in weights}
    faults = [f"missing: {name}" for name in wanted.keys() - state.tensors.keys()]
    faults += [f"not used: {name}" for name in state.tensors.keys() - wanted.keys()]
    faults += [
        f"{name}: {list(spec.shape)} saved, {list(wanted[name].shape)} needed"
        for name, spec in state.tensors.items()
        if name in wanted and spec.shape != tuple(wanted[name].shape)
    ]
    if faults:
        raise CheckpointError(
            f"{state.model.folder}: its optimizer does not fit this run",
            "resume with the settings that the run was started with",
            sorted(faults)[:20],
        )
    for name, spec in state.tensors.items():  # one at a time: together they are twice the model's size
        wanted[name].set_data(ms.Tensor(read_exact(spec), wanted[name].dtype))

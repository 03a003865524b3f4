"""What a worker keeps at hand while MindFormers trains: network and optimizer, how they are filled and saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli.errors import CheckpointError
from llavanext_cli.training.saving import CheckpointSaver
from llavanext_cli.training.state import RunState, read_exact
from llavanext_cli.weights.checkpoint import Checkpoint
from llavanext_cli.weights.merge import SliceLayout, read_strategy

if TYPE_CHECKING:
    from mindspore import Parameter, nn

    from llavanext_cli.config.schema import Lora, Parallel

NOT_SAVED = ("accu_grads.",)
"""Sums of gradients: zero between two steps."""


class TrainingSession:
    """The parameters of a run.

    Args:
        network: the model, filled.
        checkpoint: what the run began with.
        settings: see `plan.run_settings`.
        note: kept in the manifests of the checkpoints.
        rank: this worker.
        parallel: how the work is shared.
        state: what to go on from, or None.
        lora: of a run that trains low-rank matrices, or None.
    """

    def __init__(
        self,
        network: nn.Cell,
        checkpoint: Checkpoint,
        *,
        settings: Mapping[str, Any],
        note: Mapping[str, Any],
        rank: int,
        parallel: Parallel,
        state: RunState | None,
        lora: Lora | None = None,
    ):
        self.network, self.checkpoint = network, checkpoint
        self.settings, self.note = settings, note
        self.rank, self.parallel, self.state = rank, parallel, state
        self.lora = lora
        self.cell: nn.Cell | None = None
        self.whole: dict[str, tuple[int, ...]] = {}

    def begin(self, cell: nn.Cell) -> None:
        """Remember the training cell and the whole shapes; fill in optimizer and counters of a run that goes on.

        Called before the step is compiled, which cuts what is filled in here as it cuts everything else.
        """
        self.cell = cell
        parameters = self.parameters()
        self.whole = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        if self.state is not None:
            fill_state(parameters, self.state, self.checkpoint.parameters.keys())

    def parameters(self) -> dict[str, Parameter]:
        """Everything that changes while training, by name."""
        assert self.cell is not None, "training has begun"
        return {n: p for n, p in self.cell.parameters_dict().items() if not n.startswith(NOT_SAVED)}

    @property
    def sliced(self) -> bool:
        """Whether devices hold slices of parameters. Compiling the step cuts them on all devices alike; where a queue
        feeds it, MindSpore notes the layouts on a cell around this one."""
        return any(tuple(parameter.shape) != self.whole[name] for name, parameter in self.parameters().items())

    def save(self, folder: Path, step: int, final: bool = False) -> None:
        """Write a checkpoint, or the finished model. Every worker calls this after the same step.

        Raises:
            CheckpointError: it cannot be written.
        """
        sliced = self.sliced
        if self.rank and not sliced:
            return
        saver = CheckpointSaver(
            self.checkpoint,
            settings=self.settings,
            rank=self.rank,
            ranks=self.parallel.devices,
            whole=self.whole,
            layouts=self._layouts if sliced else None,
            lora=self.lora,
            stage=self.parallel.devices // self.parallel.pipeline,
        )
        arrays = {name: parameter.asnumpy() for name, parameter in self.parameters().items()}
        saver.save(folder, arrays, step, {**self.note, "step": step}, final)

    def _layouts(self) -> dict[str, SliceLayout]:
        """From the strategy file that MindSpore wrote when it compiled the step."""
        import mindspore as ms

        return read_strategy(Path(ms.get_auto_parallel_context("strategy_ckpt_save_file")))


def fill_state(parameters: Mapping[str, Parameter], state: RunState, weights: Any) -> None:
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
            "Resume with the settings the run was begun with.",
            sorted(faults)[:20],
        )
    for name, spec in state.tensors.items():  # one at a time: together they are twice the model's size
        wanted[name].set_data(ms.Tensor(read_exact(spec), wanted[name].dtype))

"""What a conversion will write, worked out from headers alone: nothing is read but names, types, shapes and offsets.

Every source tensor is used once, carried along, or dropped for a named reason; every tensor of the result is filled
once with its exact shape. Otherwise there is no plan, but an error with all the lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.mindformers import PART_PREFIXES
from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights import keymap
from llavanext_cli.weights.headers import LISTED, WEIGHT_DTYPES, TensorSpec, read_folder, short
from llavanext_cli.weights.hf_names import CLIP_LAYOUTS, HUB, LAYOUTS, LLAMA_LAYOUTS, detect_layout
from llavanext_cli.weights.stream import Extent, Made, PlannedTensor


@dataclass(frozen=True)
class Plan:
    """What a conversion writes, and what it leaves out.

    Attributes:
        tensors: parameters of the result, in the order in which they are written.
        carried: kept beside the parameters under hub names, for the way back.
        dropped: (name on disk, reason).
        layout: name of the source's layout.
        notes: what the user should beware of.
        facts: what the user may want to know.
        copies: name and pieces of tensors that were saved several times and must be equal; one of them is used.
        files: name → content of JSON files that are written in place of the source's.
    """

    tensors: tuple[PlannedTensor, ...]
    carried: tuple[PlannedTensor, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    layout: str = ""
    notes: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    copies: tuple[tuple[str, tuple[Extent, ...]], ...] = ()
    files: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.tensors, *self.carried))


@dataclass
class _Faults:
    """The lists a conversion fails with."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def raise_if_any(self, where: str, hint: str, remarks: Sequence[str] = ()) -> None:
        counts = [
            f"{len(names)} {word}"
            for names, word in ((self.missing, "missing"), (self.extra, "unknown"), (self.wrong, "of the wrong kind"))
            if names
        ]
        if counts:
            raise CheckpointError(
                f"{where}: weights and config.json do not fit: {', '.join(counts)}", hint, [*remarks, *self.lines()]
            )

    def lines(self) -> Iterable[str]:
        yield from (f"missing: {name}" for name in keymap.fold_names(self.missing))
        yield from (f"unknown: {name}" for name in keymap.fold_names(self.extra))
        yield from self.wrong[:LISTED]
        if len(self.wrong) > LISTED:
            yield f"… and {len(self.wrong) - LISTED} more of the wrong kind"


FIT_HINT = "Check that config.json and the weights come from the same model and revision."


def extent(spec: TensorSpec) -> Extent | Made:
    """A stored tensor's bytes in the order of its shape."""
    if spec.strides is not None:
        from llavanext_cli.weights.dtypes import gather_strided  # NumPy is needed for these only

        return gather_strided(spec)
    return Extent(spec.path, spec.offset, spec.nbytes)


PARTS = {"vision": CLIP_LAYOUTS, "language": LLAMA_LAYOUTS}


def plan_folder(source: Path, architecture: Architecture, part: str | None = None, remarks: Sequence[str] = ()) -> Plan:
    """`plan_import` of all the weights in a folder."""
    left_out: list[tuple[str, str]] = []
    plan = plan_import(read_folder(source, left_out), architecture, str(source), part, remarks)
    return replace(plan, dropped=(*plan.dropped, *left_out))


def plan_import(
    specs: Mapping[str, TensorSpec],
    architecture: Architecture,
    where: str,
    part: str | None = None,
    remarks: Sequence[str] = (),
) -> Plan:
    """Plan our parameters from a Hugging Face folder's tensors.

    Args:
        specs: name on disk → where its bytes lie, in any of the layouts of `hf_names`.
        architecture: what config.json says; with `part`, only that part of it counts.
        where: the folder, for messages.
        part: "vision" or "language" for a folder that holds CLIP or Llama alone, None for a whole LLaVA-NeXT.
        remarks: lines before the lists, where tensors do not fit.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has another shape or type than config.json implies.
    """
    layout, hub_names = detect_layout(specs, where, keymap.is_hub_name, PARTS[part] if part else LAYOUTS)
    dropped = [(name, reason) for name in specs if (reason := layout.drop_reason(name))]
    faults = _Faults(extra=[n for n in specs if n not in hub_names and not layout.drop_reason(n)])
    by_hub: dict[str, TensorSpec] = {}
    for name, hub in hub_names.items():
        if hub in by_hub:
            faults.wrong.append(f"there twice: {short(by_hub[hub].name)} and {short(name)}")
        by_hub[hub] = specs[name]

    prefix = PART_PREFIXES[part] if part else ""
    tensors = []
    used: set[str] = set()
    for target in keymap.build_targets(architecture):
        if target.name.startswith(prefix):
            used.update(target.sources)
            if planned := _plan_target(target, by_hub, faults):
                tensors.append(planned)
    carried, absent = [], []
    for hub, shape in keymap.carried_tensors(architecture).items():
        if not hub.startswith(prefix):
            continue
        used.add(hub)
        if hub not in by_hub:
            absent.append(hub)
        elif _fits(by_hub[hub], hub, shape, faults):
            carried.append(PlannedTensor(hub, by_hub[hub].dtype, shape, (extent(by_hub[hub]),), by_hub[hub].name))

    for hub, spec in by_hub.items():
        if hub in used:
            continue
        if hub == keymap.TIED_HEAD and architecture.text.tie_word_embeddings:
            dropped.append((spec.name, "config.json ties it to the embedding, so it is not used"))
        elif reason := keymap.drop_reason(hub):
            dropped.append((spec.name, reason))
        else:
            faults.extra.append(spec.name)
    faults.raise_if_any(where, FIT_HINT, remarks)
    notes = []
    if absent:
        notes.append(
            f"{len(absent)} tensors that only transformers needs are not in the source, "
            "so this checkpoint cannot be converted back with --to hf"
        )
    return Plan(tuple(tensors), tuple(carried), tuple(dropped), layout.name, tuple(notes))


def _plan_target(target: keymap.Target, by_hub: Mapping[str, TensorSpec], faults: _Faults) -> PlannedTensor | None:
    missing = [source for source in target.sources if source not in by_hub]
    faults.missing.extend(missing)
    there = [by_hub[source] for source in target.sources if source in by_hub]
    fitting = [spec for spec in there if _fits(spec, spec.name, target.source_shape, faults)]
    if missing or len(fitting) < len(there):
        return None
    dtypes = {spec.dtype for spec in there}
    if len(dtypes) > 1:
        faults.wrong.append(f"{target.name}: made of tensors of different types ({', '.join(sorted(dtypes))})")
        return None
    origin = " + ".join(spec.name for spec in there)
    return PlannedTensor(target.name, there[0].dtype, target.shape, tuple(map(extent, there)), origin)


def _fits(spec: TensorSpec, name: str, shape: tuple[int, ...], faults: _Faults) -> bool:
    if spec.shape != shape:
        faults.wrong.append(f"{short(name)}: shape {list(spec.shape)}, config.json implies {list(shape)}")
    elif spec.dtype not in WEIGHT_DTYPES:
        faults.wrong.append(f"{short(name)}: type {spec.dtype} is not supported; supported: {', '.join(WEIGHT_DTYPES)}")
    else:
        return True
    return False


def check_parameters(
    shapes: Mapping[str, tuple[int, ...]], architecture: Architecture, where: str, hint: str = FIT_HINT
) -> None:
    """Compare names and shapes of our parameters with what the architecture needs.

    Raises:
        CheckpointError: with the lists of missing, extra and mis-shaped weights.
    """
    compare_shapes(shapes, keymap.expected_parameters(architecture), where, hint)


def compare_shapes(
    shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str, hint: str
) -> None:
    """`check_parameters` against any mapping of wanted names and shapes."""
    faults = _Faults(
        missing=[name for name in wanted if name not in shapes], extra=[name for name in shapes if name not in wanted]
    )
    faults.wrong = [
        f"{short(name)}: shape {short(list(shapes[name]))}, needed {short(list(shape))}"
        for name, shape in wanted.items()
        if name in shapes and tuple(shapes[name]) != tuple(shape)
    ]
    faults.raise_if_any(where, hint)


class RowSource(Protocol):
    """Our parameter, stored in one piece or in slices."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, end: int) -> tuple[Extent | Made, ...]:
        """The bytes of these rows along the first axis."""


@dataclass(frozen=True)
class StoredRows:
    """A `RowSource` that lies in one piece."""

    spec: TensorSpec

    @property
    def dtype(self) -> str:
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    def rows(self, start: int, end: int) -> tuple[Extent, ...]:
        row = self.spec.nbytes // self.shape[0]
        return (Extent(self.spec.path, self.spec.offset + start * row, (end - start) * row),)


def plan_export(
    parameters: Mapping[str, RowSource], carried: Mapping[str, TensorSpec], architecture: Architecture, where: str
) -> Plan:
    """Plan a Hugging Face folder (hub names) from our parameters and the carried tensors.

    Raises:
        CheckpointError: a parameter or a carried tensor is missing, extra or mis-shaped.
    """
    check_parameters({name: source.shape for name, source in parameters.items()}, architecture, where)
    faults = _Faults()
    planned: dict[str, PlannedTensor] = {}
    for target in keymap.build_targets(architecture):
        whole = parameters[target.name]
        height = target.source_shape[0]
        for number, hub in enumerate(target.sources):
            pieces = whole.rows(number * height, (number + 1) * height)
            planned[hub] = PlannedTensor(hub, whole.dtype, target.source_shape, pieces, target.name)
    for hub, shape in keymap.carried_tensors(architecture).items():
        if hub not in carried:
            faults.missing.append(hub)
        elif _fits(carried[hub], hub, shape, faults):
            planned[hub] = PlannedTensor(hub, carried[hub].dtype, shape, (extent(carried[hub]),), "carried")
    faults.raise_if_any(
        where, "transformers needs these too; convert from a complete Hugging Face folder to carry them along."
    )
    return Plan(tuple(planned[hub] for hub in keymap.hub_tensors(architecture)), layout=HUB.name)

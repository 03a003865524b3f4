"""What a conversion will write, worked out from headers alone: nothing is read but names, types, shapes and offsets.

Every source tensor is used once, carried along, or dropped for a named reason; every tensor of the result is filled
once with its exact shape. Otherwise there is no plan, but an error with all the lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavanext_cli.config.architecture import PART_PREFIXES, Architecture
from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights import keymap
from llavanext_cli.weights.dtypes import copy_tensor, source_piece
from llavanext_cli.weights.hf_names import CLIP_SCHEMES, HUB, LLAMA_SCHEMES, SCHEMES, detect_scheme
from llavanext_cli.weights.readers import read_folder
from llavanext_cli.weights.slices import SlicedTensor
from llavanext_cli.weights.tensors import LISTED, WEIGHT_DTYPES, PlannedTensor, TensorSpec
from llavanext_cli.weights.untrusted import short

PART_SCHEMES = {"vision": CLIP_SCHEMES, "language": LLAMA_SCHEMES}
FIT_HINT = "check that config.json and the weights come from the same model and revision"


@dataclass(frozen=True)
class Plan:
    """What a conversion writes, and what it leaves out.

    Attributes:
        tensors: of the result, in the order in which they are written.
        carried: kept beside our parameters under hub names, for the way back.
        dropped: (name on disk, reason).
        naming: name of the source's naming scheme.
        notes: what the user should beware of.
        facts: what the user may want to know.
        files: name → content of JSON files that are written in place of the source's.
    """

    tensors: tuple[PlannedTensor, ...]
    carried: tuple[PlannedTensor, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    naming: str = ""
    notes: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    files: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.tensors, *self.carried))


@dataclass
class _Faults:
    """The lists with which a conversion fails."""

    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)

    def raise_if_any(self, where: str, hint: str, remarks: Sequence[str] = ()) -> None:
        kinds = {"missing": self.missing, "unknown": self.unknown, "with an invalid shape or type": self.invalid}
        counts = [f"{len(names)} {kind}" for kind, names in kinds.items() if names]
        if not counts:
            return
        lines = [
            *remarks,
            *(f"missing: {name}" for name in keymap.fold_names(self.missing)),
            *(f"unknown: {name}" for name in keymap.fold_names(self.unknown)),
            *self.invalid[:LISTED],
        ]
        if len(self.invalid) > LISTED:
            lines.append(f"… and {len(self.invalid) - LISTED} more with an invalid shape or type")
        raise CheckpointError(f"{where}: the weights do not fit config.json: {', '.join(counts)}", hint, lines)

    def check(self, spec: TensorSpec, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor has this shape, and a type that weights may have."""
        if spec.shape != shape:
            self.invalid.append(f"{short(name)}: shape {list(spec.shape)}, config.json implies {list(shape)}")
        elif spec.dtype not in WEIGHT_DTYPES:
            supported = ", ".join(WEIGHT_DTYPES)
            self.invalid.append(f"{short(name)}: type {spec.dtype} is not supported; supported: {supported}")
        else:
            return True
        return False


def plan_folder(source: Path, architecture: Architecture, part: str | None = None, remarks: Sequence[str] = ()) -> Plan:
    """`plan_import` of all the weights in a folder."""
    return plan_import(read_folder(source), architecture, str(source), part, remarks)


def plan_import(
    specs: Mapping[str, TensorSpec],
    architecture: Architecture,
    where: str,
    part: str | None = None,
    remarks: Sequence[str] = (),
) -> Plan:
    """Plan our parameters from a Hugging Face folder's tensors.

    Args:
        specs: name on disk → where its bytes are, in any of the naming schemes of `hf_names`.
        architecture: what config.json says; with `part`, only that part of it counts.
        where: the folder, for messages.
        part: "vision" or "language" for a folder that holds CLIP or Llama alone, None for a whole LLaVA-NeXT.
        remarks: lines before the lists, when tensors do not fit.

    Raises:
        CheckpointError: a tensor is missing or unknown, or has another shape or type than config.json implies.
    """
    scheme, hub_names = detect_scheme(specs, where, keymap.is_hub_name, PART_SCHEMES[part] if part else SCHEMES)
    dropped = [(name, reason) for name in specs if (reason := scheme.drop_reason(name))]
    faults = _Faults(unknown=[n for n in specs if n not in hub_names and not scheme.drop_reason(n)])
    by_hub: dict[str, TensorSpec] = {}
    for name, hub in hub_names.items():
        if hub in by_hub:
            faults.invalid.append(f"two names for one tensor: {short(by_hub[hub].name)} and {short(name)}")
        by_hub[hub] = specs[name]

    prefix = PART_PREFIXES[part] if part else ""
    targets = [target for target in keymap.build_targets(architecture) if target.name.startswith(prefix)]
    carried = {hub: shape for hub, shape in keymap.carried_tensors(architecture).items() if hub.startswith(prefix)}
    tensors = [tensor for target in targets if (tensor := _plan_target(target, by_hub, faults))]
    kept = [hub for hub, shape in carried.items() if hub in by_hub and faults.check(by_hub[hub], hub, shape)]
    used = {source for target in targets for source in target.sources} | carried.keys()
    for hub, spec in by_hub.items():
        if hub in used:
            continue
        if hub == keymap.TIED_HEAD and architecture.text.tie_word_embeddings:
            dropped.append((spec.name, "config.json ties it to the embedding, so it is not used"))
        elif reason := keymap.drop_reason(hub):
            dropped.append((spec.name, reason))
        else:
            faults.unknown.append(spec.name)
    faults.raise_if_any(where, FIT_HINT, remarks)
    notes = []
    if absent := len(carried) - len(kept):
        notes.append(
            f"{absent} tensors that only transformers needs are not in the source, "
            "so this checkpoint cannot be converted back with --to hf"
        )
    return Plan(
        tensors=tuple(tensors),
        carried=tuple(copy_tensor(by_hub[hub], hub, by_hub[hub].name) for hub in kept),
        dropped=tuple(dropped),
        naming=scheme.name,
        notes=tuple(notes),
    )


def _plan_target(target: keymap.Target, by_hub: Mapping[str, TensorSpec], faults: _Faults) -> PlannedTensor | None:
    missing = [source for source in target.sources if source not in by_hub]
    faults.missing.extend(missing)
    sources = [by_hub[source] for source in target.sources if source in by_hub]
    fitting = [spec for spec in sources if faults.check(spec, spec.name, target.source_shape)]
    if missing or len(fitting) < len(sources):
        return None
    dtypes = sorted({spec.dtype for spec in sources})
    if len(dtypes) > 1:
        faults.invalid.append(f"{target.name}: its sources have different types ({', '.join(dtypes)})")
        return None
    origin = " + ".join(spec.name for spec in sources)
    return PlannedTensor(target.name, dtypes[0], target.shape, tuple(map(source_piece, sources)), origin)


def check_parameters(
    shapes: Mapping[str, tuple[int, ...]], architecture: Architecture, where: str, hint: str = FIT_HINT
) -> None:
    """Compare names and shapes of our parameters with what the architecture needs.

    Raises:
        CheckpointError: with the lists of missing and unknown weights, and of those with another shape.
    """
    compare_shapes(shapes, keymap.expected_parameters(architecture), where, hint)


def compare_shapes(
    shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str, hint: str
) -> None:
    """`check_parameters` against any mapping of wanted names and shapes."""
    faults = _Faults(
        missing=[name for name in wanted if name not in shapes],
        unknown=[name for name in shapes if name not in wanted],
        invalid=[
            f"{short(name)}: shape {short(list(shapes[name]))}, needed {short(list(shape))}"
            for name, shape in wanted.items()
            if name in shapes and tuple(shapes[name]) != tuple(shape)
        ],
    )
    faults.raise_if_any(where, hint)


def plan_export(
    parameters: Mapping[str, SlicedTensor], carried: Mapping[str, TensorSpec], architecture: Architecture, where: str
) -> Plan:
    """Plan a Hugging Face folder (hub names) from our parameters and the carried tensors.

    Raises:
        CheckpointError: a parameter or a carried tensor is missing or unknown, or has another shape.
    """
    check_parameters({name: tensor.shape for name, tensor in parameters.items()}, architecture, where)
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
        elif faults.check(carried[hub], hub, shape):
            planned[hub] = copy_tensor(carried[hub], hub, "carried")
    faults.raise_if_any(
        where, "transformers needs these too; convert from a complete Hugging Face folder to carry them along"
    )
    return Plan(tuple(planned[hub] for hub in keymap.hub_tensors(architecture)), naming=HUB.name)

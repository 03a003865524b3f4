"""Which plan fits which source: a Hugging Face folder, one of ours, parts, or the slices of several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llavanext_cli.config.architecture import TEXT_MODEL_TYPES, Architecture, load_architecture
from llavanext_cli.config.defaults import name_defaults
from llavanext_cli.config.hf_config import read_config
from llavanext_cli.config.sections import is_int
from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights import keymap
from llavanext_cli.weights.checkpoint import open_checkpoint
from llavanext_cli.weights.folder import MANIFEST, find_ranks
from llavanext_cli.weights.headers import read_object
from llavanext_cli.weights.plan import Plan, StoredRows, extent, plan_export, plan_folder
from llavanext_cli.weights.stream import Extent, PlannedTensor


def build_plan(
    sources: tuple[Path, ...], to: str, part: str | None, seed: int, like: Path | None = None
) -> tuple[Plan, Architecture, Path]:
    """Plan a conversion.

    Args:
        sources: one folder, or the vision and the language folder of a base model.
        to, part, seed, like: see `run_convert`.

    Returns:
        The plan, the model, and the folder whose companions are copied.

    Raises:
        CheckpointError: the source is not what the options say, or its tensors do not fit its config.json.
    """
    from llavanext_cli.weights import compose

    if len(sources) == 2:
        return *compose.plan_base(*sources, seed), sources[1]
    (source,) = sources
    if like is not None:
        return _plan_ranks(source, like, to)
    ours = (source / MANIFEST).is_file()
    if not ours:
        _hint_at_ranks(source)
    if to == "hf":
        if not ours and (source / "config.json").is_file():
            raise CheckpointError(
                f"{source}: is a Hugging Face folder already", "Leave out --to hf to convert it for train and ask."
            )
        checkpoint = open_checkpoint(source)
        stored = {name: StoredRows(spec) for name, spec in checkpoint.parameters.items()}
        plan = plan_export(stored, checkpoint.carried, checkpoint.architecture, str(source))
        return plan, checkpoint.architecture, source
    if ours:
        hint = "`llavanext convert --to hf` turns it back into a Hugging Face folder."
        if read_object(source / MANIFEST).get("part"):
            hint = "`llavanext convert --vision DIR --language DIR DST` makes a base model of two parts."
        raise CheckpointError(f"{source}: is converted already", hint)
    if part is not None:
        return *compose.plan_part(source, part), source
    config = read_config(source)
    if compose.is_original(config):
        return *compose.plan_original(source, config), source
    _hint_at_parts(source, config)
    architecture = load_architecture(source)
    remarks = name_defaults(config, architecture)
    return plan_folder(source, architecture, remarks=remarks), architecture, source


def _plan_ranks(source: Path, like: Path, to: str) -> tuple[Plan, Architecture, Path]:
    """Merge the slices of a distributed run; what is not trained comes from the checkpoint it began with."""
    from llavanext_cli.weights import merge

    ranks = find_ranks(source)
    if not ranks:
        raise CheckpointError(
            f"{source}: no rank_*/ folders with *.safetensors in it", "Name the folder that the ranks saved into."
        )
    base = open_checkpoint(like)
    expected = keymap.expected_parameters(base.architecture)
    merged, dropped, step = merge.read_distributed(source, ranks, expected)
    fact = f"slices of {len(ranks)} ranks, {step}"
    copies = tuple(
        (name, tuple(Extent(spec.path, spec.offset, spec.nbytes) for spec in same))
        for name, one in merged.items()
        for same in one.copies
    )
    if to == "hf":
        plan = plan_export(merged, base.carried, base.architecture, str(source))
        return replace(plan, dropped=tuple(dropped), facts=(fact,), copies=copies), base.architecture, like
    tensors = tuple(
        PlannedTensor(name, one.dtype, one.shape, one.rows(0, one.shape[0]), f"{len(one.parts)} slices")
        for name, one in merged.items()
    )
    carried = tuple(PlannedTensor(n, s.dtype, s.shape, (extent(s),), "carried") for n, s in base.carried.items())
    plan = Plan(tensors, carried, tuple(dropped), "ranks", facts=(fact,), copies=copies)
    return plan, base.architecture, like


def _hint_at_ranks(source: Path) -> None:
    if find_ranks(source):
        raise CheckpointError(
            f"{source}: holds the slices of several ranks",
            "Add --like CHECKPOINT, the checkpoint that the run began with.",
        )


def _hint_at_parts(source: Path, config: Mapping[str, Any]) -> None:
    kinds = {"clip": "vision", "clip_vision_model": "vision", **dict.fromkeys(TEXT_MODEL_TYPES, "language")}
    if part := kinds.get(str(config.get("model_type"))):
        raise CheckpointError(
            f"{source}: holds only a {part} model, no LLaVA-NeXT",
            f"Add --from-{part} to convert it alone, or use --vision DIR --language DIR to make a base model of two.",
        )


def check_vocabulary(folder: Path, rows: int) -> None:
    """Compare the tokenizer's greatest id with the rows of the embedding.

    Args:
        folder: holds the tokenizer's files; without any, there is nothing to compare.
        rows: that the source's own embedding has, before names are added to it.

    Raises:
        CheckpointError: an id has no row.
    """
    from llavanext_cli.processing.tokens import load_tokenizer

    ids = {"added_tokens.json": _greatest(read_object(folder / "added_tokens.json").values())}
    if (folder / "tokenizer.model").is_file():
        ids["tokenizer.model"] = load_tokenizer(folder).size - 1
    elif (folder / "tokenizer.json").is_file():
        ids["tokenizer.json"] = _greatest(_ids_of(read_object(folder / "tokenizer.json")))
    for name, greatest in ids.items():
        if greatest >= rows:
            raise CheckpointError(
                f"{folder}: the vocabulary has {rows} rows, and the tokenizer ({name}) uses id {greatest}",
                "Tokenizer and weights come from different models; fetch both from the same place.",
            )


def _ids_of(fast: Mapping[str, Any]) -> Iterator[Any]:
    """The ids in a tokenizer.json: of its vocabulary, name → id or a list in their order, and of added tokens."""
    model, added = fast.get("model"), fast.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.values()
    elif isinstance(vocabulary, list):
        yield len(vocabulary) - 1
    for token in added if isinstance(added, list) else ():
        yield token.get("id") if isinstance(token, dict) else None


def _greatest(ids: Iterable[Any]) -> int:
    return max((number for number in ids if is_int(number)), default=-1)

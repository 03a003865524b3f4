"""Which plan fits which source: a Hugging Face folder, one of ours, parts, or the slices of several ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.hf_config import name_defaults
from llavanext_cli.config.model_folder import load_architecture, read_config, read_optional
from llavanext_cli.config.validation import is_int
from llavanext_cli.errors import CheckpointError
from llavanext_cli.processing.tokenizer import load_tokenizer
from llavanext_cli.weights import compose, keymap, original
from llavanext_cli.weights.checkpoint import open_checkpoint
from llavanext_cli.weights.dtypes import copy_tensor
from llavanext_cli.weights.folder import MANIFEST
from llavanext_cli.weights.plan import Plan, plan_export, plan_folder
from llavanext_cli.weights.ranks import find_ranks, read_distributed
from llavanext_cli.weights.request import ConvertRequest
from llavanext_cli.weights.slices import SlicedTensor
from llavanext_cli.weights.tensors import PlannedTensor


def build_plan(request: ConvertRequest) -> tuple[Plan, Architecture, Path]:
    """Plan a conversion.

    Returns:
        The plan, the model, and the folder whose companions are copied.

    Raises:
        CheckpointError: the source is not what the request says, or its tensors do not fit its config.json.
    """
    if request.vision and request.language:
        return *compose.plan_base(request.vision, request.language, request.seed), request.language
    assert request.source is not None
    source = request.source
    if request.base_checkpoint is not None:
        return _plan_ranks(source, request.base_checkpoint, request.to)
    if find_ranks(source):
        raise CheckpointError(
            f"{source}: holds the slices of several ranks",
            "add --like CHECKPOINT, the checkpoint that the run began with",
        )
    ours = (source / MANIFEST).is_file()
    if request.to == "hf":
        if not ours and (source / "config.json").is_file():
            raise CheckpointError(
                f"{source}: already a Hugging Face folder", "leave out --to hf to convert it for train and ask"
            )
        checkpoint = open_checkpoint(source)
        stored = {name: SlicedTensor.of_one(spec) for name, spec in checkpoint.parameters.items()}
        plan = plan_export(stored, checkpoint.carried, checkpoint.architecture, str(source))
        return plan, checkpoint.architecture, source
    if ours:
        hint = "`llavanext convert --to hf` turns it back into a Hugging Face folder"
        if read_config(source, MANIFEST).get("part"):
            hint = "`llavanext convert --vision DIR --language DIR DST` builds a base model of two parts"
        raise CheckpointError(f"{source}: already converted", hint)
    if request.part is not None:
        return *compose.plan_part(source, request.part), source
    config = read_config(source)
    if original.is_original(config):
        return *original.plan_original(source, config), source
    kinds = {"clip": "vision", "clip_vision_model": "vision", "llama": "language", "mistral": "language"}
    if part := kinds.get(str(config.get("model_type"))):
        raise CheckpointError(
            f"{source}: holds only a {part} model, not a LLaVA-NeXT",
            f"add --from-{part} to convert it alone, or use --vision DIR --language DIR to build a base model of two",
        )
    architecture = load_architecture(source)
    return plan_folder(source, architecture, remarks=name_defaults(config, architecture)), architecture, source


def _plan_ranks(source: Path, base_checkpoint: Path, to: str) -> tuple[Plan, Architecture, Path]:
    """Merge the slices of a distributed run; what is not trained comes from the checkpoint it began with."""
    base = open_checkpoint(base_checkpoint)
    run = read_distributed(source, keymap.expected_parameters(base.architecture))
    if to == "hf":
        plan = plan_export(run.parameters, base.carried, base.architecture, str(source))
    else:
        tensors = tuple(
            PlannedTensor(name, one.dtype, one.shape, one.rows(0, one.shape[0]), f"{len(one.parts)} slices")
            for name, one in run.parameters.items()
        )
        carried = tuple(copy_tensor(spec, name, "carried") for name, spec in base.carried.items())
        plan = Plan(tensors, carried, naming="ranks")
    plan = replace(plan, dropped=run.dropped, facts=(run.step,))
    return plan, base.architecture, base_checkpoint


def check_vocabulary(folder: Path, rows: int) -> None:
    """Compare the tokenizer's greatest id with the rows of the embedding.

    Args:
        folder: holds the tokenizer's files; without any, there is nothing to compare.
        rows: that the source's own embedding has, before names are added to it.

    Raises:
        CheckpointError: an id has no row.
    """
    added = read_optional(folder, "added_tokens.json").values()
    ids = {"added_tokens.json": max((number for number in added if is_int(number)), default=-1)}
    if (folder / "tokenizer.model").is_file():
        ids["tokenizer.model"] = load_tokenizer(folder).size - 1
    for name, greatest in ids.items():
        if greatest >= rows:
            raise CheckpointError(
                f"{folder}: the vocabulary has {rows} rows, and the tokenizer ({name}) uses id {greatest}",
                "tokenizer and weights come from different models; fetch both from the same place",
            )

"""`llavanext convert`: a Hugging Face folder into our checkpoint folder, and back.

Plan from the headers, check everything that can be checked, then copy bytes (`stream`), then rename.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llavanext_cli.config.model_folder import read_config
from llavanext_cli.errors import CheckpointError
from llavanext_cli.files import claim
from llavanext_cli.weights import keymap
from llavanext_cli.weights.checkpoint import write_checkpoint
from llavanext_cli.weights.ckpt_format import read_ckpt_header
from llavanext_cli.weights.dtypes import SAFETENSORS_NAMES, cast_tensor, source_piece
from llavanext_cli.weights.folder import MANIFEST, check_folder, check_space, copy_companions, new_folder, write_json
from llavanext_cli.weights.plan import Plan
from llavanext_cli.weights.readers import read_safetensors_header
from llavanext_cli.weights.request import ConvertRequest
from llavanext_cli.weights.sources import build_plan, check_vocabulary
from llavanext_cli.weights.stream import Progress, Stream, digest_pieces, plan_shards, write_safetensors
from llavanext_cli.weights.untrusted import short

Entries = Mapping[str, Mapping[str, Any]]
"""Name of a tensor → its file and the SHA-256 of its bytes, among others."""


@dataclass(frozen=True)
class ConvertReport:
    """What `run_convert` did, or would do.

    Attributes:
        sources: the folders that were read.
        to: "mindspore" or "hf".
        naming: how the source names its tensors (see `hf_names`).
        tensors: how many were or would be written, the carried ones included.
        nbytes: their bytes.
        files: names of the files of weights.
        carried: folded names.
        dropped: one line for each reason.
        plan: with `dry_run`, one line for each tensor of the result: name, type, shape and source.
        notes: what the user should beware of.
        facts: what the user may want to know.
        verified: the result was read back and had the digests that were written.
        seconds: of the whole run.
    """

    sources: tuple[Path, ...]
    destination: Path
    to: str
    naming: str
    tensors: int
    nbytes: int
    files: tuple[str, ...]
    carried: tuple[str, ...]
    dropped: tuple[str, ...]
    plan: tuple[str, ...]
    notes: tuple[str, ...]
    facts: tuple[str, ...]
    dry_run: bool
    verified: bool
    seconds: float


def run_convert(request: ConvertRequest, progress: Progress | None = None) -> ConvertReport:
    """Convert a folder of weights.

    Args:
        progress: called with (bytes done, bytes in all); with `verify` every byte counts two or three times.

    Raises:
        LlavaNextError: nothing is left at the destination, and what was there before is still there.
    """
    started = time.monotonic()
    for path in request.inputs:
        if not path.is_dir():
            what = "is a file; name the folder that contains it" if path.exists() else "no such folder"
            raise CheckpointError(f"{path}: {what}", "`llavanext fetch --list` shows what can be fetched")
    check_folder(request.destination, request.inputs, force=request.force)
    with contextlib.nullcontext() if request.dry_run else claim(request.destination):
        plan, architecture, companions = build_plan(request)
        if request.part != "vision":
            grown = "added_tokens.json" in plan.files  # by <video> and <image>, behind the source's own rows
            check_vocabulary(companions, architecture.video_token_index if grown else architecture.text.vocab_size)
        clamped: dict[str, int] = {}
        if request.dtype != "keep":
            plan = _cast(plan, request.dtype, companions, clamped)
        check_space(request.destination, plan.nbytes)
        files = () if request.dry_run else _write(request, plan, companions, progress)
    notes = [
        f"{name}: {count} values were clamped to the type's largest finite value" for name, count in clamped.items()
    ]
    if not request.part and request.to == "mindspore" and not (companions / "tokenizer.model").is_file():
        notes.append(f"no tokenizer.model in {companions}: train and ask need one beside the weights")
    return ConvertReport(
        sources=request.sources,
        destination=request.destination,
        to=request.to,
        naming=plan.naming,
        tensors=len(plan.tensors) + len(plan.carried),
        nbytes=plan.nbytes,
        files=files,
        carried=tuple(keymap.fold_names(tensor.name for tensor in plan.carried)),
        dropped=tuple(_fold_dropped(plan.dropped)),
        plan=tuple(f"{t.name}  {t.dtype}{list(t.shape)}  <- {t.origin}" for t in plan.tensors if request.dry_run),
        notes=(*plan.notes, *notes),
        facts=plan.facts,
        dry_run=request.dry_run,
        verified=request.verify and not request.dry_run,
        seconds=time.monotonic() - started,
    )


def _cast(plan: Plan, dtype: str, companions: Path, clamped: dict[str, int]) -> Plan:
    config = plan.files.get("config.json") or read_config(companions)
    return replace(
        plan,
        tensors=tuple(cast_tensor(tensor, SAFETENSORS_NAMES[dtype], clamped) for tensor in plan.tensors),
        carried=tuple(cast_tensor(tensor, SAFETENSORS_NAMES[dtype], clamped) for tensor in plan.carried),
        files={**plan.files, "config.json": _with_dtype(config, dtype)},
    )


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json that names the new type; transformers has two spellings of the key."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("text_config", "vision_config") and isinstance(value, dict):
            value = _with_dtype(value, dtype)
        changed[key] = dtype if key in ("torch_dtype", "dtype") else value
    return changed


def _write(request: ConvertRequest, plan: Plan, companions: Path, progress: Progress | None) -> tuple[str, ...]:
    """Write the folder, with `verify` after a look at what is read; returns the names of the files of weights."""
    stored: Entries = {}
    if request.verify and request.to == "hf" and request.base_checkpoint is None:
        manifest = read_config(request.sources[0], MANIFEST)
        stored = manifest["tensors"] | manifest["carried"]
    passes = bool(stored) + 1 + request.verify
    with Stream(passes * plan.nbytes, progress) as stream:
        _verify(request.sources[0], stored, stream, "its manifest", "convert or train it again")
        with new_folder(request.destination) as partial:
            copy_companions(companions, partial)
            for file, content in plan.files.items():
                write_json(partial / file, content)
            written = (_write_hf if request.to == "hf" else _write_checkpoint)(partial, plan, request, stream)
            if request.verify:
                _verify(partial, written, stream, "what was written", "check the disk; the result was removed")
    return tuple(sorted({entry["file"] for entry in written.values()}))


def _write_checkpoint(folder: Path, plan: Plan, request: ConvertRequest, stream: Stream) -> Entries:
    source = {
        "kind": "hf" if request.base_checkpoint is None else "ranks",
        "name": [path.resolve().name for path in request.sources],
        "naming": plan.naming,
    }
    return write_checkpoint(
        folder,
        plan.tensors,
        plan.carried,
        source,
        stream,
        dropped=plan.dropped,
        part=request.part,
        ckpt=request.weight_format == "ckpt",
        shard_bytes=request.shard_bytes,
    )


def _write_hf(folder: Path, plan: Plan, request: ConvertRequest, stream: Stream) -> Entries:
    shards = plan_shards(plan.tensors, request.shard_bytes)
    written: dict[str, dict[str, Any]] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests = write_safetensors(folder / file, shard, stream, "pt")
        written |= {name: {"file": file, "sha256": digest} for name, digest in digests.items()}
    if len(shards) > 1:
        weight_map = {name: written[name]["file"] for name in sorted(written)}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return written


def _verify(folder: Path, entries: Entries, stream: Stream, than: str, hint: str) -> None:
    """Read the files of a folder and compare each tensor's digest with its entry."""
    for file in sorted({entry["file"] for entry in entries.values()}):
        path = folder / file
        if path.suffix == ".ckpt":
            pieces: Mapping[str, Any] = read_ckpt_header(path)
        else:
            pieces = {name: (source_piece(spec),) for name, spec in read_safetensors_header(path).items()}
        for name in (name for name, entry in entries.items() if entry["file"] == file):
            if name not in pieces or digest_pieces(pieces[name], stream) != entries[name].get("sha256"):
                raise CheckpointError(f"{short(file)}: {short(name)} differs from {than}", hint)


def _fold_dropped(dropped: tuple[tuple[str, str], ...]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in dropped:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        yield f"{f'{len(names)} tensors such as ' if len(names) > 1 else ''}{short(names[0])}: {reason}"

"""`llavanext convert`: a Hugging Face folder into our checkpoint folder, and back.

Plan from the headers, check everything that can be checked, then copy bytes (`stream`), then rename.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llavanext_cli.config.hf_config import read_config
from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights import keymap
from llavanext_cli.weights.checkpoint import SHARD_BYTES, write_checkpoint
from llavanext_cli.weights.folder import (
    MANIFEST,
    check_destination,
    check_space,
    copy_companions,
    find_leftovers,
    measure_companions,
    new_folder,
    write_json,
)
from llavanext_cli.weights.headers import read_object, read_safetensors_header, short
from llavanext_cli.weights.plan import PARTS, Plan, extent
from llavanext_cli.weights.sources import build_plan, check_vocabulary
from llavanext_cli.weights.stream import Extent, Made, Progress, Stream, digest_pieces, plan_shards, write_safetensors

DIRECTIONS = ("mindspore", "hf")
FORMATS = ("safetensors", "ckpt")
DTYPES = ("keep", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ConvertReport:
    """What `run_convert` did, or would do.

    Attributes:
        sources: the folders that were read.
        to: "mindspore" or "hf".
        layout: how the source names its tensors (see `hf_names`).
        tensors: how many were or would be written, the carried ones included.
        nbytes: their bytes.
        files: names of the files of weights.
        carried: folded names.
        dropped: one line for each reason.
        plan: with `dry_run`, one line for each tensor of the result: name, type, shape, what it is made of.
        notes: what the user should beware of.
        facts: what the user may want to know.
        verified: the result was read back and had the digests that were written.
        seconds: of the whole run.
    """

    sources: tuple[Path, ...]
    destination: Path
    to: str
    layout: str
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


def run_convert(
    source: str | Path | None,
    destination: str | Path,
    to: str = "mindspore",
    part: str | None = None,
    vision: str | Path | None = None,
    language: str | Path | None = None,
    like: str | Path | None = None,
    seed: int = 0,
    weight_format: str = "safetensors",
    dtype: str = "keep",
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Convert a folder of weights.

    Args:
        source: a Hugging Face folder, or with `to="hf"` one of ours; None with `vision` and `language`.
        destination: the folder to make.
        to: one of `DIRECTIONS`.
        part: "vision" or "language" when the source is CLIP or Llama alone.
        vision, language: both parts of a base model to put together.
        like: when the source holds the slices of several ranks, the checkpoint that their run began with.
        seed: of the weights that such a base model begins with.
        weight_format: "safetensors", or "ckpt" for MindSpore's own (one file).
        dtype: one of `DTYPES`.
        shard_bytes: greatest size of one file of safetensors.
        force: replace a checkpoint that is at the destination.
        dry_run: plan and check, write nothing.
        verify: read the result back and compare digests; one of our checkpoints is compared with its manifest first.
        progress: called with (bytes done, bytes in all); with `verify` every byte counts twice or three times.

    Raises:
        CheckpointError: nothing is left at the destination, and what was there before is still there.
    """
    started = time.monotonic()
    for name, value, known in (
        ("to", to, DIRECTIONS),
        ("part", part, (None, *PARTS)),
        ("weight_format", weight_format, FORMATS),
        ("dtype", dtype, DTYPES),
    ):
        if value not in known:
            raise ValueError(f"{name} is one of {known}, not {value!r}")
    destination = Path(destination)
    sources = tuple(Path(path) for path in (source, vision, language) if path is not None)
    base = (Path(like),) if like is not None else ()
    for path in (*sources, *base):
        if not path.is_dir():
            what = "is a file; name the folder it is in" if path.exists() else "no such folder"
            raise CheckpointError(f"{path}: {what}", "`llavanext fetch --list` shows what can be fetched.")
    check_destination(destination, (*sources, *base), force)
    plan, architecture, companions = build_plan(sources, to, part, seed, *base)
    if part != "vision":
        grown = "added_tokens.json" in plan.files  # by <video> and <image>, which stand behind the source's own rows
        check_vocabulary(companions, architecture.video_token_index if grown else architecture.text.vocab_size)
    tally: dict[str, int] = {}
    if dtype != "keep":
        plan = _cast(plan, dtype, companions, tally)
    check_space(destination, plan.nbytes + measure_companions(companions))
    files: tuple[str, ...] = ()
    stored = _digests(sources[0]) if verify and to == "hf" and like is None else {}
    copied = sum(piece.nbytes for _, pieces in plan.copies for piece in pieces) if verify else 0
    # Reading copies, or what is there; writing; reading back.
    sizes = [size for size in (copied, plan.nbytes if stored else 0) if size] + [plan.nbytes] * (1 + verify)
    passes = _passes(progress, sizes)
    if not dry_run:
        if copied:
            _compare_copies(plan.copies, copied, next(passes))
        if stored:
            _verify(sources[0], stored, plan.nbytes, next(passes), "its manifest", "Convert or train it again.")
        with new_folder(destination, replace=force) as temporary:
            copy_companions(companions, temporary)
            for name, content in plan.files.items():
                write_json(temporary / name, content)
            if to == "hf":
                written = _write_hf(temporary, plan, shard_bytes, next(passes))
            else:
                origin = {
                    "kind": "hf" if like is None else "ranks",
                    "name": [p.resolve().name for p in sources],
                    "layout": plan.layout,
                }
                manifest = write_checkpoint(
                    temporary,
                    plan.tensors,
                    plan.carried,
                    origin,
                    dropped=plan.dropped,
                    part=part,
                    weight_format=weight_format,
                    shard_bytes=shard_bytes,
                    progress=next(passes),
                )
                written = manifest["tensors"] | manifest["carried"]
            if verify:
                hint = "Check the disk; the result was removed."
                _verify(temporary, written, plan.nbytes, next(passes), "what was written", hint)
            files = tuple(sorted({entry["file"] for entry in written.values()}))
    return ConvertReport(
        sources=sources,
        destination=destination,
        to=to,
        layout=plan.layout,
        tensors=len(plan.tensors) + len(plan.carried),
        nbytes=plan.nbytes,
        files=files,
        carried=tuple(keymap.fold_names(tensor.name for tensor in plan.carried)),
        dropped=_fold_dropped(plan.dropped),
        plan=tuple(f"{t.name}  {t.dtype}{list(t.shape)}  <- {t.origin}" for t in plan.tensors) if dry_run else (),
        facts=plan.facts,
        notes=(*plan.notes, *_notes(destination, tally, None if part or to == "hf" else companions)),
        dry_run=dry_run,
        verified=verify and not dry_run,
        seconds=time.monotonic() - started,
    )


def _cast(plan: Plan, dtype: str, folder: Path, tally: dict[str, int]) -> Plan:
    from llavanext_cli.weights.dtypes import SAFETENSORS_NAMES, cast_tensor

    config = plan.files.get("config.json") or read_config(folder)
    return replace(
        plan,
        tensors=tuple(cast_tensor(tensor, SAFETENSORS_NAMES[dtype], tally) for tensor in plan.tensors),
        carried=tuple(cast_tensor(tensor, SAFETENSORS_NAMES[dtype], tally) for tensor in plan.carried),
        files={**plan.files, "config.json": _with_dtype(config, dtype)},
    )


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json whose notes on its own type are true again; transformers has two spellings of them."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("text_config", "vision_config") and isinstance(value, dict):
            value = _with_dtype(value, dtype)
        changed[key] = dtype if key in ("torch_dtype", "dtype") else value
    return changed


def _write_hf(folder: Path, plan: Plan, shard_bytes: int, progress: Progress | None) -> dict[str, dict[str, Any]]:
    shards = plan_shards(plan.tensors, shard_bytes)
    single = len(shards) == 1
    written: dict[str, dict[str, Any]] = {}
    with Stream(plan.nbytes, progress) as stream:
        for number, shard in enumerate(shards, start=1):
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            digests = write_safetensors(folder / file, shard, stream, {"format": "pt"})
            written |= {name: {"file": file, "sha256": digest} for name, digest in digests.items()}
    if not single:
        index = {
            "metadata": {"total_size": plan.nbytes},
            "weight_map": {name: written[name]["file"] for name in sorted(written)},
        }
        write_json(folder / "model.safetensors.index.json", index)
    return written


def _passes(progress: Progress | None, sizes: list[int]) -> Iterator[Progress | None]:
    """The progress of each of several passes over bytes, as a share of all of them."""
    for number in range(len(sizes)):
        before = sum(sizes[:number])
        yield None if progress is None else _shifted(progress, before, sum(sizes))


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


def _compare_copies(copies: tuple[tuple[str, tuple[Extent, ...]], ...], nbytes: int, progress: Progress | None) -> None:
    """Compare the slices that several ranks saved of the same part of a tensor."""
    with Stream(nbytes, progress) as stream:
        for name, pieces in copies:
            first, *others = ((piece, digest_pieces((piece,), stream)) for piece in pieces)
            for piece, digest in others:
                if digest != first[1]:
                    raise CheckpointError(
                        f"{name}: {piece.path} and {first[0].path} hold different values for the same part",
                        "The ranks went apart: train again, or name a run whose ranks agree.",
                    )


def _digests(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """What the manifest of one of our checkpoints says about each tensor: file and digest."""
    manifest = read_object(checkpoint / MANIFEST)
    return {**manifest["tensors"], **manifest["carried"]}


def _verify(
    folder: Path, written: dict[str, dict[str, Any]], nbytes: int, progress: Progress | None, than: str, hint: str
) -> None:
    """Read the files of a folder and compare each tensor's digest with the one taken while it was written."""
    from llavanext_cli.weights.ckpt_format import read_ckpt_header

    with Stream(nbytes, progress) as stream:
        for file in sorted({entry["file"] for entry in written.values()}):
            path = folder / file
            pieces: Mapping[str, tuple[Extent | Made, ...]]
            if path.suffix == ".ckpt":
                pieces = read_ckpt_header(path)
            else:
                pieces = {name: (extent(spec),) for name, spec in read_safetensors_header(path).items()}
            for name in (name for name, entry in written.items() if entry["file"] == file):
                if name not in pieces or digest_pieces(pieces[name], stream) != written[name].get("sha256"):
                    raise CheckpointError(f"{short(file)}: {short(name)} differs from {than}", hint)


def _fold_dropped(dropped: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    reasons: dict[str, list[str]] = {}
    for name, reason in dropped:
        reasons.setdefault(reason, []).append(name)
    return tuple(
        f"{f'{len(names)} tensors such as ' if len(names) > 1 else ''}{short(names[0])}: {reason}"
        for reason, names in reasons.items()
    )


def _notes(destination: Path, tally: Mapping[str, int], companions: Path | None) -> Iterator[str]:
    """What the user should know beyond the plan; `companions` is where a tokenizer should have been, if anywhere."""
    for name, count in tally.items():
        yield f"{name}: {count} values were clamped to the new type's largest finite value"
    if companions is not None and not (companions / "tokenizer.model").is_file():
        yield f"no tokenizer.model in {companions}: train and ask need one beside the weights"
    for path in find_leftovers(destination):
        if path.name.endswith(f".old-{os.getpid()}"):
            yield f"what was replaced could not be removed whole; remove the rest yourself: {path}"
        else:
            yield f"left by an interrupted run, can be removed unless another machine writes there: {path}"

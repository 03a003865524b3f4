"""`llavanext convert`: a Hugging Face folder into our checkpoint folder, and back.

Plan from the headers, check everything that can be checked, then copy bytes (`stream`), then rename.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavanext_cli.config.architecture import load_architecture
from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights import keymap
from llavanext_cli.weights.checkpoint import SHARD_BYTES, open_checkpoint, write_checkpoint
from llavanext_cli.weights.folder import (
    MANIFEST,
    check_destination,
    check_space,
    copy_companions,
    find_leftovers,
    new_folder,
    write_json,
)
from llavanext_cli.weights.headers import read_folder
from llavanext_cli.weights.plan import Plan, plan_export, plan_import
from llavanext_cli.weights.stream import Progress, Stream, plan_shards, write_safetensors

DIRECTIONS = ("mindspore", "hf")


@dataclass(frozen=True)
class ConvertReport:
    """What `run_convert` did, or would do.

    Attributes:
        to: "mindspore" or "hf".
        layout: how the source names its tensors (see `keymap.LAYOUTS`).
        tensors: how many were or would be written, the carried ones included.
        nbytes: their bytes.
        files: names of the files of weights.
        carried, dropped: folded names; the dropped with their reasons.
        plan: with `dry_run`, one line for each tensor of the result: name, type, shape.
        notes: what the user should know.
        verified: the result was read back and had the digests that were written.
        seconds: of the whole run.
    """

    source: Path
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
    dry_run: bool
    verified: bool
    seconds: float


def run_convert(
    source: str | Path,
    destination: str | Path,
    to: str = "mindspore",
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Convert a folder of weights.

    Args:
        source: a Hugging Face folder, or with `to="hf"` one of ours.
        destination: the folder to make.
        to: "mindspore" or "hf".
        shard_bytes: greatest size of one file of weights.
        force: replace a checkpoint that is at the destination.
        dry_run: plan and check, write nothing.
        verify: read the result back and compare digests.
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: nothing is left at the destination, and what was there before is still there.
    """
    started = time.monotonic()
    source, destination = Path(source), Path(destination)
    if not source.is_dir():
        what = "is a file; name the folder it is in" if source.exists() else "no such folder"
        raise CheckpointError(f"{source}: {what}", "`llavanext fetch llava-next-video-7b --to DIR` gets one.")
    check_destination(destination, (source,), force)
    ours = to == "mindspore"
    plan = _plan_import(source) if ours else _plan_export(source)
    check_space(destination, plan.nbytes)
    files: tuple[str, ...] = ()
    if not dry_run:
        with new_folder(destination) as temporary:
            copy_companions(source, temporary)
            written = _write_ours(temporary, plan, source, shard_bytes, progress) if ours else _write_hf(
                temporary, plan, shard_bytes, progress)  # fmt: skip
            if verify:
                _verify(temporary, written)
            files = tuple(sorted({entry["file"] for entry in written.values()}))
    leftovers = tuple(f"left by an interrupted run, can be removed: {path}" for path in find_leftovers(destination))
    return ConvertReport(
        source=source,
        destination=destination,
        to=to,
        layout=plan.layout,
        tensors=len(plan.tensors) + len(plan.carried),
        nbytes=plan.nbytes,
        files=files,
        carried=tuple(keymap.fold_names(tensor.name for tensor in plan.carried)),
        dropped=tuple(f"{name}: {reason}" for name, reason in plan.dropped),
        plan=tuple(f"{t.name}  {t.dtype}{list(t.shape)}" for t in plan.tensors) if dry_run else (),
        notes=(*plan.notes, *leftovers),
        dry_run=dry_run,
        verified=verify and not dry_run,
        seconds=time.monotonic() - started,
    )


def _plan_import(source: Path) -> Plan:
    if (source / MANIFEST).is_file():
        raise CheckpointError(
            f"{source}: is converted already", "`llavanext convert --to hf` turns it back into a Hugging Face folder."
        )
    return plan_import(read_folder(source), load_architecture(source), str(source))


def _plan_export(source: Path) -> Plan:
    if not (source / MANIFEST).is_file() and (source / "config.json").is_file():
        raise CheckpointError(
            f"{source}: is a Hugging Face folder already", "Leave out --to hf to convert it for train and ask."
        )
    checkpoint = open_checkpoint(source)
    return plan_export(checkpoint.parameters, checkpoint.carried, checkpoint.architecture, str(source))


def _write_ours(
    folder: Path, plan: Plan, source: Path, shard_bytes: int, progress: Progress | None
) -> dict[str, dict[str, Any]]:
    origin = {"kind": "hf", "name": source.resolve().name, "layout": plan.layout}
    manifest = write_checkpoint(
        folder, plan.tensors, plan.carried, origin, plan.dropped, shard_bytes=shard_bytes, progress=progress
    )
    return manifest["tensors"] | manifest["carried"]


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


def _verify(folder: Path, written: dict[str, dict[str, Any]]) -> None:
    """Read the files back and compare each tensor's digest with the one taken while it was written."""
    from llavanext_cli.weights.headers import read_safetensors_header
    from llavanext_cli.weights.plan import extent
    from llavanext_cli.weights.stream import digest_pieces

    with Stream(0) as stream:
        for file in sorted({entry["file"] for entry in written.values()}):
            for name, spec in read_safetensors_header(folder / file).items():
                if digest_pieces((extent(spec),), stream) != written[name]["sha256"]:
                    raise CheckpointError(
                        f"{file}: {name} differs from what was written", "Check the disk; the result was removed."
                    )

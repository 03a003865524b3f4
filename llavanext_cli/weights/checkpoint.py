"""Our checkpoint folder: opened by `train` and `ask`, written by `convert` and by the end of a training run.

model-00001-of-00003.safetensors …   the parameters, under our names
param_name_map.json                  name → file, as MindSpore's own loaders want it
carried/model.safetensors            what transformers needs and our model does not (hub names)
config.json, tokenizer.model, …      as they came from the source
llavanext_manifest.json              every tensor's file, type, shape and SHA-256; where it came from
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli import __version__
from llavanext_cli.config.architecture import Architecture, load_architecture
from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights import keymap
from llavanext_cli.weights.adapter import is_adapter
from llavanext_cli.weights.ckpt_format import write_ckpt
from llavanext_cli.weights.folder import (
    MANIFEST,
    NAME_MAP,
    check_destination,
    check_space,
    copy_companions,
    measure_companions,
    new_folder,
    write_json,
)
from llavanext_cli.weights.headers import (
    TensorSpec,
    are_counts,
    join_headers,
    read_json,
    read_safetensors_header,
    short,
)
from llavanext_cli.weights.plan import check_parameters, compare_shapes, extent
from llavanext_cli.weights.stream import PlannedTensor, Progress, Stream, plan_shards, write_safetensors

if TYPE_CHECKING:
    from mindspore import nn

    from llavanext_cli.records import AnyArray

FORMAT_VERSION = 1
CARRIED = "carried/model.safetensors"
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose headers were read and found complete.

    Attributes:
        folder: where it is.
        architecture: from its config.json.
        manifest: content of `llavanext_manifest.json`.
        parameters: our name → where its bytes lie.
        carried: hub name → where its bytes lie, for `--to hf`.
    """

    folder: Path
    architecture: Architecture
    manifest: dict[str, Any]
    parameters: dict[str, TensorSpec]
    carried: dict[str, TensorSpec]

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of all weights, in hexadecimal."""
        digests = {name: entry.get("sha256") for name, entry in self.manifest["tensors"].items()}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of weights, each once, in order."""
        return tuple(sorted({spec.path for spec in self.parameters.values()}))


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint folder: read its manifest, config.json and headers, and compare them with each other.

    Raises:
        CheckpointError: it is no checkpoint folder, it still has to be converted, or weights are missing, extra or
            mis-shaped.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, and a checkpoint is a folder" if folder.exists() else "no such folder"
        raise CheckpointError(f"{folder}: {what}", "Name a folder that `llavanext convert` or `llavanext train` made.")
    if not (folder / MANIFEST).is_file():
        raise _not_ours(folder)
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("llavanext_manifest") != FORMAT_VERSION:
        version = manifest.get("llavanext_manifest") if isinstance(manifest, dict) else None
        raise CheckpointError(
            f"{folder / MANIFEST}: version {short(version)}; this program reads version {FORMAT_VERSION}",
            "Convert the model again with this version of llavanext.",
        )
    if manifest.get("format") != "safetensors":
        raise CheckpointError(
            f"{folder}: holds weights as {short(manifest.get('format'))}, which MindSpore's own loaders read",
            "Convert the model with --format safetensors for train, ask and --to hf.",
        )
    if manifest.get("part"):
        raise CheckpointError(
            f"{folder}: holds the {short(manifest['part'])} model alone",
            "`llavanext convert --vision DIR --language DIR DST` makes a base model of two parts.",
        )
    architecture = load_architecture(folder)
    parameters = read_listed(folder, manifest, "tensors")
    check_parameters({n: s.shape for n, s in parameters.items()}, architecture, str(folder))
    return Checkpoint(folder, architecture, manifest, parameters, read_listed(folder, manifest, "carried"))


def _not_ours(folder: Path) -> CheckpointError:
    if (folder / "config.json").is_file():
        return CheckpointError(
            f"{folder}: a Hugging Face folder, not yet converted", f"llavanext convert {folder} {folder.name}-ms"
        )
    hint = "Name a folder that `llavanext convert` or `llavanext train` made."
    if (folder / "model" / MANIFEST).is_file():
        hint = f"The trained model is in {folder / 'model'}."
    return CheckpointError(f"{folder}: no checkpoint folder (no {MANIFEST})", hint)


def read_listed(folder: Path, manifest: dict[str, Any], section: str) -> dict[str, TensorSpec]:
    """The headers of the files that the manifest lists, compared with the manifest's own entries."""
    entries = manifest.get(section)
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise CheckpointError(f"{folder / MANIFEST}: no object {section!r}", "Convert the model again.")
    if wrong := [name for name, entry in entries.items() if not are_counts(entry.get("shape"))]:
        raise CheckpointError(f"{folder / MANIFEST}: {short(wrong[0])} has no shape", "Convert the model again.")
    files = sorted({str(entry.get("file")) for entry in entries.values()})
    for file in files:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(
                f"{folder / MANIFEST}: {short(file)} is outside the folder", "Convert the model again."
            )
        if not os.path.isfile(folder / file):  # Path.is_file would raise at a name that is too long
            raise CheckpointError(
                f"{folder}: {short(file)} is missing", "Copy the folder again, or convert the model again."
            )
    specs = join_headers(read_safetensors_header(folder / file) for file in files)
    compare_shapes(
        {name: spec.shape for name, spec in specs.items()},
        {name: tuple(entry["shape"]) for name, entry in entries.items()},
        str(folder / MANIFEST),
        "The folder was changed after it was made; copy it again, or convert the model again.",
    )
    return specs


# ------------------------------------------------------------------------------------------------------------- loading


def read_array(spec: TensorSpec, dtype: str = "float32") -> AnyArray:
    """Read one tensor.

    Args:
        dtype: "float32", "float16", or "bfloat16" (needs MindSpore, whose NumPy type it is). Widening is exact.

    Returns:
        An array of `spec.shape` that owns its memory.
    """
    from llavanext_cli.weights.dtypes import from_bytes

    with open(spec.path, "rb") as file:
        file.seek(spec.offset)
        data = bytearray(spec.nbytes)
        if file.readinto(data) != spec.nbytes:
            raise CheckpointError(
                f"{spec.path}: ended while {spec.name} was read; it changed since it was opened",
                "Let nothing write to the source, and run the same command again.",
            )
    return from_bytes(data, spec.dtype, dtype).reshape(spec.shape)


def load_into(
    network: nn.Cell,
    checkpoint: Checkpoint | str | Path,
    only: Collection[str] | None = None,
) -> None:
    """Fill a network's parameters, one at a time, each cast to the type that the network gave it.

    The KV cache and LoRA's matrices are left alone.

    Args:
        only: names of those that are filled; None for all.

    Raises:
        CheckpointError: before anything is changed, with the lists of missing, extra and mis-shaped weights.
    """
    import mindspore as ms

    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    wanted = {
        name: p for name, p in network.parameters_dict().items() if not (keymap.is_cache(name) or is_adapter(name))
    }
    compare_shapes(
        {name: spec.shape for name, spec in checkpoint.parameters.items()},
        {name: tuple(parameter.shape) for name, parameter in wanted.items()},
        f"{checkpoint.folder} and the network built for it",
        "The checkpoint was made for another model.",
    )
    for name, spec in checkpoint.parameters.items():
        if only is None or name in only:
            dtype = str(wanted[name].dtype).lower()
            wanted[name].set_data(ms.Tensor.from_numpy(read_array(spec, dtype)))


# ------------------------------------------------------------------------------------------------------------- writing


def save_checkpoint_folder(
    folder: str | Path,
    tensors: Mapping[str, PlannedTensor],
    like: Checkpoint,
    extra: dict[str, Any] | None = None,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write a complete checkpoint folder of planned tensors, such as those of a training run.

    Args:
        tensors: our name → the tensor's type, shape, and where its bytes come from.
        like: the checkpoint the run began with: its config.json, tokenizer and carried tensors are copied.
        extra: kept in the manifest under "extra" (steps, loss, preset …); must be JSON.
        also: writes further files into the folder, before it gets its name.

    Returns:
        The folder.

    Raises:
        CheckpointError: weights are missing, extra or mis-shaped, or the folder cannot be written. Nothing is left.
    """
    folder = Path(folder)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_parameters(shapes, like.architecture, str(folder), "This is a fault of the training run, not of its data.")
    check_destination(folder, (like.folder,), force=False)
    plan = [tensors[name] for name in keymap.expected_parameters(like.architecture)]
    carried = [PlannedTensor(n, s.dtype, s.shape, (extent(s),), "carried") for n, s in like.carried.items()]
    check_space(folder, sum(tensor.nbytes for tensor in (*plan, *carried)) + measure_companions(like.folder))
    with new_folder(folder) as temporary:
        source = {"kind": "training", "name": like.folder.resolve().name} | _lineage(like)
        write_checkpoint(temporary, plan, carried, source, extra=extra)
        copy_companions(like.folder, temporary)
        if also is not None:
            also(temporary)
    return folder


def _lineage(like: Checkpoint) -> dict[str, Any]:
    source = like.manifest.get("source")
    return {"from": source} if isinstance(source, dict) else {}


def write_checkpoint(
    folder: Path,
    tensors: list[PlannedTensor] | tuple[PlannedTensor, ...],
    carried: list[PlannedTensor] | tuple[PlannedTensor, ...],
    source: dict[str, Any],
    dropped: tuple[tuple[str, str], ...] = (),
    extra: dict[str, Any] | None = None,
    part: str | None = None,
    weight_format: str = "safetensors",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write weights, name map and manifest into an empty folder. Companions are the caller's.

    Args:
        part: "vision" or "language" when the tensors are that part alone.
        weight_format: "safetensors", or "ckpt": one file, which only MindSpore's own loaders read.

    Returns:
        The manifest.
    """
    ckpt = weight_format == "ckpt"
    shards = [list(tensors)] if ckpt else plan_shards(tensors, shard_bytes)
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}
    if ckpt:
        files = {"model.ckpt": shards[0]}
    sections: dict[str, dict[str, Any]] = {"tensors": {}, "carried": {}}
    with Stream(sum(t.nbytes for t in (*tensors, *carried)), progress) as stream:
        for file, shard in files.items():
            if ckpt:
                digests = write_ckpt(folder / file, shard, stream)
            else:
                digests = write_safetensors(folder / file, shard, stream, {"format": "ms"})
            sections["tensors"] |= _entries(file, shard, digests)
        if carried:
            (folder / CARRIED).parent.mkdir()
            digests = write_safetensors(folder / CARRIED, carried, stream, {"format": "pt"})
            sections["carried"] |= _entries(CARRIED, carried, digests)
    manifest = {
        "llavanext_manifest": FORMAT_VERSION,
        "made_by": f"llavanext {__version__}",
        "format": weight_format,
        **({"part": part} if part else {}),
        "source": source,
        **sections,
        "dropped": dict(dropped),
        "extra": extra or {},
    }
    if not ckpt:
        write_json(folder / NAME_MAP, {name: entry["file"] for name, entry in sections["tensors"].items()})
    write_json(folder / MANIFEST, manifest)
    return manifest


def _entries(
    file: str, tensors: list[PlannedTensor] | tuple[PlannedTensor, ...], digests: dict[str, str]
) -> dict[str, dict[str, Any]]:
    return {
        t.name: {"file": file, "dtype": t.dtype, "shape": list(t.shape), "sha256": digests[t.name], "from": t.origin}
        for t in tensors
    }

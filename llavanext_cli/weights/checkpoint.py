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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli import __version__
from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.model_folder import load_architecture, read_config
from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights import keymap
from llavanext_cli.weights.adapter import is_adapter
from llavanext_cli.weights.ckpt_format import write_ckpt
from llavanext_cli.weights.dtypes import copy_tensor, from_bytes
from llavanext_cli.weights.folder import (
    MANIFEST,
    NAME_MAP,
    check_folder,
    check_space,
    copy_companions,
    new_folder,
    write_json,
)
from llavanext_cli.weights.plan import check_parameters, compare_shapes
from llavanext_cli.weights.readers import join_headers, read_safetensors_header
from llavanext_cli.weights.stream import Stream, plan_shards, read_chunks, write_safetensors
from llavanext_cli.weights.tensors import FileRange, PlannedTensor, TensorSpec
from llavanext_cli.weights.untrusted import is_shape, short

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
        parameters: our name → where its bytes are.
        carried: hub name → where its bytes are, for `--to hf`.
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
        CheckpointError: it is not a checkpoint folder, it still has to be converted, or weights are missing, unknown or
            of another shape.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise _not_ours(folder)
    manifest = read_config(folder, MANIFEST)
    version = manifest.get("llavanext_manifest")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST}: version {short(version)}; this program reads version {FORMAT_VERSION}",
            "convert the model again with this version of llavanext",
        )
    if manifest.get("format") != "safetensors":
        raise CheckpointError(
            f"{folder}: holds weights as {short(manifest.get('format'))}, which only MindSpore's own loaders read",
            "convert the model with --format safetensors for train, ask and --to hf",
        )
    if manifest.get("part"):
        raise CheckpointError(
            f"{folder}: holds the {short(manifest['part'])} model alone",
            "`llavanext convert --vision DIR --language DIR DST` builds a base model of two parts",
        )
    architecture = load_architecture(folder)
    parameters = read_listed(folder, manifest, "tensors")
    check_parameters({name: spec.shape for name, spec in parameters.items()}, architecture, str(folder))
    return Checkpoint(folder, architecture, manifest, parameters, read_listed(folder, manifest, "carried"))


def _not_ours(folder: Path) -> CheckpointError:
    hint = "name a folder that `llavanext convert` or `llavanext train` wrote"
    if not folder.is_dir():
        return CheckpointError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}", hint)
    if (folder / "config.json").is_file():
        hint = f"llavanext convert {folder} {folder.name}-ms"
        return CheckpointError(f"{folder}: a Hugging Face folder that is not yet converted", hint)
    if (folder / "model" / MANIFEST).is_file():
        hint = f"the trained model is in {folder / 'model'}"
    return CheckpointError(f"{folder}: not a checkpoint folder ({MANIFEST} is missing)", hint)


def read_listed(folder: Path, manifest: dict[str, Any], section: str) -> dict[str, TensorSpec]:
    """The headers of the files that a section of the manifest lists, compared with the manifest's own entries."""
    again = "copy the folder again, or convert the model again"
    entries = manifest.get(section)
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise CheckpointError(f"{folder / MANIFEST}: no object {section!r}", again)
    if invalid := [name for name, entry in entries.items() if not is_shape(entry.get("shape"))]:
        raise CheckpointError(f"{folder / MANIFEST}: {short(invalid[0])} has no shape", again)
    files = sorted({str(entry.get("file")) for entry in entries.values()})
    for file in files:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{folder / MANIFEST}: {short(file)} is outside the folder", again)
        if not os.path.isfile(folder / file):  # Path.is_file would raise at a name that is too long
            raise CheckpointError(f"{folder}: {short(file)} is missing", again)
    specs = join_headers(read_safetensors_header(folder / file) for file in files)
    compare_shapes(
        {name: spec.shape for name, spec in specs.items()},
        {name: tuple(entry["shape"]) for name, entry in entries.items()},
        str(folder / MANIFEST),
        "the folder was changed after it was written; " + again,
    )
    return specs


# ------------------------------------------------------------------------------------------------------------- loading


def read_array(spec: TensorSpec, dtype: str = "float32") -> AnyArray:
    """Read one tensor.

    Args:
        dtype: "float32", "float16" or "bfloat16". Widening is exact.

    Returns:
        An array of `spec.shape` that owns its memory.
    """
    data = bytearray()
    for chunk in read_chunks(FileRange(spec.path, spec.offset, spec.nbytes)):
        data += chunk
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
        CheckpointError: before anything is changed, with the lists of missing and unknown weights, and of those with
            another shape.
    """
    import mindspore as ms

    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    wanted = {
        name: parameter
        for name, parameter in network.parameters_dict().items()
        if not (keymap.is_cache(name) or is_adapter(name))
    }
    compare_shapes(
        {name: spec.shape for name, spec in checkpoint.parameters.items()},
        {name: tuple(parameter.shape) for name, parameter in wanted.items()},
        f"{checkpoint.folder} and the network built for it",
        "name a checkpoint of the same model",
    )
    for name, spec in checkpoint.parameters.items():
        if only is None or name in only:
            dtype = str(wanted[name].dtype).lower()
            wanted[name].set_data(ms.Tensor.from_numpy(read_array(spec, dtype)))


# ------------------------------------------------------------------------------------------------------------- writing


def save_checkpoint_folder(
    folder: str | Path,
    tensors: Mapping[str, PlannedTensor],
    base: Checkpoint,
    extra: dict[str, Any] | None = None,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write a complete checkpoint folder of planned tensors, such as those of a training run.

    Args:
        tensors: our name → the tensor's type, shape, and source of its bytes.
        base: the checkpoint the run began with: its config.json, tokenizer and carried tensors are copied.
        extra: kept in the manifest under "extra" (steps, loss, preset …); must be JSON.
        also: writes further files into the folder, before it gets its name.

    Returns:
        The folder.

    Raises:
        CheckpointError: weights are missing, unknown or of another shape, or the folder cannot be written. Nothing is
            left.
    """
    folder = Path(folder)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_parameters(shapes, base.architecture, str(folder), "this is a fault of the training run, not of its data")
    check_folder(folder, (base.folder,), force=False)
    plan = [tensors[name] for name in keymap.expected_parameters(base.architecture)]
    carried = [copy_tensor(spec, name, "carried") for name, spec in base.carried.items()]
    nbytes = sum(tensor.nbytes for tensor in (*plan, *carried))
    check_space(folder, nbytes)
    source = {"kind": "training", "name": base.folder.resolve().name, "from": base.manifest.get("source", {})}
    with new_folder(folder) as partial, Stream(nbytes) as stream:
        write_checkpoint(partial, plan, carried, source, stream, extra=extra)
        copy_companions(base.folder, partial)
        if also is not None:
            also(partial)
    return folder


def write_checkpoint(
    folder: Path,
    tensors: Sequence[PlannedTensor],
    carried: Sequence[PlannedTensor],
    source: dict[str, Any],
    stream: Stream,
    *,
    dropped: tuple[tuple[str, str], ...] = (),
    extra: dict[str, Any] | None = None,
    part: str | None = None,
    ckpt: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, dict[str, Any]]:
    """Write weights, name map and manifest into an empty folder. Companions are the caller's.

    Args:
        source: kept in the manifest: what the weights come from.
        part: "vision" or "language" when the tensors are that part alone.
        ckpt: write one file in MindSpore's own format, which only its own loaders read.

    Returns:
        Name → the tensor's entry in the manifest.
    """
    shards = [tensors] if ckpt else plan_shards(tensors, shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weights: dict[str, dict[str, Any]] = {}
    for file, shard in zip(["model.ckpt"] if ckpt else names, shards, strict=True):
        write = write_ckpt if ckpt else write_safetensors
        weights |= _entries(file, shard, write(folder / file, shard, stream))
    beside: dict[str, dict[str, Any]] = {}
    if carried:
        (folder / CARRIED).parent.mkdir()
        beside = _entries(CARRIED, carried, write_safetensors(folder / CARRIED, carried, stream))
    if not ckpt:
        write_json(folder / NAME_MAP, {name: entry["file"] for name, entry in weights.items()})
    manifest = {
        "llavanext_manifest": FORMAT_VERSION,
        "made_by": f"llavanext {__version__}",
        "format": "ckpt" if ckpt else "safetensors",
        **({"part": part} if part else {}),
        "source": source,
        "tensors": weights,
        "carried": beside,
        "dropped": dict(dropped),
        "extra": extra or {},
    }
    write_json(folder / MANIFEST, manifest)
    return weights | beside


def _entries(file: str, tensors: Sequence[PlannedTensor], digests: dict[str, str]) -> dict[str, dict[str, Any]]:
    return {
        t.name: {"file": file, "dtype": t.dtype, "shape": list(t.shape), "sha256": digests[t.name], "from": t.origin}
        for t in tensors
    }

"""Which tensors a file or a folder of weights holds, and where their bytes are. Only headers are read.

safetensors' own reader checks each header: all lengths against the file, and that the tensors fill it without gaps.

Format: https://huggingface.co/docs/safetensors/index#format (8 bytes little-endian length, JSON, data).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from llavanext_cli.config.model_folder import REFETCH, read_config
from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.tensors import DTYPE_BYTES, LISTED, TensorSpec
from llavanext_cli.weights.torch_reader import read_torch_header
from llavanext_cli.weights.untrusted import cannot_read, open_regular, short


def read_safetensors_header(path: str | Path) -> dict[str, TensorSpec]:
    """Read and check the header of one safetensors file.

    Returns:
        Name → where its bytes are, ordered by offset.

    Raises:
        CheckpointError: the file is truncated or damaged, or holds a type that is not supported.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with open_regular(path) as file:
            with safe_open(path, "np"):
                pass
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
    except OSError as error:
        raise cannot_read(path, error) from error
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(f"{path}: damaged or truncated safetensors file ({reason})", REFETCH) from error
    entries.pop("__metadata__", None)
    specs = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPE_BYTES:
            raise CheckpointError(
                f"{path}: {short(name)}: type {short(entry['dtype'])} is not supported; "
                f"supported: {', '.join(DTYPE_BYTES)}",
                "use a model in float32, float16 or bfloat16; quantised weights cannot be converted",
            )
        begin, end = entry["data_offsets"]
        specs[name] = TensorSpec(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + begin, end - begin)
    return specs


def read_folder(folder: str | Path) -> dict[str, TensorSpec]:
    """Read the headers of all weights of a folder: safetensors if there are any, else torch's pickles.

    Raises:
        CheckpointError: there are none, a shard is missing or outside the folder, or index and shards disagree.
    """
    folder = Path(folder)
    for index_name, pattern, read in (
        ("model.safetensors.index.json", "*.safetensors", read_safetensors_header),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin", read_torch_header),
    ):
        if (folder / index_name).is_file():
            return _read_indexed(folder / index_name, read)
        if files := sorted(folder.glob(pattern)):
            return join_headers(read(path) for path in files)
    raise CheckpointError(
        f"{folder}: no weights (*.safetensors or pytorch_model*.bin)",
        "name a Hugging Face folder, such as one that `llavanext fetch` downloaded",
    )


def join_headers(headers: Iterable[dict[str, TensorSpec]]) -> dict[str, TensorSpec]:
    """One mapping out of several files'; a name may be in one of them only."""
    specs: dict[str, TensorSpec] = {}
    for header in headers:
        for name, spec in header.items():
            if name in specs:
                raise CheckpointError(
                    f"{short(name)} is in {specs[name].path.name} and in {spec.path.name}",
                    "a folder must hold one model; move the other files away",
                )
            specs[name] = spec
    return specs


def _read_indexed(index: Path, read: Callable[[Path], dict[str, TensorSpec]]) -> dict[str, TensorSpec]:
    """The shards that an index names, which must hold what the index says."""
    folder, weight_map = index.parent, _read_weight_map(index)
    files = sorted(set(weight_map.values()))
    single = index.name.removesuffix(".index.json")
    if single not in files and (folder / single).is_file():
        raise CheckpointError(
            f"{folder}: holds {single} and {index.name}; transformers would read the first, and the shards may differ",
            "move away the one that you do not want",
        )
    missing = [short(file) for file in files if not _is_file(folder / file)]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} shards named in {index.name} are missing",
            "fetch the folder again: what is already there is not downloaded twice",
            missing[:LISTED],
        )
    specs = join_headers(read(folder / file) for file in files)
    faults = [
        f"{short(name)}: not in {short(file)}"
        for name, file in weight_map.items()
        if name not in specs or specs[name].path.name != file
    ]
    faults += [
        f"{short(name)}: in {spec.path.name}, but not in the index"
        for name, spec in specs.items()
        if name not in weight_map
    ]
    if faults:
        raise CheckpointError(f"{index}: index and shards disagree on {len(faults)} tensors", REFETCH, faults[:LISTED])
    return specs


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _read_weight_map(index: Path) -> dict[str, str]:
    """Name → file, from an index. Files must be plain names inside the index's own folder."""
    weight_map = read_config(index.parent, index.name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map", REFETCH)
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file:
            raise CheckpointError(f"{index}: {short(name)} is in {short(file)}, which is outside the folder", REFETCH)
    return weight_map

"""MindSpore's `.ckpt` format, written and read as a stream.

A file is one protocol buffer, `Checkpoint{repeated Value value = 1}`, with `Value{tag = 1, tensor = 2}` and
`TensorProto{dims = 1, tensor_type = 2, tensor_content = 3}`: `load_checkpoint` joins the contents of neighbours with
the same tag. MindSpore cuts a tensor into values of 512 MB, and so do we. All lengths are known before the first byte.

Source: mindspore/train/serialization.py (`_write_parameter_bytes_data`), mindspore/train/checkpoint_pb2.py.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.protobuf import (
    LENGTH_DELIMITED,
    as_range,
    read_bytes,
    read_fields,
    write_delimited,
    write_varint,
)
from llavanext_cli.weights.stream import Stream, disk_error, write_to
from llavanext_cli.weights.tensors import FileRange, PlannedTensor

SLICE_BYTES = 512 << 20
TYPE_NAMES = {"F32": "Float32", "F16": "Float16", "BF16": "BFloat16"}


def write_ckpt(path: Path, tensors: Sequence[PlannedTensor], stream: Stream) -> dict[str, str]:
    """Write one `.ckpt` file.

    Returns:
        Name → SHA-256 of the tensor's bytes (not of the file's framing).

    Raises:
        CheckpointError: a source ends early or the disk is full.
    """
    digests = {}
    try:
        with open(path, "wb", buffering=0) as file:
            write_all = write_to(file.fileno())
            for tensor in tensors:
                digest = digests[tensor.name] = hashlib.sha256()
                framed = _Framer(tensor, write_all)
                for piece in tensor.pieces:
                    stream.copy(piece, framed, digest)
            stream.wait()
    except OSError as error:
        raise disk_error(path, error) from error
    return {name: digest.hexdigest() for name, digest in digests.items()}


class _Framer:
    """Passes a tensor's bytes on, with the head of a value before each slice."""

    def __init__(self, tensor: PlannedTensor, write: Callable[[memoryview], None]):
        self.tensor, self.write = tensor, write
        self.left, self.in_slice = tensor.nbytes, 0

    def __call__(self, data: memoryview) -> None:
        while data:
            if not self.in_slice:
                self.in_slice = min(self.left, SLICE_BYTES)
                self.write(memoryview(value_head(self.tensor, self.in_slice)))
            part = data[: self.in_slice]
            self.write(part)
            self.in_slice -= len(part)
            self.left -= len(part)
            data = data[len(part) :]


def value_head(tensor: PlannedTensor, content: int) -> bytes:
    """Everything of a value that comes before its `content` bytes."""
    inner = b"".join(write_varint(1 << 3) + write_varint(axis) for axis in tensor.shape)
    inner += (
        write_delimited(2, TYPE_NAMES[tensor.dtype].encode())
        + write_varint(3 << 3 | LENGTH_DELIMITED)
        + write_varint(content)
    )
    outer = write_delimited(1, tensor.name.encode())
    outer += write_varint(2 << 3 | LENGTH_DELIMITED) + write_varint(len(inner) + content) + inner
    return write_varint(1 << 3 | LENGTH_DELIMITED) + write_varint(len(outer) + content) + outer


def read_ckpt_header(path: Path) -> dict[str, tuple[FileRange, ...]]:
    """Find the contents of a `.ckpt` file without reading them: name → the slices of its bytes, in order.

    Raises:
        CheckpointError: the file is damaged.
    """
    found: dict[str, tuple[FileRange, ...]] = {}
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for _, value in read_fields(data):
                entry = dict(read_fields(data, value))
                name = read_bytes(data, entry[1]).decode()
                content = as_range(dict(read_fields(data, entry[2]))[3])
                found[name] = (*found.get(name, ()), FileRange(path, content.start, len(content)))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged .ckpt file ({error})", "convert the model again") from error
    return found

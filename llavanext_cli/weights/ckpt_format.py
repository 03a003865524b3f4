"""MindSpore's `.ckpt` format, written and read as a stream.

A file is one protocol buffer, `Checkpoint{repeated Value value = 1}`, with `Value{tag = 1, tensor = 2}` and
`TensorProto{dims = 1, tensor_type = 2, tensor_content = 3}`: `load_checkpoint` joins the contents of neighbours with
the same tag. MindSpore cuts a tensor into values of 512 MB, and so do we. All lengths are known before the first byte.

Source: mindspore/train/serialization.py (`_write_parameter_bytes_data`), mindspore/train/checkpoint_pb2.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.protobuf import LENGTH_DELIMITED, write_delimited, write_varint
from llavanext_cli.weights.stream import Extent, PlannedTensor, Stream, disk_error, write_to

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
            stream.settle()
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


def read_ckpt_header(path: Path) -> dict[str, tuple[Extent, ...]]:
    """Find the contents of a `.ckpt` file without reading them: name → the slices of its bytes, in order.

    Raises:
        CheckpointError: the file is damaged.
    """
    found: dict[str, tuple[Extent, ...]] = {}
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while file.tell() < size:
            end = _open_field(path, file, 1, size)
            tag = file.read(_open_field(path, file, 1, end) - file.tell()).decode("utf-8", "replace")
            tensor_end = _open_field(path, file, 2, end)
            while file.tell() < tensor_end:
                key = _read_varint(path, file)
                if key == 1 << 3:  # one number of dims
                    _read_varint(path, file)
                    continue
                begin_end = _length_end(path, file, tensor_end)
                if key >> 3 == 3:
                    found[tag] = (*found.get(tag, ()), Extent(path, file.tell(), begin_end - file.tell()))
                file.seek(begin_end)
    return found


def _open_field(path: Path, file: BinaryIO, field: int, limit: int) -> int:
    """Step into a length-delimited field; returns where it ends."""
    if _read_varint(path, file) != field << 3 | LENGTH_DELIMITED:
        raise CheckpointError(f"{path}: damaged .ckpt file", "Convert the model again.")
    return _length_end(path, file, limit)


def _length_end(path: Path, file: BinaryIO, limit: int) -> int:
    end = _read_varint(path, file) + file.tell()
    if end > limit:
        raise CheckpointError(f"{path}: damaged .ckpt file: it is cut short", "Convert the model again.")
    return end


def _read_varint(path: Path, file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise CheckpointError(f"{path}: damaged .ckpt file: it is cut short", "Convert the model again.")

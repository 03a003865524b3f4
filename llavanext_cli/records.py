"""The data contract: what `mix` writes, `processing` encodes, `training` batches and `model` consumes.

Shape legend, used in every docstring of the package:

    B  batch                     R  pixels a side of one tile       S  sequence length
    G  tiles of a sample's       P  patches a side of one tile      D  width of the language model
       images (base first)       Q  features of a tile              N  rows of the feature table (G*Q + F*Qv)
    F  frames of its videos      Qv features of a pooled frame      V  vocabulary

Q is P * P. Under the feature strategy "full" it is one more: a tile's class token is p = 0.

The feature table of a sample holds everything its media contribute, one row a feature, in this order:

    row      0 .. G*Q-1              patch p of tile t is row t*Q + p
    row    G*Q .. G*Q+F*Qv-1         pooled patch p of frame f is row G*Q + f*Qv + p
    row      N                       the learned newline that ends a row of patches
    row      N+1                     "text": this position keeps its token embedding
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec

from llavanext_cli.errors import DataError

if TYPE_CHECKING:  # the arrays' types, for annotations in all of the package
    import numpy as np
    from numpy.typing import NDArray

    AnyArray = NDArray[Any]
    UInt8Array = NDArray[np.uint8]
    Int32Array = NDArray[np.int32]
    Int64Array = NDArray[np.int64]
    Float32Array = NDArray[np.float32]
    Float64Array = NDArray[np.float64]

IGNORE_INDEX = -100
"""Label of a position that is not supervised."""

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
AS_MIX = "`llavanext mix` writes samples in the right form; `llavanext mix --help` shows how"
ROLES = ("user", "assistant")


class SampleSize(NamedTuple):
    """What a sample takes, or what a batch has room for: positions of the sequence (S), tiles of images (G), frames
    (F)."""

    tokens: int
    tiles: int
    frames: int


UNITS = ("tokens", "image tiles", "frames")
"""The fields of a `SampleSize` in words."""

_Positive = Annotated[int, msgspec.Meta(gt=0)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Medium(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One image or video. `path` is relative to the root of the sample's source, or absolute; `size` is (height,
    width) in pixels as displayed, when it is known."""

    kind: Literal["image", "video"]
    path: str
    size: tuple[_Positive, _Positive] | None = None


class Turn(msgspec.Struct, frozen=True, gc=False):
    """What one side said. User turns may hold `<image>` or `<video>` placeholders, one for each medium, in order."""

    role: str
    text: str


class Sample(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One conversation, with the media it talks about in the order of their placeholders. As JSON it is one line of a
    samples file; `msgspec.json.encode(sample)` writes it.

    Turns alternate, user first; a training sample ends with the assistant, a question ends with the user.
    `tokens`, `tiles` and `frames` are what `mix` counted, and what `size` returns.
    """

    id: str
    source: str
    media: tuple[Medium, ...]
    turns: tuple[Turn, ...]
    tokens: _Count | None = None
    tiles: _Count | None = None
    frames: _Count | None = None

    @property
    def size(self) -> SampleSize | None:
        """The recorded size, None where nobody has counted."""
        if self.tokens is None or self.tiles is None or self.frames is None:
            return None
        return SampleSize(self.tokens, self.tiles, self.frames)


INVALID_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for text that it cannot decode; a `msgspec.ValidationError` is one of them."""

_decoder = msgspec.json.Decoder(Sample)
_ALTERNATING = list(ROLES) * 2000


def decode_sample(line: bytes, where: str) -> Sample:
    """The sample on one line of a samples file; `where` ("file.jsonl, line 7") opens the message of an error.

    Raises:
        DataError: the line is not JSON or not a sample.
    """
    try:
        sample = _decoder.decode(line)
    except INVALID_JSON:
        return build_sample(decode_json(line, where), where)
    return _check_turns(sample, where)


def build_sample(data: Any, where: str) -> Sample:
    """A sample from parsed JSON. Errors as `decode_sample`."""
    if not isinstance(data, dict):
        raise DataError(f"{where}: a sample is an object with id, source, media and turns", AS_MIX)
    if "conversations" in data and "turns" not in data:
        raise DataError(
            f"{where}: this is a record of a raw data set, not a sample", "make samples first: llavanext mix --help"
        )
    data = {"id": "", "source": "", "media": (), "turns": ()} | data
    if isinstance(data["id"], int):
        data["id"] = str(data["id"])
    try:
        sample = msgspec.convert(data, Sample)
    except msgspec.ValidationError as error:
        raise DataError(f"{where}: {_describe(error)}", AS_MIX) from error
    return _check_turns(sample, where)


def decode_json(text: bytes | msgspec.Raw, where: str) -> Any:
    """Any JSON value; `where` opens the message of its `DataError`."""
    try:
        return msgspec.json.decode(text)
    except INVALID_JSON as error:
        raise DataError(f"{where}: not valid JSON: {error}", "if the file has changed, write it again") from error


def _check_turns(sample: Sample, where: str) -> Sample:
    roles = [turn.role for turn in sample.turns]
    if not roles:
        raise DataError(f"{where}: a sample needs a list of turns", AS_MIX)
    if roles != _ALTERNATING[: len(roles)]:  # one comparison in C: a file has hundreds of thousands of samples
        for number, (role, expected) in enumerate(zip(roles, cycle(ROLES), strict=False), 1):
            if role != expected:
                raise DataError(f"{where}: turn {number} must be the {expected}'s, not {role!r}", AS_MIX)
    return sample


def _describe(error: msgspec.ValidationError) -> str:
    """msgspec's message in plain words: "media[0].kind: invalid value 'sound'"."""
    what, _, place = str(error).replace("`", "").replace("enum value", "value").partition(" - at ")
    what = what[:1].lower() + what[1:]
    return f"{place.removeprefix('$.')}: {what}" if place else what


@dataclass(frozen=True)
class EncodedSample:
    """A sample as numbers, in its own true lengths (nothing padded). `processing` builds it, `collate` joins several.

    Attributes:
        id: the sample's id, for messages.
        input_ids: `int32[S]`; media positions hold the image or video token id.
        labels: `int32[S]`; the id itself where the position is supervised, else `IGNORE_INDEX`. Not shifted.
        tiles: `float32[G, 3, R, R]`, normalised pixels of all images, each image's base tile first; G may be 0.
        frames: `float32[F, 3, R, R]`, normalised pixels of all videos; F may be 0.
        feature_index: `int32[S]`, rows of this sample's own feature table (its own G and F; see the module docstring).
    """

    id: str
    input_ids: Int32Array
    labels: Int32Array
    tiles: Float32Array
    frames: Float32Array
    feature_index: Int32Array

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def size(self) -> SampleSize:
        return SampleSize(self.length, len(self.tiles), len(self.frames))


@dataclass(frozen=True)
class Batch:
    """Samples padded to one static shape: what the model takes, and the true lengths.

    Attributes:
        input_ids: `int32[B, S]`, padded with the pad id on the right.
        labels: `int32[B, S]`, shifted: `labels[b, s]` is the token to be predicted *at* position s, or `IGNORE_INDEX`.
        tiles: `float32[B, G + F, 3, R, R]`, tiles first, then frames; zeros where a sample has fewer.
        feature_index: `int32[B, S]`, rows of the feature table of the static G and F.
        lengths: `int32[B]`, true lengths.
    """

    input_ids: Int32Array
    labels: Int32Array
    tiles: Float32Array
    feature_index: Int32Array
    lengths: Int32Array

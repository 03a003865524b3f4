"""The data contract: what `mix` writes, `processing` encodes, `training` batches and `model` consumes.

Shape legend, used in every docstring of the package:

    B  batch                     R  pixels a side of one tile       S  sequence length
    G  tiles of a sample's       P  patches a side of one tile      D  width of the language model
       pictures (base first)     Q  features of a tile              N  rows of the feature table (G*Q + F*Qv)
    F  frames of its clips       Qv features of a pooled frame      V  vocabulary

Q is P * P. Under the feature strategy "full" it is one more: a tile's class token leads its patches, p counting it.

The feature table of a sample holds everything its media contribute, one row a feature, in this order:

    row      0 .. G*Q-1              patch p of tile t is row t*Q + p
    row    G*Q .. G*Q+F*Qv-1         pooled patch p of frame f is row G*Q + f*Qv + p
    row      N                       the learned newline that ends a row of patches
    row      N+1                     "text": this position keeps its token embedding
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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
AS_MIX = "`llavanext mix` writes samples in the right form; `llavanext mix --help` shows how."
MEDIA_KINDS = ("image", "video")
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Medium:
    """One picture or clip. `path` is relative to the root of the sample's source, or absolute; `size` is (height,
    width) in pixels as displayed, when it is known."""

    kind: str
    path: str
    size: tuple[int, int] | None = None

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Medium:
        if not isinstance(data, dict) or data.get("kind") not in MEDIA_KINDS or not isinstance(data.get("path"), str):
            raise DataError(f"{where}: a medium needs a kind ({' or '.join(MEDIA_KINDS)}) and a path", AS_MIX)
        size = data.get("size")
        if size is not None and not (
            isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
        ):
            raise DataError(f"{where}: size is [height, width] in pixels, not {size!r}", AS_MIX)
        return cls(data["kind"], data["path"], tuple(size) if size else None)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "path": self.path} | ({"size": list(self.size)} if self.size else {})


@dataclass(frozen=True)
class Turn:
    """What one side said. User turns may hold `<image>` or `<video>` placeholders, one for each medium, in order."""

    role: str
    text: str


@dataclass(frozen=True)
class Sample:
    """One conversation, with the media it talks about in the order of their placeholders.

    Turns alternate, user first; a training sample ends with the assistant, a question ends with the user.
    """

    id: str
    source: str
    media: tuple[Medium, ...]
    turns: tuple[Turn, ...]

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Sample:
        """Build from one parsed JSON line; `where` ("file.jsonl, line 7") opens the message of a `DataError`."""
        if not isinstance(data, dict):
            raise DataError(f"{where}: a sample is an object with id, source, media and turns", AS_MIX)
        turns = data.get("turns")
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{where}: a sample needs a list of turns", AS_MIX)
        for number, turn in enumerate(turns):
            if not isinstance(turn, dict) or not isinstance(turn.get("text"), str):
                raise DataError(f"{where}: turn {number + 1} needs a role and a text", AS_MIX)
            due = ROLES[number % 2]
            if turn.get("role") != due:
                raise DataError(f"{where}: turn {number + 1} must be the {due}'s, got {turn.get('role')!r}", AS_MIX)
        media = data.get("media", [])
        if not isinstance(media, list):
            raise DataError(f"{where}: media must be a list", AS_MIX)
        return cls(
            id=str(data.get("id", "")),
            source=str(data.get("source", "")),
            media=tuple(Medium.from_dict(m, where) for m in media),
            turns=tuple(Turn(t["role"], t["text"]) for t in turns),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "source": self.source,
            "media": [m.to_dict() for m in self.media],
            "turns": [{"role": t.role, "text": t.text} for t in self.turns],
        }


@dataclass(frozen=True)
class EncodedSample:
    """A sample as numbers, in its own true lengths (nothing padded). Made by `processing`, joined by `collate`.

    Attributes:
        id: the sample's id, for messages.
        input_ids: `int32[S]`; media positions hold the image or video token id.
        labels: `int32[S]`; the id itself where the position is supervised, else `IGNORE_INDEX`. Not shifted.
        tiles: `float32[G, 3, R, R]`, normalised pixels of all pictures, each picture's base tile first; G may be 0.
        frames: `float32[F, 3, R, R]`, normalised pixels of all clips; F may be 0.
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


class SampleSize(NamedTuple):
    """What a sample takes, or what a batch has room for: positions of the sequence (S), picture tiles (G), frames
    (F)."""

    tokens: int
    tiles: int
    frames: int


UNITS = ("tokens", "picture tiles", "frames")
"""The fields of a `SampleSize` in words."""


@dataclass(frozen=True)
class Batch:
    """Samples padded to one static shape: what the model takes, and the true lengths.

    Attributes:
        input_ids: `int32[B, S]`, padded with the pad id on the right.
        labels: `int32[B, S]`, shifted: `labels[b, s]` is the token to be predicted *at* position s, or `IGNORE_INDEX`.
        tiles: `float32[B, G + F, 3, R, R]`, picture tiles first, then frames; zeros where a sample has fewer.
        feature_index: `int32[B, S]`, rows of the feature table of the static G and F.
        lengths: `int32[B]`, true lengths.
    """

    input_ids: Int32Array
    labels: Int32Array
    tiles: Float32Array
    feature_index: Int32Array
    lengths: Int32Array

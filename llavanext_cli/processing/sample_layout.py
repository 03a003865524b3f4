"""Lays out a sample: ids, labels and feature rows, segment by segment. Pads samples to a batch.

After prompt (segments) and geometry (plans), before the model, which gathers the rows. An answer about one image of
480 x 640, with T tokens of text before it (Q = 576, five tiles, so N = 5 * Q = 2880 feature rows):

    position        0 ........ T-1   T ....... T+575   T+576 ....................... T+2339   T+2340 ........... S-1
    input_ids       bos A chat ...   <image> x 576     <image> x 1764 (36 rows of 48 + 1)     \\n What ... A cat </s>
    labels          ignored          ignored           ignored                                ignored ... A cat </s>
    feature_index   text             0 .. 575          see below                              text
                                     base tile         unpadded grid

    The grid's patch (r, c), r = 6..41 and c = 0..47, is in tile  t = 1 + (r // 24) * columns + c // 24
                                               as its patch  p = (r % 24) * 24 + c % 24
                                               so its row is t * Q + p

        row 6:    720 ... 743 | 1296 ... 1319 | newline      tile 1 and tile 2, their patch row 6
        ...
        row 24:  1728 ... 1751 | 2304 ... 2327 | newline      tile 3 and tile 4, their patch row 0
        ...
        newline = N = 2880    text = N + 1 = 2881

Several images: the tiles of the next image follow in the table (its base tile is t0, not 0). Videos: pooled patch p of
frame f is row G*Q + f*Qv + p, and the frames of a video follow each other with nothing between them.

Labels and ids come from the same call, so a label cannot be off by a token. The ids are those of transformers'
`LlavaNextVideoProcessor` on the whole prompt: an answer is encoded apart from the "ASSISTANT:" before it, and no
SentencePiece piece spans the space between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.errors import DataError
from llavanext_cli.processing.geometry import TilePlan, count_video_tokens
from llavanext_cli.processing.prompt import MEDIUM, TEXT, Segment
from llavanext_cli.processing.tokenizer import Tokenizer
from llavanext_cli.records import IGNORE_INDEX, UNITS, Batch, EncodedSample, SampleSize

if TYPE_CHECKING:
    from llavanext_cli.records import AnyArray, Int32Array, Int64Array

REPORT_BUG = "drop the sample, and please report this: it is a bug in llavanext"


@dataclass(frozen=True)
class VideoPlan:
    """What a video contributes: its sampled frames (its share of F)."""

    frames: int


MediumPlan = TilePlan | VideoPlan


@dataclass(frozen=True)
class SampleLayout:
    """`input_ids`, `labels` and `feature_index` of a sample, each `int32[S]`; see `EncodedSample`."""

    input_ids: Int32Array
    labels: Int32Array
    feature_index: Int32Array


def count_medium(plan: MediumPlan, arch: Architecture) -> int:
    """Positions that one image or video takes."""
    return plan.tokens if isinstance(plan, TilePlan) else count_video_tokens(plan.frames, arch)


def encode_segments(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of each segment: of a TEXT its tokens, of a MEDIUM none, of an END the eos id. bos joins the first."""
    pieces: list[list[int]] = []
    previous: Segment | None = None
    for segment in segments:
        if segment.kind == TEXT:
            if previous is not None and previous.kind == TEXT:
                ids = tokenizer.encode_more(segment.text)
            else:
                ids = tokenizer.encode(segment.text, first=previous is None)
        else:
            ids = [] if segment.kind == MEDIUM else [tokenizer.eos_id]
        if previous is None and tokenizer.add_bos:
            ids = [tokenizer.bos_id, *ids]
        pieces.append(ids)
        previous = segment
    return pieces


def measure(
    segments: Sequence[Segment], plans: Sequence[MediumPlan], tokenizer: Tokenizer, arch: Architecture
) -> SampleSize:
    """Size of the sample that `lay_out` would return."""
    text = sum(len(ids) for ids in encode_segments(segments, tokenizer))
    media = sum(count_medium(plans[segment.medium], arch) for segment in segments if segment.kind == MEDIUM)
    return SampleSize(text + media, *_count_rows(plans))


def _count_rows(plans: Sequence[MediumPlan]) -> tuple[int, int]:
    """Tiles (G) and frames (F) of all media."""
    tiles = sum(plan.tiles for plan in plans if isinstance(plan, TilePlan))
    frames = sum(plan.frames for plan in plans if isinstance(plan, VideoPlan))
    return tiles, frames


def lay_out(
    segments: Sequence[Segment], plans: Sequence[MediumPlan], tokenizer: Tokenizer, arch: Architecture, sample_id: str
) -> SampleLayout:
    """Lay out one sample.

    Args:
        segments: from prompt; its MEDIUM segments name entries of `plans`.
        plans: one for each medium, in the order in which tiles and frames are stacked.
        sample_id: for messages.

    Raises:
        DataError: media and MEDIUM segments do not match in number.
    """
    import numpy as np

    named = sorted(segment.medium for segment in segments if segment.kind == MEDIUM)
    if named != list(range(len(plans))):
        raise DataError(f"sample {sample_id}: {len(named)} media in the prompt, but {len(plans)} were read", REPORT_BUG)
    rows = index_media(plans, arch)  # one int32[tokens] a medium
    for number, (plan, medium_rows) in enumerate(zip(plans, rows, strict=True)):
        if len(medium_rows) != count_medium(plan, arch):
            raise DataError(
                f"sample {sample_id}: image or video {number + 1} has {count_medium(plan, arch)} tokens, "
                f"but {len(medium_rows)} features",
                REPORT_BUG,
            )

    text_row = _table_rows(plans, arch) + 1
    input_ids, labels, feature_index = [], [], []
    for segment, ids in zip(segments, encode_segments(segments, tokenizer), strict=True):
        if ids:
            input_ids.append(np.array(ids, np.int32))
            supervised = input_ids[-1] if segment.supervised else np.full(len(ids), IGNORE_INDEX, np.int32)
            labels.append(supervised)
            feature_index.append(np.full(len(ids), text_row, np.int32))
        if segment.kind == MEDIUM:
            medium_rows = rows[segment.medium]
            is_image = isinstance(plans[segment.medium], TilePlan)
            token = arch.image_token_index if is_image else arch.video_token_index
            input_ids.append(np.full(len(medium_rows), token, np.int32))
            labels.append(np.full(len(medium_rows), IGNORE_INDEX, np.int32))
            feature_index.append(medium_rows)
    return SampleLayout(np.concatenate(input_ids), np.concatenate(labels), np.concatenate(feature_index))


def index_media(plans: Sequence[MediumPlan], arch: Architecture) -> list[Int32Array]:
    """Feature rows of each medium, `int32[tokens]`, in the order of its tokens (drawn in the module's docstring)."""
    import numpy as np

    all_tiles, _ = _count_rows(plans)
    newline_row = _table_rows(plans, arch)
    rows, tile, frame = [], 0, 0
    for plan in plans:
        if isinstance(plan, TilePlan):
            base = np.arange(plan.base_tokens) + tile * arch.tile_features
            grid = _index_grid(plan, arch) + tile * arch.tile_features  # [patch_height, patch_width]
            newline = np.full((plan.patch_height, 1), newline_row)
            rows.append(np.concatenate([base, np.concatenate([grid, newline], axis=1).ravel()]).astype(np.int32))
            tile += plan.tiles
        else:
            start = all_tiles * arch.tile_features + frame * arch.frame_features
            rows.append(np.arange(start, start + plan.frames * arch.frame_features, dtype=np.int32))
            frame += plan.frames
    return rows


def _index_grid(plan: TilePlan, arch: Architecture) -> Int64Array:
    """Rows of the unpadded grid's patches, counted from the image's own base tile: `int64[patch_height,
    patch_width]`"""
    import numpy as np

    side = arch.vision.patches
    class_token = arch.tile_features - side * side  # 1 where a tile's first row is the tower's class token
    r = np.arange(plan.patch_top, plan.patch_top + plan.patch_height)[:, None]
    c = np.arange(plan.patch_left, plan.patch_left + plan.patch_width)[None, :]
    tile = 1 + (r // side) * plan.columns + c // side
    patch = (r % side) * side + c % side
    return tile * arch.tile_features + class_token + patch


def _table_rows(plans: Sequence[MediumPlan], arch: Architecture) -> int:
    """Rows of the sample's own feature table (N)."""
    tiles, frames = _count_rows(plans)
    return tiles * arch.tile_features + frames * arch.frame_features


def collate(samples: Sequence[EncodedSample], seq_length: int, tiles: int, frames: int, arch: Architecture) -> Batch:
    """Pad samples to one static shape and shift their labels.

    Args:
        samples: B of them.
        seq_length: S, positions; shorter samples are padded on the right.
        tiles, frames: the static G and F; unused ones are zeros, and no position points at them.

    Raises:
        DataError: a sample does not fit.
    """
    import numpy as np

    padded = [pad(sample, SampleSize(seq_length, tiles, frames), arch) for sample in samples]
    columns = {name: np.stack([columns[name] for columns in padded]) for name in padded[0]}
    return Batch(**columns, lengths=np.array([s.length for s in samples], np.int32))


def pad(sample: EncodedSample, room: SampleSize, arch: Architecture) -> dict[str, AnyArray]:
    """One sample in the shapes of a `Batch`, without the batch's own dimension and without `lengths`.

    Raises:
        DataError: the sample does not fit.
    """
    import numpy as np

    check_fit(sample.id, sample.size, room)
    side = arch.vision.image_size
    static_rows = room.tiles * arch.tile_features + room.frames * arch.frame_features
    input_ids = np.full(room.tokens, arch.text.pad_token_id, np.int32)
    labels = np.full(room.tokens, IGNORE_INDEX, np.int32)
    pixels = np.zeros((room.tiles + room.frames, 3, side, side), np.float32)
    feature_index = np.full(room.tokens, static_rows + 1, np.int32)
    input_ids[: sample.length] = sample.input_ids
    labels[: sample.length - 1] = sample.labels[1:]
    pixels[: len(sample.tiles)] = sample.tiles
    pixels[room.tiles : room.tiles + len(sample.frames)] = sample.frames
    feature_index[: sample.length] = _relocate(sample, room.tiles, static_rows, arch)
    return {"input_ids": input_ids, "labels": labels, "tiles": pixels, "feature_index": feature_index}


def check_fit(sample_id: str, size: SampleSize, room: SampleSize) -> None:
    """Raise a `DataError` where a sample is longer, or has more tiles or frames, than a batch has room for."""
    changes = (
        f"set data.seq_length to at least {size.tokens}",
        f"set data.tiles to at least {size.tiles}",
        "raise data.videos (videos per sample) or lower data.frames (frames per video)",
    )
    for has, fits, unit, change in zip(size, room, UNITS, changes, strict=True):
        if has > fits:
            raise DataError(f"sample {sample_id}: {has} {unit}, but {fits} fit", f"{change}, or drop the sample")


def _relocate(sample: EncodedSample, tiles: int, static_rows: int, arch: Architecture) -> Int32Array:
    """A sample's `feature_index` with rows of the static table: tiles stay, frames, newline and text move."""
    import numpy as np

    own_tile_rows = len(sample.tiles) * arch.tile_features
    own_rows = own_tile_rows + len(sample.frames) * arch.frame_features
    index = sample.feature_index
    moved = np.where(index >= own_tile_rows, index + (tiles * arch.tile_features - own_tile_rows), index)
    return np.where(index >= own_rows, index + (static_rows - own_rows), moved).astype(np.int32)

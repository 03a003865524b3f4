"""Which forms of pictures and clips are read, and how the names of such files end. The one table for the whole package.

A file is read by its content, whatever its name. Endings count where only the name is known: in a folder of media, and
in the tags of the original's samples.
"""

from __future__ import annotations

from pathlib import PurePath

PICTURE_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif", ".avifs"),
}
"""By PIL's names. PIL knows more, and some of them run a program: Ghostscript for EPS, whatever the name of the file
is."""

CLIP_FORMATS = {
    "mov": (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v"),
    "mp4": (),
    "matroska": (".mkv", ".mk3d"),
    "webm": (".webm",),
    "avi": (".avi", ".divx"),
    "flv": (".flv",),
    "asf": (".wmv", ".asf"),
    "mpeg": (".mpg", ".mpeg", ".vob"),
    "mpegts": (".ts", ".mts", ".m2t", ".m2ts"),
    "mpegvideo": (".m1v", ".m2v"),
    "m4v": (),
    "h264": (".h264", ".264"),
    "hevc": (".hevc", ".h265", ".265"),
    "ivf": (".ivf",),
    "obu": (".obu",),
    "ogg": (".ogv",),
    "gif": (),  # by its name a picture
    "apng": (),
    "mxf": (".mxf",),
    "nut": (".nut",),
    "rm": (".rm", ".rmvb"),
    "dv": (".dv", ".dif"),
}
"""By FFmpeg's names. FFmpeg knows more, and some of them are lists of other files and of addresses, which it would read
from wherever they are: playlists (hls, concat), dash, sdp, sequences of pictures."""

PICTURE_ENDINGS = tuple(ending for endings in PICTURE_FORMATS.values() for ending in endings)
CLIP_ENDINGS = tuple(ending for endings in CLIP_FORMATS.values() for ending in endings)


def guess_kind(name: str | PurePath) -> str | None:
    """The kind of medium, "image" or "video", that a file's name tells; None where it tells neither."""
    ending = PurePath(name).suffix.lower()
    return "image" if ending in PICTURE_ENDINGS else "video" if ending in CLIP_ENDINGS else None

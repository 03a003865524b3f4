"""The file formats of images and videos that are read, and the endings of such files, for the whole package.

A file is read by its content, whatever its name. The ending counts where only the name is known: in a folder of media,
and in the tags of the original's samples.
"""

from __future__ import annotations

from pathlib import Path, PurePath

from llavanext_cli.errors import DataError

IMAGE_FORMATS = {
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
"""By PIL's names. PIL reads other formats too, and for some it runs a program (EPS: Ghostscript), whatever the file's
name."""

VIDEO_FORMATS = {
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
    "gif": (),  # the ending means an image
    "apng": (),
    "mxf": (".mxf",),
    "nut": (".nut",),
    "rm": (".rm", ".rmvb"),
    "dv": (".dv", ".dif"),
}
"""By FFmpeg's names. FFmpeg reads other formats too, and some of them make it open other files and URLs: playlists
(hls, concat), dash, sdp, image sequences."""

IMAGE_ENDINGS = tuple(ending for endings in IMAGE_FORMATS.values() for ending in endings)
VIDEO_ENDINGS = tuple(ending for endings in VIDEO_FORMATS.values() for ending in endings)


def guess_kind(name: str | PurePath) -> str | None:
    """The kind of medium, "image" or "video", by the ending of a file's name; None for another ending."""
    ending = PurePath(name).suffix.lower()
    return "image" if ending in IMAGE_ENDINGS else "video" if ending in VIDEO_ENDINGS else None


def check_file(path: Path, kind: str) -> None:
    """Raise a `DataError` if `path`, of the given kind, is a folder, missing or empty."""
    if path.is_dir():
        raise DataError(
            f"{path}: a folder, not {'an image' if kind == 'image' else 'a video'}", f"name the {kind} file"
        )
    if not path.is_file():
        raise DataError(
            f"{path}: no such {kind}", "check the path; in a samples file, it is relative to the root of its source"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the {kind} is empty (0 bytes)", "download it again or drop the sample")

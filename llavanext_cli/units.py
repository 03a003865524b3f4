"""Sizes, memory and times as people read them, in every command alike."""

import re


def format_size(nbytes: int) -> str:
    """`4990000000` → `4.99 GB`."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def parse_size(text: str) -> int:
    """`5GB`, `500 MB`, `2GiB` → bytes.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    size = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise ValueError(f"{text!r:.80} is not a size; write it as 5GB, 500MB or 2GiB")
    return int(size)


def format_memory(nbytes: int) -> str:
    """Memory of a device; 1 GB is 2**30 bytes, as MindSpore and npu-smi have it: `3533000000` → `3.29 GB`."""
    return f"{nbytes / 2**30:.3g} GB" if nbytes > 2**28 else f"{nbytes / 2**20:.3g} MB"


def format_seconds(seconds: float) -> str:
    """`83.2` → `1 min 23 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"

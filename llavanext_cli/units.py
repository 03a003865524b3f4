"""Sizes as people read them, in every command alike."""


def format_size(nbytes: int) -> str:
    """`4990000000` → `4.99 GB`."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"

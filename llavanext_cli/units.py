"""Sizes, memory and times as people read them, in every command alike."""


def format_size(nbytes: int) -> str:
    """`4990000000` → `4.99 GB`."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


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

"""How many cores this process may use."""

import os


def usable_cores() -> int:
    """Cores this process may use: fewer than there are where a scheduler or `taskset` says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

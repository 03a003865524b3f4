"""Cores of this machine."""

import os


def usable_cores() -> int:
    """Cores that this process may use; a scheduler or `taskset` may allow fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

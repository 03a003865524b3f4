"""Memory of this machine, with the limit of a container."""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> int:
    """Bytes that a new process can take: what the kernel calls available, within the container's limit (cgroup v2, v1).

    Page cache counts as available, because the kernel gives it up.
    """
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((cgroup / limit).read_text())  # "max" where there is none
            used = int((cgroup / usage).read_text())
            stat = (cgroup / limit).with_name("memory.stat").read_text()
        except (OSError, ValueError):
            continue
        pages = next((int(line.split()[1]) for line in stat.splitlines() if line.split()[0] == cache), 0)
        free = min(free, most - used + pages)
    return max(0, free)

"""Which Ascend hardware and software this machine has, from its files and from `npu-smi info`.

    driver, firmware   <root>/driver/version.info, <root>/firmware/version.info; root from /etc/ascend_install.info
    CANN               <ASCEND_HOME_PATH>/<arch>-linux/ascend_toolkit_install.info, or compiler/version.info
    NPUs               two rows of npu-smi's table each; without npu-smi /dev/davinci0, 1 ...

Nothing of Ascend is imported or loaded, so that a broken installation can be checked, too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NPU_SMI_SECONDS = 20
UNKNOWN = "unknown"
DEFAULT_ROOT = "usr/local/Ascend"
CANN_FOLDERS = ("cann", "ascend-toolkit/latest", "nnae/latest", "nnrt/latest")
"""CANN's folder under its root, newest layout first."""

VERSION_LINE = re.compile(r"^\s*version\s*=\s*(\S+)", re.IGNORECASE | re.MULTILINE)
ROOT_LINE = re.compile(r"^\s*Driver_Install_Path_Param\s*=\s*(\S+)", re.MULTILINE)
BUS_ID = re.compile(r"^[0-9A-Fa-f]{4}:\w\w:\w\w\.\w$|^NA$")
MEMORY = re.compile(r"(\d+)\s*/\s*(\d+)")


@dataclass(frozen=True)
class Npu:
    """One chip: its number, name and health as npu-smi prints them, and device memory in MB (0: unknown)."""

    number: int
    name: str
    health: str
    used: int = 0
    total: int = 0


@dataclass(frozen=True)
class Ascend:
    """What was found; None or empty for what was not.

    Attributes:
        driver, firmware: versions, such as "26.0.rc1".
        cann: version, such as "9.0.0".
        cann_home: folder of CANN.
        is_set_up: CANN's set_env.sh has been sourced (ASCEND_HOME_PATH is set).
        fault: why npu-smi failed, if it did.
    """

    npus: tuple[Npu, ...]
    driver: str | None
    firmware: str | None
    cann: str | None
    cann_home: Path | None
    is_set_up: bool
    fault: str = ""


def find_ascend(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Ascend:
    """Look for NPUs and their software.

    Args:
        environ: its PATH finds npu-smi, its ASCEND_HOME_PATH CANN.
        root: of the file system.
    """
    text, fault = _run_npu_smi(environ, root)
    npus, version = parse_npu_smi(text)
    if not npus and (root / "dev").is_dir():
        devices = sorted(int(path.name[7:]) for path in (root / "dev").glob("davinci[0-9]*") if path.name[7:].isdigit())
        npus = tuple(Npu(number, "NPU", UNKNOWN) for number in devices)
    installed = root / _install_root(root)
    home = _find_cann(environ, root, installed)
    return Ascend(
        npus=npus,
        driver=_read_version(installed / "driver" / "version.info") or version,
        firmware=_read_version(installed / "firmware" / "version.info"),
        cann=_cann_version(home),
        cann_home=home,
        is_set_up=bool(environ.get("ASCEND_HOME_PATH")),
        fault=fault,
    )


def parse_npu_smi(text: str) -> tuple[tuple[Npu, ...], str | None]:
    """Chips and tool version in the table that `npu-smi info` prints.

    A chip takes two rows of three cells: `0  910B2 | OK | power, temperature, pages`, then
    `0 | 0000:C1:00.0 | use, memory, HBM`; the last `used / total` of the second is its own memory.
    """
    version = re.search(r"Version:\s*(\S+)", text)
    npus: list[Npu] = []
    first: tuple[list[str], str] | None = None
    for line in text.splitlines():
        if "Process id" in line:
            break
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 3:
            continue
        if first is not None and BUS_ID.match(cells[1]):
            words, health = first
            memory = [(int(used), int(total)) for used, total in MEMORY.findall(cells[2])]
            used, total = next(((used, total) for used, total in reversed(memory) if total), (0, 0))
            npus.append(Npu(len(npus), words[1], health, used, total))
            first = None
            continue
        words = cells[0].split()
        first = (words, cells[1]) if len(words) == 2 and words[0].isdigit() else None
    return tuple(npus), version and version[1]


def _run_npu_smi(environ: Mapping[str, str], root: Path) -> tuple[str, str]:
    """The output of npu-smi, and why there is none."""
    tool = shutil.which("npu-smi", path=environ.get("PATH", ""))
    if tool is None and (root / "usr/local/bin/npu-smi").is_file():
        tool = str(root / "usr/local/bin/npu-smi")
    if tool is None:
        return "", ""
    try:
        done = subprocess.run(
            [tool, "info"], env=dict(environ), capture_output=True, text=True, errors="replace", timeout=NPU_SMI_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "", f"npu-smi info did not answer within {NPU_SMI_SECONDS} s"
    except OSError as fault:
        return "", f"{tool}: {fault.strerror}"
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return "", f"npu-smi info: {said[-1] if said else f'exit code {done.returncode}'}"
    return done.stdout, ""


def _install_root(root: Path) -> str:
    """Where the driver was installed, without the leading slash."""
    found = ROOT_LINE.search(_read(root / "etc/ascend_install.info"))
    return (found[1] if found else DEFAULT_ROOT).lstrip("/")


def _find_cann(environ: Mapping[str, str], root: Path, installed: Path) -> Path | None:
    named = environ.get("ASCEND_HOME_PATH") or environ.get("ASCEND_TOOLKIT_HOME")
    homes = [Path(named)] if named else []
    roots = dict.fromkeys((installed, root / DEFAULT_ROOT, Path(environ.get("HOME", root)) / "Ascend"))
    homes += [folder / name for folder in roots for name in CANN_FOLDERS]
    return next((home for home in homes if home.is_dir()), None)


def _cann_version(home: Path | None) -> str | None:
    if home is None:
        return None
    files = [
        *sorted(home.glob("*-linux/ascend_*_install.info")),
        *sorted(home.glob("ascend_*_install.info")),
        home / "compiler" / "version.info",
    ]
    return next((version for version in map(_read_version, files) if version), None)


def _read_version(path: Path) -> str | None:
    found = VERSION_LINE.search(_read(path))
    return found[1] if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

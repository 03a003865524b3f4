"""Stubs of CANN, so that MindSpore's Ascend plugin loads on a machine without CANN.

MindSpore's Linux wheel contains its Ascend plugin, which does not load without the libraries of CANN that it links
against. Here one library is built that has every function the plugin asks for, each returning 0, under the names of
all of CANN's libraries. Nothing is computed: with `MS_SIMULATION_LEVEL=0` MindSpore compiles graphs and runs none.

    undefined names of the plugin ─┐
                                   ├─ minus those of MindSpore and the system ─▶ stubs.c ─cc─▶ libascendcl.so ◀─ links
    names it looks up as text ─────┘
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llavanext_cli.errors import RuntimeMissingError
from llavanext_cli.files import cache_folder, replacing

SYSTEM_CANN = Path("/usr/local/Ascend/ascend-toolkit")

WITH_RESULTS = {
    "aclrtGetSocName": 'const char* aclrtGetSocName(void){return "Ascend910B1";}',
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(uint32_t*n){*n=8;return 0;}",
    "aclrtGetMemInfo": "int aclrtGetMemInfo(int a,size_t*f,size_t*t){*f=60ULL<<30;*t=64ULL<<30;return 0;}",
    "aclrtGetDevice": "int aclrtGetDevice(int*d){*d=0;return 0;}",
    "aclrtGetVersion": "int aclrtGetVersion(int*a,int*b,int*c){*a=1;*b=0;*c=0;return 0;}",
    "aclrtGetCurrentContext": "int aclrtGetCurrentContext(void**s){static long c;*s=&c;return 0;}",
    # The memory pool is never touched: a megabyte of it is enough, however much is asked for.
    "aclrtMalloc": "int aclrtMalloc(void**p,size_t n,int k){*p=malloc(n<64?64:n>1048576?1048576:n);return 0;}",
    "aclrtMallocHost": "int aclrtMallocHost(void**p,size_t n){*p=malloc(n);return 0;}",
    "aclrtFree": "int aclrtFree(void*p){free(p);return 0;}",
    "aclrtFreeHost": "int aclrtFreeHost(void*p){free(p);return 0;}",
    "aclrtCreateStream": "int aclrtCreateStream(void**s){*s=malloc(8);return 0;}",
    "aclrtCreateStreamWithConfig": "int aclrtCreateStreamWithConfig(void**s,int a,int b){*s=malloc(8);return 0;}",
    "aclrtCreateEvent": "int aclrtCreateEvent(void**s){*s=malloc(8);return 0;}",
    "aclrtCreateEventWithFlag": "int aclrtCreateEventWithFlag(void**s,uint32_t f){*s=malloc(8);return 0;}",
    "aclrtCreateEventExWithFlag": "int aclrtCreateEventExWithFlag(void**s,uint32_t f){*s=malloc(8);return 0;}",
    "aclrtCreateContext": "int aclrtCreateContext(void**s,int d){*s=malloc(8);return 0;}",
}
"""The functions whose results MindSpore reads: one node of 8 devices of 64 GB."""

OPENED = ("libacl_op_compiler.so", "libacl_tdt_channel.so", "libacl_tdt_queue.so", "libcust_opapi.so", "libhccl.so")
"""Libraries the plugin opens by name at run time; those it links against are read from its files."""

_LOOKED_UP = re.compile(rb"\0((?:acl|Hccl|hccl|rt|hal|drv)[A-Za-z0-9]{3,60})(?=\0)")


@dataclass(frozen=True)
class SimulationEnvironment:
    """How to start a process that compiles for Ascend: its variables, and whether stubs take CANN's place."""

    variables: dict[str, str]
    cann_stubs: bool


def simulation_environment(cache: Path | None = None) -> SimulationEnvironment:
    """The environment of a process that compiles for Ascend on any machine. Stubs are built when they are needed.

    Args:
        cache: folder that keeps the stubs; None for the user's cache folder.

    Raises:
        RuntimeMissingError: no MindSpore, a MindSpore without its Ascend plugin, no C compiler, or CANN is installed
            but not set up in this shell.
    """
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    if home and (Path(home) / "lib64" / "libascendcl.so").exists():
        return SimulationEnvironment({"MS_SIMULATION_LEVEL": "0"}, cann_stubs=False)
    if (SYSTEM_CANN / "set_env.sh").is_file():
        raise RuntimeMissingError("CANN is not set up in this shell", hint=f"run `source {SYSTEM_CANN}/set_env.sh`")
    mindspore = find_mindspore()
    folder = build_stubs(mindspore, cache or cache_folder())
    libraries = folder / "ascend-toolkit" / "latest" / "cann" / "lib64"
    search = [libraries, *sorted({file.parent for file in list_plugin(mindspore)}), mindspore / "lib"]
    return SimulationEnvironment(
        {
            "MS_SIMULATION_LEVEL": "0",
            "ASCEND_HOME_PATH": str(libraries.parent),
            "LD_LIBRARY_PATH": _joined(*map(str, search), os.environ.get("LD_LIBRARY_PATH", "")),
            "PYTHONPATH": _joined(str(folder / "python"), os.environ.get("PYTHONPATH", "")),
        },
        cann_stubs=True,
    )


def find_mindspore() -> Path:
    """The folder of the installed MindSpore, which is not imported.

    Raises:
        RuntimeMissingError: it is missing, or has no Ascend plugin.
    """
    spec = importlib.util.find_spec("mindspore")
    if spec is None or spec.origin is None:
        raise RuntimeMissingError("MindSpore is not installed", hint="run `pip install mindspore==2.9.0`")
    folder = Path(spec.origin).parent
    if not (folder / "lib" / "plugin" / "ascend").is_dir():
        raise RuntimeMissingError(
            f"MindSpore's Ascend plugin is missing ({folder}/lib/plugin/ascend): it cannot compile for Ascend",
            hint="install its wheel for Linux: `pip install mindspore==2.9.0` on x86-64 or aarch64 Linux",
        )
    return folder


def list_plugin(mindspore: Path) -> list[Path]:
    """Every library of the Ascend plugin."""
    plugin = mindspore / "lib" / "plugin"
    return sorted([*plugin.glob("*ascend*.so*"), *(plugin / "ascend").rglob("*.so*")])


def build_stubs(mindspore: Path, cache: Path) -> Path:
    """Build the stubs for this MindSpore, or find them in `cache`.

    Returns:
        The folder, with `ascend-toolkit/latest/cann/lib64` (the path in which MindSpore looks for CANN) and `python`.

    Raises:
        RuntimeMissingError: no C compiler or `nm`, or it fails, or `cache` cannot be written.
    """
    folder = cache / f"cann-stubs-{_fingerprint(mindspore)}"
    if folder.is_dir():
        return folder
    compiler = _find_tool("gcc", "cc", "clang")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as partial:
            _build(mindspore, partial, compiler)
    except OSError as fault:
        raise RuntimeMissingError(
            f"stubs for CANN cannot be written: {fault}", hint="set XDG_CACHE_HOME to another folder"
        ) from fault
    return folder


def _fingerprint(mindspore: Path) -> str:
    """A digest of what the stubs depend on: the version of MindSpore, the machine, and this file."""
    version = (mindspore / "version.py").read_bytes() + (mindspore / ".commit_id").read_bytes()
    parts = (version, platform.machine().encode(), Path(__file__).read_bytes())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _build(mindspore: Path, folder: Path, compiler: str) -> None:
    libraries = folder / "ascend-toolkit" / "latest" / "cann" / "lib64"
    (libraries / "driver").mkdir(parents=True)
    (libraries.parent / "opp").mkdir()
    plugin = list_plugin(mindspore)
    source = folder / "stubs.c"
    source.write_text(_source(_missing_names(mindspore, plugin) | _looked_up_names(plugin)), encoding="ascii")
    first = libraries / "libascendcl.so"
    _run([compiler, "-shared", "-fPIC", "-w", f"-Wl,-soname,{first.name}", "-o", str(first), str(source)])
    for name in sorted({*OPENED, *_missing_libraries(mindspore, plugin)} - {first.name}):
        (libraries / name).symlink_to(first.name)
    (libraries / "driver" / "libascend_hal.so").symlink_to(f"../{first.name}")
    hccl = folder / "python" / "hccl"  # MindSpore reads its version
    hccl.mkdir(parents=True)
    (hccl / "__init__.py").touch()
    (hccl / "sys_version.py").write_text('__sys_version__ = "0.0"\n', encoding="ascii")


def _source(names: Iterable[str]) -> str:
    """C: every name a function that returns 0, or 64 empty words when it is a table of C++ (vtable, type)."""
    lines = ["#include <stdint.h>", "#include <stdlib.h>", *WITH_RESULTS.values()]
    for name in sorted(set(names) - WITH_RESULTS.keys()):
        table = name.startswith(("_ZTV", "_ZTI", "_ZTS"))
        lines.append(f"void* {name}[64];" if table else f"long {name}(void){{return 0;}}")
    return "\n".join(lines) + "\n"


def _missing_names(mindspore: Path, plugin: list[Path]) -> set[str]:
    """Names that the plugin needs and MindSpore and the system lack. The system's own have a version (GLIBC)."""
    own = [*plugin, *(mindspore / "lib").glob("*.so*"), *mindspore.glob("*.so")]
    undefined = {name for kind, name in _symbols("--undefined-only", plugin) if kind == "U" and "@" not in name}
    defined = {name.partition("@")[0] for _, name in _symbols("--defined-only", own)}
    return {
        name
        for name in undefined - defined
        if name.isidentifier() and not name.startswith(("Py", "_Py", "_ZTH")) and not _defined_by_system(name)
    }


def _defined_by_system(name: str) -> bool:
    """Whether a library of the system defines it, without a version on this machine."""
    for library in ("libz.so.1", "libstdc++.so.6", None):
        with contextlib.suppress(OSError):
            if hasattr(ctypes.CDLL(library), name):
                return True
    return False


def _symbols(option: str, files: list[Path]) -> Iterator[tuple[str, str]]:
    """(kind, name) of the dynamic symbols of all files."""
    command = [_find_tool("nm", "llvm-nm"), "-D", option, *map(str, files)]
    # Its exit code is not 0 when one of the files is a library for another machine.
    for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
        words = line.split()
        if len(words) >= 2 and len(words[-2]) == 1:
            yield words[-2], words[-1]


def _looked_up_names(plugin: list[Path]) -> set[str]:
    """Names of CANN's C functions in the plugin's text: it looks those up at run time."""
    found = set()
    for file in plugin:
        if file.parent.name in ("plugin", "ascend"):
            found |= {match.decode() for match in _LOOKED_UP.findall(file.read_bytes())}
    return {name for name in found if not name.startswith("aclnn")}


def _missing_libraries(mindspore: Path, plugin: list[Path]) -> set[str]:
    """Libraries that the plugin links against and that neither MindSpore nor the system has."""
    own = {file.name for folder in (mindspore, mindspore / "lib") for file in folder.rglob("*.so*")}
    command = [_find_tool("readelf", "llvm-readelf"), "-d", *map(str, plugin)]
    sections = subprocess.run(command, capture_output=True, text=True).stdout
    linked = set(re.findall(r"\(NEEDED\).*\[(lib\w+\.so)\]", sections))  # the system's end in a number
    return linked - own


def _find_tool(*names: str) -> str:
    for name in names:
        if found := shutil.which(name):
            return found
    raise RuntimeMissingError(
        f"{names[0]} is not installed: stubs for CANN cannot be built without it",
        hint="install it with `apt-get install gcc` or `dnf install gcc` (which bring binutils)",
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeMissingError(
            f"{Path(command[0]).name} cannot build stubs for CANN: {lines[0] if lines else 'no message'}",
            hint="check the compiler, and that the disk has room",
            details=lines[1:5],
        )


def _joined(*parts: str) -> str:
    return ":".join(part for part in parts if part)

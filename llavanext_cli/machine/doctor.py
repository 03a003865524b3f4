"""Checks of this machine: one finding each, with what to do about it.

Which versions go together is in MindFormers' VERSION_MAP.json: MindFormers → MindSpore → CANN → driver.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from llavanext_cli.config.schema import Preset
from llavanext_cli.errors import RuntimeMissingError
from llavanext_cli.machine.ascend import UNKNOWN, Ascend, find_ascend
from llavanext_cli.machine.cores import usable_cores

State = Literal["ok", "warning", "fault"]

PYTHONS = ((3, 10), (3, 12))
ARCHITECTURES = ("x86_64", "aarch64")
HUB = "https://huggingface.co"
HUB_SECONDS = 5
LOAD_SECONDS = 180
DISK_GB = {
    "train": (500, "72 GB of downloads, 28 GB a trained model, 85 GB a checkpoint (train --plan says more)"),
    "ask": (30, "its download and its checkpoint"),
}
"""Task → free space that Video-7B needs, in GB, and what for."""
BUSY_SHARE = 0.1
"""Share of device memory in use above which another job is running there."""

LOADS = "import mindspore as m; m.set_device('CPU'); import numpy as n; print(float((m.Tensor(n.ones(3))+1).sum()))"


@dataclass(frozen=True)
class Finding:
    """One line: what was checked, what was found, and what to do unless the state is "ok"."""

    name: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings.

    Attributes:
        target: "Ascend" or "CPU": what this machine was checked for.
        findings: in the order in which to fix them.
    """

    target: str
    findings: tuple[Finding, ...]

    @property
    def works(self) -> bool:
        """No finding is a fault."""
        return all(finding.state != "fault" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {"target": self.target, "works": self.works, "findings": [asdict(finding) for finding in self.findings]}


def run_doctor(preset: Preset | None = None, *, offline: bool = False) -> Diagnosis:
    """Check this machine.

    Args:
        preset: check for what it needs; without one, for NPUs where there is an NPU or a driver, else for a CPU.
        offline: do not use the network.
    """
    ascend = find_ascend(os.environ, Path("/"))
    has_npus = bool(ascend.npus or ascend.driver or ascend.fault)
    target: str = preset.runtime.target if preset else "Ascend" if has_npus else "CPU"
    versions = {name: _installed(name) for name in ("mindspore", "mindformers")}
    findings = [check_python(sys.version_info[:2]), check_platform(platform.system(), platform.machine())]
    findings += check_packages(versions, load_version_map())
    if versions["mindspore"]:
        findings.append(_check_loading(os.environ))
    findings += [_check_msrun(Path(sys.executable)), _check_video_reader()]
    if target == "Ascend":
        devices = preset.parallel.devices if preset else 1
        findings += check_ascend(ascend, versions["mindspore"], load_version_map(), devices)
    else:
        findings.append(
            Finding("NPUs", "ok", "none; on a CPU, ask works with every model, and train with the tiny presets")
        )
    task = preset.task if preset else "train" if target == "Ascend" else "ask"
    here = Path()  # results are usually written below it
    findings += [_check_memory(), check_disk(shutil.disk_usage(here).free, here, task)]
    if not offline:
        findings.append(_check_hub(os.environ))
    return Diagnosis(target, tuple(findings))


def require_versions(
    target: str, *, environ: Mapping[str, str] = os.environ, root: Path = Path("/"), advice: str = ""
) -> None:
    """Require packages, and CANN on Ascend, whose versions go together.

    Args:
        target: "Ascend" or "CPU".
        environ, root: for tests.
        advice: added to the hint.

    Raises:
        RuntimeMissingError: with doctor's findings and advice.
    """
    versions = {name: _installed(name) for name in WANTED}
    version_map = load_version_map()
    findings = check_packages(versions, version_map)
    if target == "Ascend":
        findings.append(_check_cann(find_ascend(environ, root), supported(version_map, "ms", versions["mindspore"])))
    faults = [finding for finding in findings if finding.state == "fault"]
    if faults:
        lines = [f"{fault.name}: {fault.found}: {fault.advice}" for fault in faults[1:]]
        raise RuntimeMissingError(f"{faults[0].name}: {faults[0].found}", faults[0].advice + advice, lines)


def require_cann(*, environ: Mapping[str, str] = os.environ, root: Path = Path("/"), advice: str = "") -> None:
    """Require CANN, of whatever version. Arguments and errors as of `require_versions`.

    Without it, MindSpore fails with seventy lines.
    """
    ascend = find_ascend(environ, root)
    if not ascend.is_set_up:
        finding = _check_cann(ascend, supported(load_version_map(), "ms", _installed("mindspore")))
        raise RuntimeMissingError(f"{finding.name}: {finding.found}", finding.advice + advice)


# -------------------------------------------------------------------------------------------------- Python and packages


def check_python(version: tuple[int, ...]) -> Finding:
    found = ".".join(map(str, version))
    if PYTHONS[0] <= tuple(version) <= PYTHONS[1]:
        return Finding("Python", "ok", found)
    return Finding(
        "Python", "fault", found, "install Python 3.10, 3.11 or 3.12: MindSpore 2.9.0 has wheels for these only"
    )


def check_platform(system: str, machine: str) -> Finding:
    found = f"{system} {machine}"
    if system != "Linux":
        return Finding("platform", "warning", found, "llavanext is tested on Linux only")
    if machine not in ARCHITECTURES:
        return Finding("platform", "fault", found, f"MindSpore has wheels for {' and '.join(ARCHITECTURES)} only")
    return Finding("platform", "ok", found)


def load_version_map() -> dict[str, Any]:
    """MindFormers' VERSION_MAP.json; empty when MindFormers is not installed."""
    spec = find_spec("mindformers")
    for folder in spec.submodule_search_locations or () if spec else ():
        try:
            return json.loads((Path(folder) / "VERSION_MAP.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return {}


def supported(version_map: Mapping[str, Any], of: str, version: str | None) -> list[str]:
    """Versions of the next package that go with this one: `supported(map, "mf", "1.9.0")` is ["2.9.0"] of MindSpore."""
    return list(version_map.get(of, {}).get(version or "", {}).get("support", ()))


def check_packages(versions: Mapping[str, str | None], version_map: Mapping[str, Any]) -> list[Finding]:
    """MindSpore and MindFormers are installed, and their versions go together."""
    findings = []
    for name, version in versions.items():
        if version is None:
            findings.append(Finding(name, "fault", "not installed", f"pip install {name}=={WANTED[name]}"))
        elif version != WANTED[name]:
            advice = f"llavanext is tested with {WANTED[name]}: pip install {name}=={WANTED[name]}"
            findings.append(Finding(name, "warning", version, advice))
        else:
            findings.append(Finding(name, "ok", version))
    fitting = supported(version_map, "mf", versions["mindformers"])
    if fitting and versions["mindspore"] and versions["mindspore"] not in fitting:
        found = f"MindFormers {versions['mindformers']} with MindSpore {versions['mindspore']}"
        findings.append(Finding("match", "fault", found, f"pip install mindspore=={fitting[0]}"))
    return findings


WANTED = {"mindspore": "2.9.0", "mindformers": "1.9.0"}


def _installed(package: str) -> str | None:
    try:
        return package_version(package)
    except PackageNotFoundError:
        return None


def _check_loading(environ: Mapping[str, str]) -> Finding:
    """Import MindSpore and add two numbers, in another process, as a broken library may crash it."""
    name = "mindspore loads"
    try:
        done = subprocess.run(
            [sys.executable, "-c", LOADS],
            env={**environ, "GLOG_v": "4"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LOAD_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Finding(
            name,
            "fault",
            f"did not load within {LOAD_SECONDS} s",
            "check whether this machine or its disk is overloaded",
        )
    if done.returncode == 0 and done.stdout.split()[-1:] == ["6.0"]:
        return Finding(name, "ok", "yes")
    said = done.stderr.strip().splitlines()
    return Finding(name, "fault", said[-1] if said else f"exit code {done.returncode}", "reinstall it with pip")


def _check_msrun(python: Path) -> Finding:
    if python.with_name("msrun").is_file():
        return Finding("msrun", "ok", "found beside Python")
    return Finding("msrun", "fault", "missing beside Python", "install llavanext in a virtual environment of its own")


def _check_video_reader() -> Finding:
    found = [f"{name} {version}" for name in ("decord", "av") if (version := _installed(name))]
    if found:
        return Finding("video reader", "ok", ", ".join(found))
    return Finding("video reader", "fault", "none", "pip install av")


# ------------------------------------------------------------------------------------------------------------- Ascend


def check_ascend(
    ascend: Ascend, mindspore: str | None, version_map: Mapping[str, Any], devices: int = 1
) -> list[Finding]:
    """NPUs are enough and healthy, and CANN, driver and firmware are of versions that go together.

    Args:
        mindspore: its installed version.
        version_map: MindFormers' table.
        devices: NPUs that are needed.
    """
    wanted_cann = supported(version_map, "ms", mindspore)
    findings = [*_check_npus(ascend, devices), _check_cann(ascend, wanted_cann)]
    wanted_driver = [driver for cann in wanted_cann for driver in supported(version_map, "cann", cann)]
    for name, found in (("driver", ascend.driver), ("firmware", ascend.firmware)):
        if found is None:
            state: State = "fault" if name == "driver" else "warning"
            advice = f"install the Ascend {name}" + (f" {wanted_driver[0]}" if wanted_driver else "")
            findings.append(Finding(name, state, "not found", f"{advice}, as the administrator"))
        elif name == "driver" and wanted_driver and not _is_among(found, wanted_driver):
            advice = f"CANN {wanted_cann[0]} goes with driver {' or '.join(wanted_driver)}; others may fail"
            findings.append(Finding(name, "warning", found, advice))
        else:
            findings.append(Finding(name, "ok", found))
    return findings


def _check_npus(ascend: Ascend, devices: int) -> list[Finding]:
    if ascend.fault:
        return [
            Finding("NPUs", "fault", ascend.fault, "check that the driver is loaded, and that you are in its group")
        ]
    if not ascend.npus:
        return [
            Finding("NPUs", "fault", "none found", "install the driver; in a container, pass /dev/davinci* through")
        ]
    count, names = len(ascend.npus), sorted({npu.name for npu in ascend.npus})
    sizes = sorted({npu.total for npu in ascend.npus if npu.total})
    found = f"{count} x {' and '.join(names)}" + (f", {' and '.join(map(str, sizes))} MB each" if sizes else "")
    if count < devices:
        advice = f"{devices} are needed: use another machine, or --devices {count} with a preset that allows it"
        findings = [Finding("NPUs", "fault", found, advice)]
    else:
        findings = [Finding("NPUs", "ok", found)]
    for npu in ascend.npus:
        if npu.health not in ("OK", UNKNOWN):
            advice = f"see `npu-smi info -t health -i {npu.number}`; hide it with ASCEND_RT_VISIBLE_DEVICES"
            findings.append(Finding(f"NPU {npu.number}", "fault", f"health {npu.health}", advice))
        elif npu.total and npu.used > BUSY_SHARE * npu.total:
            found = f"{npu.used} of {npu.total} MB in use"
            findings.append(Finding(f"NPU {npu.number}", "warning", found, "another job runs there"))
    return findings


def _check_cann(ascend: Ascend, wanted: list[str]) -> Finding:
    asked = f"CANN {' or '.join(wanted)}" if wanted else "CANN"
    if ascend.cann_home is None:
        return Finding("CANN", "fault", "not found", f"install {asked} and source its set_env.sh")
    found = f"{ascend.cann or 'unknown version'} in {ascend.cann_home}"
    if not ascend.is_set_up:
        return Finding("CANN", "fault", f"{found}, not set up", f"source {ascend.cann_home}/set_env.sh")
    if wanted and ascend.cann and not _is_among(ascend.cann, wanted):
        return Finding("CANN", "fault", found, f"this MindSpore needs {asked}")
    return Finding("CANN", "ok" if ascend.cann else "warning", found, "" if ascend.cann else f"it should be {asked}")


def _is_among(version: str, wanted: list[str]) -> bool:
    """Whether a version is one of these, or a build of one: 9.0.0.B010 is a build of 9.0.0. Case does not matter."""
    return any(version.lower() == one.lower() or version.lower().startswith(f"{one.lower()}.") for one in wanted)


# ----------------------------------------------------------------------------------------------- memory, disk, network


def _check_memory() -> Finding:
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Finding("cores, memory", "ok", f"{usable_cores()} cores, {gigabytes:.0f} GB")


def check_disk(free: int, folder: Path, task: str) -> Finding:
    """Free bytes against what Video-7B needs for a task."""
    found = f"{free / 1e9:.0f} GB free in {folder.resolve()}"
    gigabytes, what = DISK_GB[task]
    if free >= gigabytes * 1e9:
        return Finding("disk", "ok", found)
    return Finding("disk", "warning", found, f"Video-7B needs {gigabytes} GB: {what}")


def _check_hub(environ: Mapping[str, str]) -> Finding:
    """Whether the Hub, or the mirror in HF_ENDPOINT, answers; proxies are used."""
    endpoint = environ.get("HF_ENDPOINT") or HUB
    shown = endpoint.rsplit("@", 1)[-1]  # without the password that an address may hold
    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=HUB_SECONDS):
            pass
    except HTTPError:
        pass  # an answer
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "reason", fault)
        advice = "set HF_ENDPOINT to a mirror or HTTPS_PROXY to a proxy, or use fetch --source modelscope"
        return Finding("Hugging Face", "warning", f"{shown} cannot be reached: {reason}", advice)
    return Finding("Hugging Face", "ok", f"{shown} answers")

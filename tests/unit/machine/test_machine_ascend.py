"""Ascend's files and npu-smi's table: as users' machines have them, and broken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llavanext_cli.machine.ascend import Npu, find_ascend, parse_npu_smi

RULE = "+---------------------------+---------------+----------------------------------------------------+"
A2_HEAD = f"""\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.5.0                   Version: 25.5.0                                               |
{RULE}
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
"""
TAIL = """\
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 3       0                 | 4242          | python                   | 30127                   |
+===========================+===============+====================================================+
"""


def a2(count: int = 8, health: str = "OK", used: int = 3385, number: int = 3) -> str:
    """An Atlas 800T A2; one NPU has the given health and memory in use."""
    rows = []
    for npu in range(count):
        is_odd = npu == number
        rows.append(
            f"| {npu}     910B2               | {health if is_odd else 'OK':13} | 105.8       39"
            "                0    / 0             |\n"
            f"| 0                         | 0000:C{npu}:00.0  | 0           0    / 0          "
            f"{used if is_odd else 3197} / 65536         |\n"
        )
    return A2_HEAD + f"{RULE}\n".join(rows) + TAIL


TWO_CHIPS = """\
| npu-smi 26.0.rc2                            Version: 26.0.rc2                                                    |
| NPU   Name                | Health        | Power(W)             Temp(C)                 Hugepages-Usage(page)   |
| Chip  Phy-ID              | Bus-Id        | AICore(%)            Memory-Usage(MB)        HBM-Usage(MB)           |
| 0     Ascend910           | OK            | 162.6                34                      0    / 0                |
| 0     0                   | 0000:9D:00.0  | 0                    0    / 0                3419 / 65536            |
| 0     Ascend910           | Alarm         | -                    34                      0    / 0                |
| 1     1                   | 0000:9F:00.0  | 0                    0    / 0                2874 / 65536            |
"""


def write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def fake_npu_smi(folder: Path, script: str) -> dict[str, str]:
    """An environment whose npu-smi is `script`."""
    tool = write(folder, "bin/npu-smi", f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return {"PATH": f"{tool.parent}:{os.environ['PATH']}", "HOME": str(folder / "home")}


def test_eight_chips_of_an_atlas_800t_a2():
    npus, version = parse_npu_smi(a2())
    assert version == "25.5.0" and len(npus) == 8
    assert npus[3] == Npu(3, "910B2", "OK", 3385, 65536) and npus[7] == Npu(7, "910B2", "OK", 3197, 65536)


def test_two_chips_on_a_card_are_two_npus():
    npus, version = parse_npu_smi(TWO_CHIPS)
    assert version == "26.0.rc2"
    assert npus == (Npu(0, "Ascend910", "OK", 3419, 65536), Npu(1, "Ascend910", "Alarm", 2874, 65536))


@pytest.mark.parametrize(
    "text", ["", "no table", "| 0 910B | OK | x |", "|||||", "| 0     910B2 | OK |\n| a | b | c |"]
)
def test_no_chip_is_made_up(text):
    assert parse_npu_smi(text)[0] == ()


def test_a_machine_with_everything(tmp_path):
    write(tmp_path, "etc/ascend_install.info", "UserName=HwHiAiUser\nDriver_Install_Path_Param=/opt/Ascend\n")
    write(tmp_path, "opt/Ascend/driver/version.info", "Version=26.0.rc1\nascendhal_version=7.35.23\n")
    write(tmp_path, "opt/Ascend/firmware/version.info", "Version=7.8.0.2.212\nfirmware_version=1.0\n")
    home = tmp_path / "opt/Ascend/cann"
    write(home, "aarch64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=9.0.0\n")
    environ = fake_npu_smi(tmp_path, f"cat {write(tmp_path, 'table.txt', a2())}")
    found = find_ascend(environ, tmp_path)
    assert len(found.npus) == 8 and found.fault == ""
    assert (found.driver, found.firmware, found.cann) == ("26.0.rc1", "7.8.0.2.212", "9.0.0")
    assert found.cann_home == home and not found.is_set_up
    assert find_ascend({**environ, "ASCEND_HOME_PATH": str(home)}, tmp_path).is_set_up


def test_an_older_cann_keeps_its_version_with_the_compiler(tmp_path):
    home = write(tmp_path, "cann/compiler/version.info", "Version=8.5.0.1.220\n").parents[1]
    assert find_ascend({"PATH": "", "ASCEND_HOME_PATH": str(home)}, tmp_path).cann == "8.5.0.1.220"


def test_a_container_without_npu_smi_still_has_device_files(tmp_path):
    for number in (0, 1, 10):
        write(tmp_path, f"dev/davinci{number}", "")
    write(tmp_path, "dev/davinci_manager", "")
    found = find_ascend({"PATH": ""}, tmp_path)
    assert [npu.number for npu in found.npus] == [0, 1, 10] and {npu.health for npu in found.npus} == {"unknown"}


def test_a_machine_with_nothing(tmp_path):
    found = find_ascend({"PATH": ""}, tmp_path)
    assert found.npus == () and found.fault == ""
    assert found.driver is found.firmware is found.cann is found.cann_home is None


def test_why_npu_smi_failed(tmp_path):
    script = "echo 'dcmi module initialize failed. ret is -8005' >&2; exit 1"
    found = find_ascend(fake_npu_smi(tmp_path, script), tmp_path)
    assert found.fault == "npu-smi info: dcmi module initialize failed. ret is -8005" and found.npus == ()


def test_an_npu_smi_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr("llavanext_cli.machine.ascend.NPU_SMI_SECONDS", 0.2)
    found = find_ascend(fake_npu_smi(tmp_path, "exec sleep 30"), tmp_path)
    assert found.fault == "npu-smi info did not answer within 0.2 s"

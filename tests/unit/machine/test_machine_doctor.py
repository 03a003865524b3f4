"""The doctor's lines: right, worth a look, or wrong, each with its advice."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llavanext_cli.app import app
from llavanext_cli.config.presets import load_preset
from llavanext_cli.machine import doctor
from llavanext_cli.machine.ascend import Ascend, Npu
from llavanext_cli.machine.doctor import (
    DISK_GB,
    Diagnosis,
    Finding,
    check_ascend,
    check_disk,
    check_packages,
    load_version_map,
)

MAP = {
    "mf": {"1.9.0": {"support": ["2.9.0"]}, "1.8.0": {"support": ["2.7.2"]}},
    "ms": {"2.9.0": {"support": ["9.0.0"]}},
    "cann": {"9.0.0": {"support": ["26.0.RC1"]}},
}
NPUS = tuple(Npu(number, "910B2", "OK", 3000, 65536) for number in range(8))
WHOLE = Ascend(NPUS, "26.0.rc1", "7.8.0", "9.0.0", Path("/usr/local/Ascend/cann"), True)


def judge(ascend: Ascend, devices: int = 8) -> dict[str, Finding]:
    return {finding.name: finding for finding in check_ascend(ascend, "2.9.0", MAP, devices)}


def changed(**values) -> Ascend:
    return Ascend(**{**WHOLE.__dict__, **values})


def test_a_complete_machine_has_no_fault():
    lines = judge(WHOLE)
    assert {finding.state for finding in lines.values()} == {"ok"}
    assert lines["NPUs"].found == "8 x 910B2, 65536 MB each"


@pytest.mark.parametrize(
    ("values", "name", "state", "found", "advice"),
    [
        ({"npus": NPUS[:4]}, "NPUs", "fault", "4 x 910B2", "8 are needed"),
        ({"npus": ()}, "NPUs", "fault", "none found", "/dev/davinci"),
        ({"npus": (), "fault": "npu-smi info: ret is -8005"}, "NPUs", "fault", "-8005", "driver is loaded"),
        ({"npus": (*NPUS[:7], Npu(7, "910B2", "Alarm"))}, "NPU 7", "fault", "health Alarm", "-i 7"),
        ({"npus": (*NPUS[:7], Npu(7, "910B2", "OK", 40000, 65536))}, "NPU 7", "warning", "40000 of", "another job"),
        ({"driver": "25.5.0"}, "driver", "warning", "25.5.0", "26.0.RC1"),
        ({"driver": None}, "driver", "fault", "not found", "driver 26.0.RC1"),
        ({"firmware": None}, "firmware", "warning", "not found", "firmware"),
        ({"cann": "8.5.0"}, "CANN", "fault", "8.5.0", "needs CANN 9.0.0"),
        ({"cann": None}, "CANN", "warning", "unknown version", "CANN 9.0.0"),
        ({"cann_home": None, "cann": None}, "CANN", "fault", "not found", "set_env.sh"),
        ({"is_set_up": False}, "CANN", "fault", "not set up", "source /usr/local/Ascend/cann/set_env.sh"),
    ],
)
def test_a_fault_of_ascend(values, name, state, found, advice):
    line = judge(changed(**values))[name]
    assert line.state == state and found in line.found and advice in line.advice


def test_a_build_of_the_right_version_is_right():
    assert judge(changed(cann="9.0.0.B010"))["CANN"].state == "ok"
    assert judge(changed(cann="9.0.01"))["CANN"].state == "fault"


def test_packages_that_do_not_fit_each_other():
    lines = check_packages({"mindspore": "2.9.0", "mindformers": "1.8.0"}, MAP)
    assert [(line.name, line.state) for line in lines] == [
        ("mindspore", "ok"),
        ("mindformers", "warning"),
        ("match", "fault"),
    ]
    assert "mindspore==2.7.2" in lines[-1].advice
    assert check_packages({"mindspore": None, "mindformers": "1.9.0"}, MAP)[0].advice == "pip install mindspore==2.9.0"


def test_the_installed_table_knows_what_we_ask_for():
    assert doctor.supported(load_version_map(), "mf", doctor.WANTED["mindformers"]) == [doctor.WANTED["mindspore"]]


@pytest.mark.parametrize(
    ("version", "state"), [((3, 9), "fault"), ((3, 10), "ok"), ((3, 12), "ok"), ((3, 13), "fault")]
)
def test_python(version, state):
    assert doctor.check_python(version).state == state


def test_platform_and_disk(tmp_path):
    assert doctor.check_platform("Linux", "aarch64").state == "ok"
    assert doctor.check_platform("Linux", "riscv64").state == "fault"
    assert doctor.check_platform("Darwin", "arm64").state == "warning"
    states = {
        (task, size): check_disk(size * 10**9, tmp_path, task).state for task in DISK_GB for size in (1, 100, 1000)
    }
    assert [states["train", size] for size in (1, 100, 1000)] == ["warning", "warning", "ok"]
    assert [states["ask", size] for size in (1, 100, 1000)] == ["warning", "ok", "ok"]


def test_any_answer_of_the_hub_is_an_answer():
    class Forbidden(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Forbidden) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert doctor._check_hub({"HF_ENDPOINT": address}).state == "ok"
        server.shutdown()
    line = doctor._check_hub({"HF_ENDPOINT": "http://user:secret@127.0.0.1:9"})
    assert line.state == "warning" and "secret" not in line.found and "modelscope" in line.advice
    assert doctor._check_hub({"HF_ENDPOINT": "nonsense"}).state == "warning"


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """This Python on a machine without an NPU, whatever the one below has."""
    monkeypatch.setattr(doctor, "find_ascend", lambda environ, root: Ascend((), None, None, None, None, False))
    monkeypatch.setattr(doctor, "_check_loading", lambda environ: Finding("mindspore loads", "ok", "yes"))


def test_the_command_on_a_cpu(bare):
    done = CliRunner().invoke(app, ["doctor", "--offline", "--json"])
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert result["target"] == "CPU" and result["works"] and len(result["findings"]) >= 9
    lines = CliRunner().invoke(app, ["doctor", "--offline"])
    assert "✓ mindspore " in lines.stdout and lines.stderr == "Next: llavanext demo\n"


def test_the_command_for_a_preset_that_needs_eight_npus(bare):
    done = CliRunner().invoke(app, ["doctor", "--offline", "--preset", "video-7b-stage2"])
    assert done.exit_code == 3
    assert "✗ NPUs" in done.stdout and "✗ CANN" in done.stdout and "→ install" in done.stdout
    assert done.stderr.startswith("Error: training on this machine's NPUs will not work yet: NPUs, CANN, driver\n")


def test_a_preset_is_judged_by_its_target_and_devices(bare):
    diagnosis = doctor.run_doctor(load_preset("video-7b-stage2"), offline=True)
    assert isinstance(diagnosis, Diagnosis) and diagnosis.target == "Ascend" and not diagnosis.works
    assert doctor.run_doctor(load_preset("tiny-stage2"), offline=True).works


def test_mindspore_really_loads(monkeypatch):
    assert doctor._check_loading({"PATH": "/usr/bin"}).state == "ok"
    monkeypatch.setattr(doctor, "LOADS", "raise ImportError('libgomp.so.1: cannot open shared object file')")
    line = doctor._check_loading({"PATH": "/usr/bin"})
    assert line.state == "fault" and "libgomp.so.1" in line.found

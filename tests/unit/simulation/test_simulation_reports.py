"""What is said about a compile: where it was for, what a device holds, and MindSpore's reason."""

import pytest

from llavanext_cli.config.presets import load_preset
from llavanext_cli.errors import TrainingError
from llavanext_cli.simulation.simulate import CompileRequest, SimulationReport, Slice, explain, simulate


def report(fault: str = "", **slices: Slice) -> SimulationReport:
    named = {name.replace("__", "."): part for name, part in slices.items()}
    return SimulationReport(
        load_preset("video-7b-stage2"), True, fault, named, {"training step": 8.0}, 10**9, None, None
    )


def test_what_a_device_holds():
    trained, frozen = Slice((1024, 1024), "float32", True), Slice((1024, 1024), "bfloat16", False)
    moment = Slice((1024, 1024), "float32", False)
    found = report(projector__weight=trained, vision_tower__weight=frozen, adam_m__projector__weight=moment)
    mb = 1 << 20
    assert found.bytes == {"weights": 6 * mb, "gradients": 4 * mb, "optimizer": 4 * mb, "cache": 0}
    place = "8 Ascend devices (data 8 x tensor 1 x pipeline 1), 32 layers"
    assert found.describe().startswith(f"compiled in simulation for {place} in 8 s; a device holds weights ")
    summary = found.summary()
    assert summary["compiled"] and summary["cann_stubs"] and summary["devices"] == 8
    assert summary["bytes"] == found.bytes
    found.raise_fault()


def test_a_fault_names_preset_and_place():
    with pytest.raises(TrainingError, match="video-7b-stage2 does not compile for 8 Ascend devices") as fault:
        report("the shapes differ").raise_fault()
    assert fault.value.details == ("the shapes differ",)


def test_a_preset_that_answers_on_a_cpu_has_nothing_to_compile():
    assert "nothing to compile" in simulate(CompileRequest("tiny-ask")).describe()


def test_the_first_error_of_the_parallel_planner_is_the_cause():
    fault = "RuntimeError: operator Gather init failed\n\n----------\n- C++ Call Stack"
    log = (
        "[WARNING] PARALLEL(1,main):2026 [x.cc:1] Check] a warning\n"
        "[ERROR] PARALLEL(1,main):2026 [x.cc:2] Check] the strategies differ\n"
        "[ERROR] PARALLEL(1,main):2026 [x.cc:3] Check] a consequence\n"
    )
    assert explain(fault, log) == "RuntimeError: operator Gather init failed (the strategies differ)"
    assert explain(fault, "") == "RuntimeError: operator Gather init failed"

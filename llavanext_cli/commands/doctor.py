"""`llavanext doctor`: whether llavanext works on this machine, and what to fix."""

from __future__ import annotations

from typing import Annotated

import typer

from llavanext_cli import console, options
from llavanext_cli.errors import RuntimeMissingError

MARKS = {"ok": "✓", "warning": "!", "fault": "✗"}
PLAIN_MARKS = {"ok": "ok", "warning": "!", "fault": "x"}
"""For a terminal that cannot show the marks above."""


def doctor(
    preset: options.Preset = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not use the network.")] = False,
    json: options.Json = False,
) -> None:
    """Check Python, MindSpore, CANN, the driver, the NPUs, the disk and the network, and say what to fix.

    A line begins with ✓ (works), ! (check it) or ✗ (training will not work; the exit code is then 3).
    Without --preset it checks for this machine's NPUs, or for its CPU if there are none.

    Example:

      llavanext doctor --preset video-7b-stage2

    Next: llavanext demo shows that everything works together.
    """
    from llavanext_cli.config.presets import load_preset
    from llavanext_cli.machine.doctor import run_doctor

    diagnosis = run_doctor(load_preset(preset) if preset else None, offline=offline)
    marks, arrow = (MARKS, "→") if console.can_write("✓✗→") else (PLAIN_MARKS, "->")
    if json:
        console.out_json(diagnosis.to_dict())
    else:
        width = max(len(finding.name) for finding in diagnosis.findings)
        for finding in diagnosis.findings:
            console.out(f"{marks[finding.state]} {finding.name.ljust(width)}  {finding.found}")
            if finding.advice:
                console.out(f"  {' ' * width}  {arrow} {finding.advice}")
    faults = [finding.name for finding in diagnosis.findings if finding.state == "fault"]
    if faults:
        where = "NPUs" if diagnosis.target == "Ascend" else "CPU"
        raise RuntimeMissingError(
            f"training on this machine's {where} will not work yet: {', '.join(faults)}",
            hint=f"the lines marked {marks['fault']} say what to do; then run `llavanext doctor` again",
        )
    console.next_step("llavanext demo" if diagnosis.target == "CPU" else "llavanext presets list")

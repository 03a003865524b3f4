"""Two sides of a benchmark, each in its own process, that step in turns, so that other load slows both alike.

the benchmark   Side(command).receive()  ──▶ step() ──▶ step() ...      each returns what the side has sent last
a side          send({...})              ──▶ continues when `step` is called
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

MARK = "benchmark: "


def send(value: dict[str, Any], wait: bool = True) -> None:
    """Send a value to the benchmark, then wait for this side's next turn."""
    print(MARK + json.dumps(value), flush=True)
    if wait:
        sys.stdin.readline()


class Side:
    """One side, in its own process."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def receive(self) -> dict[str, Any]:
        """The next value that the side sends; other lines, which libraries write to stdout, are skipped."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise SystemExit(f"one side ended with code {self.process.wait()}")

    def step(self) -> dict[str, Any]:
        """Let the side take its turn; the value that it sends afterwards."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.receive()

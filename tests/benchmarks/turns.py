"""Two sides of a benchmark in processes of their own that step in turns: what else the machine does hits both alike.

the benchmark   Side(command).said()  ──▶ go() ──▶ go() ...      each gives what the side has told last
a side          tell({...}, wait=True)  ──▶ goes on when `go` is called
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

MARK = "benchmark: "


def tell(value: dict[str, Any], wait: bool = True) -> None:
    """Tell the benchmark something; wait for this side's next turn."""
    print(MARK + json.dumps(value), flush=True)
    if wait:
        sys.stdin.readline()


class Side:
    """One side in a process of its own, which goes on by a step when it is told to."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def said(self) -> dict[str, Any]:
        """What it tells next; what else the libraries write to stdout is passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise SystemExit(f"one side ended with code {self.process.wait()}")

    def go(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.said()

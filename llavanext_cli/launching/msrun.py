"""The machines (nodes) of a run, and the command and environment that start the workers of one of them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llavanext_cli.errors import ConfigError, RuntimeMissingError
from llavanext_cli.model.runtime import library_environment


@dataclass(frozen=True)
class Nodes:
    """The machines of a run: how many, which of them this is, where node 0 listens, how long they wait for all."""

    count: int = 1
    rank: int = 0
    master: tuple[str, int] | None = None
    timeout_seconds: int = 600

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            hint = f"--node-rank is 0 to {self.count - 1}" if self.count > 1 else "add --nodes N"
            raise ConfigError(f"node {self.rank} of {self.count} does not exist", hint=hint)
        if self.count == 1 and self.master is not None:
            raise ConfigError("--master is for several nodes", hint="add --nodes N")
        if self.count > 1 and self.master is None:
            raise ConfigError("--nodes needs --master", hint="add --master ADDRESS:PORT, where node 0 listens")

    def ranks(self, devices: int) -> range:
        """The ranks of this node's workers, of `devices` over all nodes."""
        local = devices // self.count
        return range(self.rank * local, (self.rank + 1) * local)


ONE_NODE = Nodes()


def parse_master(text: str) -> tuple[str, int]:
    """`10.0.0.1:8118` → address and port."""
    address, _, port = text.rpartition(":")
    if not address or ":" in address or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise ConfigError(f"--master {text}: not ADDRESS:PORT", hint="for example --master 10.0.0.1:8118 (IPv4)")
    return address, int(port)


def msrun_command(worker: Sequence[str], logs: Path, devices: int, nodes: Nodes = ONE_NODE) -> tuple[str, ...]:
    """The command that starts this machine's share of `devices` workers, and waits for them.

    Args:
        worker: script of one worker and its arguments.
        logs: folder for `worker_RANK.log` and `scheduler.log`.

    Raises:
        ConfigError: the port is taken.
        RuntimeMissingError: msrun is missing.
    """
    msrun = Path(sys.executable).with_name("msrun")
    if not msrun.is_file():
        raise RuntimeMissingError(
            f"msrun is missing beside {sys.executable}", hint="run `pip install mindspore==2.9.0`"
        )
    address, port = nodes.master or ("127.0.0.1", _free_port())
    if nodes.master and nodes.rank == 0:
        _check_port(address, port)
    return (
        str(msrun),
        f"--worker_num={devices}",
        f"--local_worker_num={devices // nodes.count}",
        f"--master_addr={address}",
        f"--master_port={port}",
        *([f"--node_rank={nodes.rank}"] if nodes.count > 1 else []),
        f"--cluster_time_out={nodes.timeout_seconds}",
        f"--log_dir={logs}",
        "--join=True",
        f"--tail_worker_log={devices}",  # a rank that does not exist: `tail` would outlive a killed msrun
        *worker,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _check_port(address: str, port: int) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as fault:
        raise ConfigError(
            f"node 0 cannot listen at {address}:{port}: {fault.strerror}",
            hint="give --master a free port of this machine, the same on all nodes",
        ) from fault


def worker_environment(libraries: Path, threads: int | None = None) -> dict[str, str]:
    """The environment of the workers. msrun starts `python` from PATH: ours must come first.

    Args:
        libraries: folder for what MindSpore and MindFormers write.
        threads: of each worker's CPU kernels; None when it computes on an NPU.
    """
    environment = os.environ | library_environment(libraries, verbose=True)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    package_root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH", "")]))
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment

"""Two machines: network namespaces joined by a virtual cable, which share the disk and nothing else."""

import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest

from tests.integration.test_train import COMMON, losses

STEPS = 6
SETTINGS = ["--devices", "2", "--set", f"train.steps={STEPS}", "--set", "train.batch_size=2"]
SETTINGS += ["--set", "train.log_every=1"]
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 8118


@pytest.fixture(scope="module")
def machines():
    """Names of two namespaces: each has its own addresses and ports, and sees the other."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed: no network namespaces")
    mark = uuid.uuid4().hex[:8]
    names, cables = [f"llava-{mark}-{rank}" for rank in (0, 1)], [f"lv{mark}{rank}" for rank in (0, 1)]
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"this user cannot make network namespaces: {made.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def start(data: Path, checkpoint: Path, out: Path, *more: object, inside: str | None = None) -> subprocess.Popen:
    words = ["train", "tiny-stage2", "--data", data, "--checkpoint", checkpoint, "--out", out, *COMMON, *SETTINGS]
    command = [sys.executable, "-m", "llavanext_cli", *map(str, [*words, *more])]
    place = ["ip", "netns", "exec", inside] if inside else []
    return subprocess.Popen([*place, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_nodes(machines, data, checkpoint, out, *more) -> list[subprocess.Popen]:
    master = f"{ADDRESSES[0]}:{PORT}"
    return [
        start(data, checkpoint, out, "--nodes", 2, "--node-rank", rank, "--master", master, *more, inside=name)
        for rank, name in enumerate(machines)
    ]


@pytest.mark.slow
def test_two_nodes_of_one_worker_equal_one_node_of_two(machines, data, tiny_checkpoint, tmp_path):
    nodes = start_nodes(machines, data, tiny_checkpoint, tmp_path / "two")
    talk = [node.communicate(timeout=400) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], talk
    one = start(data, tiny_checkpoint, tmp_path / "one")
    assert one.communicate(timeout=400) and one.returncode == 0
    assert len(losses(tmp_path / "two")) == STEPS
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-6)

"""Two machines: network namespaces joined by a virtual cable, which share the disk and nothing else."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from tests.integration.test_train import COMMON, losses

STEPS = 6
SETTINGS = ["--devices", "2", "--set", f"train.steps={STEPS}", "--set", "train.batch_size=2"]
SETTINGS += ["--set", "train.log_every=1"]
ADDRESSES = ("10.213.7.1", "10.213.7.2")
MASTER = f"{ADDRESSES[0]}:8118"


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
    return [
        start(data, checkpoint, out, "--nodes", 2, "--node-rank", rank, "--master", MASTER, *more, inside=name)
        for rank, name in enumerate(machines)
    ]


@pytest.mark.full
def test_two_nodes_of_one_worker_equal_one_node_of_two(machines, data, tiny_checkpoint, tmp_path):
    nodes = start_nodes(machines, data, tiny_checkpoint, tmp_path / "two")
    talk = [node.communicate(timeout=400) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], talk
    one = start(data, tiny_checkpoint, tmp_path / "one")
    assert one.communicate(timeout=400) and one.returncode == 0
    assert len(losses(tmp_path / "two")) == STEPS
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-6)


@pytest.mark.full
def test_a_node_that_never_comes_is_named(machines, data, tiny_checkpoint, tmp_path):
    words = ["--nodes", 2, "--node-rank", 0, "--master", MASTER, "--timeout", "0.25"]
    node = start(data, tiny_checkpoint, tmp_path / "run", *words, inside=machines[0])
    _, talk = node.communicate(timeout=120)
    assert node.returncode == 1, talk
    assert "Error: 1 of 2 nodes joined within 15 s: node 1 did not\nHint: " in talk


@pytest.mark.full
def test_a_node_that_dies_ends_the_other_and_both_go_on(machines, data, tiny_checkpoint, tmp_path):
    """A worker of the second node is killed; then Ctrl-C there lets the first save; --resume continues with both."""
    out, more = tmp_path / "run", ["--set", "train.steps=40", "--set", "train.save_every=4"]
    nodes = start_nodes(machines, data, tiny_checkpoint, out, *more)
    wait_for_step(out, 5, nodes)
    os.kill(int((out / "logs" / "worker_1.pid").read_text()), signal.SIGKILL)
    talk = [node.communicate(timeout=30)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], talk
    assert "node 1 ended: worker 1 was killed by SIGKILL" in talk[0]
    assert "worker 1 was killed by SIGKILL" in talk[1]
    assert (out / "checkpoints" / "step-00000004").is_dir()

    nodes = start_nodes(machines, data, tiny_checkpoint, out, *more, "--resume")
    wait_for_step(out, 20, nodes)
    nodes[1].send_signal(signal.SIGINT)
    talk = [node.communicate(timeout=30)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [1, 130], talk
    (newest,) = sorted((out / "checkpoints").glob("step-*"))[-1:]
    assert int(newest.name[5:]) >= 20, talk

    nodes = start_nodes(machines, data, tiny_checkpoint, out, *more, "--resume")
    talk = [node.communicate(timeout=400)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], talk
    assert f"resuming after step {int(newest.name[5:])} of 40" in talk[0]
    assert len(losses(out)) == 40

    one = start(data, tiny_checkpoint, tmp_path / "one", *more)
    assert one.communicate(timeout=400) and one.returncode == 0
    np.testing.assert_allclose(losses(out), losses(tmp_path / "one"), rtol=1e-6)


def wait_for_step(out: Path, step: int, nodes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and all(node.poll() is None for node in nodes):
        if (out / "metrics.jsonl").is_file() and len(losses(out)) >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached: {[node.kill() or node.communicate()[1] for node in nodes]}")

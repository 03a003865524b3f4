"""How fast `llavanext fetch` is beside curl, and how much memory it takes: one file over loopback, verified.

    python tests/benchmarks/bench_fetch.py                1 GB, five rounds: about a minute
    python tests/benchmarks/bench_fetch.py --size 200     MB

A server in a process of its own sends with sendfile. In each round curl, curl followed by openssl's sha256, fetch from
a plain address and fetch from a Hub take turns, so that what else the machine does hits all alike. curl alone checks
nothing; fetch computes the sha256 of every byte within its time. All are timed from outside, from the start of the
process to its end. The speed is of that whole time, the median of all rounds; for fetch it is also given without the
start-up, which is what the same command takes for a file of one byte. Exit code 1 when that is below 0.7 of curl's, or
the memory above 150 MB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import socketserver
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LEAST_RATIO = 0.7
MOST_MEMORY = 150
COMMIT = "0123456789012345678901234567890123456789"


class Handler(socketserver.StreamRequestHandler):
    """Just enough of a file server and of a Hub for one file, without a copy in this process."""

    def handle(self) -> None:
        while self.one():
            pass

    def one(self) -> bool:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.rfile.readline()
            if not line:
                return False
            head += line
        method, path, _ = head.decode("latin1").split(" ", 2)
        server = self.server
        host = f"http://127.0.0.1:{server.server_address[1]}"
        name = "tiny" if "tiny" in path else "file"
        served = server.served[name]
        lfs = f'Location: {host}/cdn/{name}\r\nX-Linked-Size: {served.size}\r\nX-Linked-ETag: "{served.sha256}"\r\n'
        if path.startswith(f"/api/models/org/{name}/tree"):
            self.send_json([
                {"type": "file", "path": "file.bin", "size": served.size, "oid": "0" * 40,
                 "lfs": {"oid": served.sha256, "size": served.size, "pointerSize": 134}}
            ])  # fmt: skip
        elif path.startswith("/api/models/org/"):
            self.send_json({"id": f"org/{name}", "modelId": f"org/{name}", "sha": COMMIT, "siblings": []})
        elif path.startswith(f"/org/{name}/resolve"):
            self.send("302 Found", f"{lfs}X-Repo-Commit: {COMMIT}\r\nContent-Length: 0\r\n")
        else:
            asked = re.search(rb"(?i)range: bytes=(\d+)-(\d*)", head)
            start = int(asked[1]) if asked else 0
            end = int(asked[2]) + 1 if asked and asked[2] else served.size
            part = f"Content-Range: bytes {start}-{end - 1}/{served.size}\r\n" if asked else ""
            self.send("206 Partial" if asked else "200 OK", f'{part}ETag: "1"\r\nContent-Length: {end - start}\r\n')
            try:
                with open(served.path, "rb") as file:
                    while method == "GET" and start < end:
                        start += os.sendfile(self.connection.fileno(), file.fileno(), start, min(end - start, 1 << 22))
            except OSError:
                return False
        return True

    def send(self, status: str, headers: str, body: bytes = b"") -> None:
        self.wfile.write(f"HTTP/1.1 {status}\r\n{headers}\r\n".encode() + body)

    def send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send("200 OK", f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n", body)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


@dataclass(frozen=True)
class Served:
    path: Path
    size: int
    sha256: str


def make_file(path: Path, blocks: int, block: int) -> Served:
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for _ in range(blocks):
            content = os.urandom(block)
            digest.update(content)
            file.write(content)
    return Served(path, blocks * block, digest.hexdigest())


def run_curl(url: str, folder: Path) -> tuple[float, int]:
    started = time.perf_counter()
    subprocess.run(["curl", "-s", "-f", "-o", str(folder / "curl.bin"), url], check=True)
    return time.perf_counter() - started, 0


def run_curl_and_openssl(url: str, folder: Path) -> tuple[float, int]:
    started = time.perf_counter()
    run_curl(url, folder)
    subprocess.run(["openssl", "dgst", "-sha256", str(folder / "curl.bin")], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started, 0


def run_fetch(name: str, folder: Path, endpoint: str) -> tuple[float, int]:
    """(seconds, MB of resident memory at the most) of the whole process, from its start to its end."""
    command = [sys.executable, "-m", "llavanext_cli", "fetch", name, "--to", str(folder / "to"), "--json"]
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling this package is not part of fetching
    log = folder / "log"
    started = time.perf_counter()
    with open(log, "wb") as talk:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=talk)
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"fetch failed: {log.read_text()}")
    assert json.loads(output)["fetched"] == 1
    return seconds, usage.ru_maxrss // 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1000, help="MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        served = {
            "file": make_file(root / "file.bin", options.size, 1_000_000),
            "tiny": make_file(root / "tiny.bin", 1, 1),
        }
        with Server(("127.0.0.1", 0), Handler) as server:
            server.served = served
            process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
            process.start()
            try:
                endpoint = f"http://127.0.0.1:{server.server_address[1]}"
                return compare(root, endpoint, served, options.size, options.rounds)
            finally:
                process.kill()


def compare(root: Path, endpoint: str, served: dict[str, Served], size: int, rounds: int) -> int:
    def fetch_url(name: str) -> Callable[[Path], tuple[float, int]]:
        return lambda folder: run_fetch(f"{endpoint}/{name}.bin#sha256={served[name].sha256}", folder, endpoint)

    def fetch_hub(name: str) -> Callable[[Path], tuple[float, int]]:
        return lambda folder: run_fetch(f"org/{name}", folder, endpoint)

    runners = {
        "curl": lambda folder: run_curl(f"{endpoint}/file.bin", folder),
        "curl, openssl": lambda folder: run_curl_and_openssl(f"{endpoint}/file.bin", folder),
        "fetch URL": fetch_url("file"),
        "fetch Hub": fetch_hub("file"),
        "fetch URL, 1 byte": fetch_url("tiny"),
        "fetch Hub, 1 byte": fetch_hub("tiny"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    memory = dict.fromkeys(runners, 0)
    for _ in range(rounds):
        for name, run in runners.items():
            folder = root / "work"
            folder.mkdir()
            os.sync()
            taken, peak = run(folder)
            seconds[name].append(taken)
            memory[name] = max(memory[name], peak)
            shutil.rmtree(folder)
            time.sleep(0.2)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    good = True
    print(f"{'':19}{'MB/s (median)':>14}{'of curl':>9}{'without start':>15}{'memory MB':>11}    all rounds, s")
    for name in runners:
        rounded = "  ".join(f"{value:.2f}" for value in seconds[name])
        if "1 byte" in name:
            print(f"{name:68}    {rounded}")
            continue
        ratio = median["curl"] / median[name]
        start = median.get(f"{name}, 1 byte")
        shown = ""
        if start:
            without = median["curl"] / (median[name] - start)
            shown = f"{without:.2f}"
            good &= without >= LEAST_RATIO and memory[name] < MOST_MEMORY
        print(f"{name:19}{size / median[name]:14.0f}{ratio:9.2f}{shown:>15}{memory[name] or '-':>11}    {rounded}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

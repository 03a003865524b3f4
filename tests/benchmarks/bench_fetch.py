"""How fast `llavanext fetch` is beside curl, and how much memory it takes: one file over loopback, verified.

    python tests/benchmarks/bench_fetch.py                1 GB, three rounds: about a minute
    python tests/benchmarks/bench_fetch.py --size 200     MB

A server in a process of its own sends with sendfile. In each round curl, fetch from a plain address and fetch from a
Hub take turns, so that what else the machine does hits all three alike. curl checks nothing; fetch computes the sha256
of every byte within its time. Both are timed from outside, from the start of the process to its end. Exit
code 1 when the best round of either is below 0.7 of curl's best, or above 150 MB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import tempfile
import time
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
        lfs = f'Location: {host}/cdn/file\r\nX-Linked-Size: {server.size}\r\nX-Linked-ETag: "{server.sha256}"\r\n'
        if path.startswith("/api/models/org/model/tree"):
            self.send_json([
                {"type": "file", "path": "file.bin", "size": server.size, "oid": "0" * 40,
                 "lfs": {"oid": server.sha256, "size": server.size, "pointerSize": 134}}
            ])  # fmt: skip
        elif path.startswith("/api/models/org/model"):
            self.send_json({"id": "org/model", "modelId": "org/model", "sha": COMMIT, "siblings": []})
        elif path.startswith("/org/model/resolve"):
            self.send("302 Found", f"{lfs}X-Repo-Commit: {COMMIT}\r\nContent-Length: 0\r\n")
        else:
            asked = re.search(rb"(?i)range: bytes=(\d+)-(\d*)", head)
            start = int(asked[1]) if asked else 0
            end = int(asked[2]) + 1 if asked and asked[2] else server.size
            part = f"Content-Range: bytes {start}-{end - 1}/{server.size}\r\n" if asked else ""
            self.send("206 Partial" if asked else "200 OK", f'{part}ETag: "1"\r\nContent-Length: {end - start}\r\n')
            try:
                with open(server.path, "rb") as file:
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


def serve(path: Path, sha256: str) -> None:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.path, server.size, server.sha256 = path, path.stat().st_size, sha256
        print(server.server_address[1], flush=True)
        server.serve_forever()


def make_file(path: Path, megabytes: int) -> str:
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for _ in range(megabytes):
            block = os.urandom(1_000_000)
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def run_curl(url: str, folder: Path) -> tuple[float, int]:
    started = time.perf_counter()
    subprocess.run(["curl", "-s", "-f", "-o", str(folder / "curl.bin"), url], check=True)
    return time.perf_counter() - started, 0


def run_fetch(name: str, folder: Path, endpoint: str) -> tuple[float, int]:
    """(seconds, MB of resident memory at the most) of the whole process, from its start to its end."""
    command = [sys.executable, "-m", "llavanext_cli", "fetch", name, "--to", str(folder / "to"), "--json"]
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf")}
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        sha256 = make_file(root / "served.bin", options.size)
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(root / "served.bin"), sha256], stdout=subprocess.PIPE, text=True
        )
        try:
            endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
            return compare(root, endpoint, sha256, options.size, options.rounds)
        finally:
            server.kill()
            server.wait()


def compare(root: Path, endpoint: str, sha256: str, size: int, rounds: int) -> int:
    runners = {
        "curl": lambda folder: run_curl(f"{endpoint}/file.bin", folder),
        "fetch URL": lambda folder: run_fetch(f"{endpoint}/file.bin#sha256={sha256}", folder, endpoint),
        "fetch Hub": lambda folder: run_fetch("org/model", folder, endpoint),
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
    best = {name: size / min(values) for name, values in seconds.items()}
    print(f"{'':12}{'MB/s (best)':>14}{'of curl':>10}{'memory MB':>12}    all rounds, s")
    for name in runners:
        rounded = "  ".join(f"{value:.2f}" for value in seconds[name])
        ratio = best[name] / best["curl"]
        print(f"{name:12}{best[name]:14.0f}{ratio:10.2f}{memory[name] or '-':>12}    {rounded}")
    good = all(best[name] >= LEAST_RATIO * best["curl"] and memory[name] < MOST_MEMORY for name in list(runners)[1:])
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), sys.argv[3])
    else:
        raise SystemExit(main())

"""How fast `llavanext fetch` is: a file over loopback, every byte's sha256 compared, processes timed from start to end.

    python tests/benchmarks/bench_fetch.py                1 GB, five rounds: about a minute
    python tests/benchmarks/bench_fetch.py --size 200     MB

    from a Hub             against `hf download` and then sha256sum     at most 1.15 times as long
    from a plain address   against `curl` and then sha256sum            at most 1.3 times as long

A server in a process of its own sends with sendfile. In each round all four take turns, so that what else the machine
does slows all alike; a ratio is the median of the rounds' ratios. Exit code 1 when one is above its bound.
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
from dataclasses import dataclass
from pathlib import Path

BOUNDS = {"fetch Hub": ("hf + sha256sum", 1.15), "fetch URL": ("curl + sha256sum", 1.3)}
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
        served = server.served
        lfs = f'Location: {host}/cdn\r\nX-Linked-Size: {served.size}\r\nX-Linked-ETag: "{served.sha256}"\r\n'
        if path.startswith("/api/models/org/file/tree"):
            self.send_json([
                {"type": "file", "path": "file.bin", "size": served.size, "oid": "0" * 40,
                 "lfs": {"oid": served.sha256, "size": served.size, "pointerSize": 134}}
            ])  # fmt: skip
        elif path.startswith("/api/models/org/"):
            siblings = [{"rfilename": "file.bin"}]
            self.send_json({"id": "org/file", "modelId": "org/file", "sha": COMMIT, "siblings": siblings})
        elif path.startswith("/org/file/resolve"):
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


def run(commands: list[list[str]], environment: dict[str, str]) -> float:
    """Seconds from the start of the first command to the end of the last."""
    started = time.perf_counter()
    for command in commands:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{command[0]} failed: {done.stderr}")
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1000, help="MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        served = make_file(root / "file.bin", options.size, 1_000_000)
        with Server(("127.0.0.1", 0), Handler) as server:
            server.served = served
            process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
            process.start()
            try:
                return compare(root, f"http://127.0.0.1:{server.server_address[1]}", served, options.rounds)
            finally:
                process.kill()


def compare(root: Path, endpoint: str, served: Served, rounds: int) -> int:
    work = root / "work"
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(work / "hf")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling this package is not part of fetching
    file, to = str(work / "file.bin"), str(work)
    fetch = [sys.executable, "-m", "llavanext_cli", "fetch"]
    hf = str(Path(sys.executable).with_name("hf"))
    sides = {
        "curl + sha256sum": [["curl", "-s", "-f", "-o", file, f"{endpoint}/file.bin"], ["sha256sum", file]],
        "fetch URL": [[*fetch, f"{endpoint}/file.bin#sha256={served.sha256}", "--to", to]],
        "hf + sha256sum": [[hf, "download", "org/file", "--local-dir", to], ["sha256sum", file]],
        "fetch Hub": [[*fetch, "org/file", "--to", to]],
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, commands in sides.items():
            work.mkdir()
            os.sync()
            seconds[name].append(run(commands, environment))
            assert Path(file).stat().st_size == served.size
            shutil.rmtree(work)
    for name, values in seconds.items():
        print(f"{name:18}{statistics.median(values):6.2f} s    {'  '.join(f'{value:.2f}' for value in values)}")
    good = True
    for name, (other, bound) in BOUNDS.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))
        print(f"{name} takes {ratio:.2f} times as long as {other} (at most {bound})")
        good &= ratio <= bound
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

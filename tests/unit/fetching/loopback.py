"""Real HTTP servers on loopback: a plain file server that can misbehave, a Hub, a ModelScope; and what came of them.

    with FileSite({"/a.bin": b"..."}) as site:  site.url("/a.bin");  site.sent["/a.bin"]  (bytes of bodies)
    with HubSite() as hub:  hub.add("org/name", {"config.json": b"{}"});  hub.endpoint

Every server ends with its `with` block, and every wait in it is bounded.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

LONGEST_WAIT = 20.0


@dataclass
class Manners:
    """How one path is served; the defaults are a good server's.

    Attributes:
        ranges: honour Range.
        cut_every: close the connection after that many bytes of each body.
        cut_once_at: likewise, but only for the first body that is longer.
        announce: add this to the Content-Length that is announced.
        stall_at: send so many bytes of the first body that is longer, then nothing.
        rate: bytes a second.
        statuses: answered one after another instead of the file, then the file; a status or (status, headers).
        redirect: answer 302 to this address.
        etag: sent as it is; None sends one made of the content, "" sends none.
        page: say that it is a web page.
    """

    ranges: bool = True
    cut_every: int | None = None
    cut_once_at: int | None = None
    announce: int = 0
    stall_at: int | None = None
    rate: float | None = None
    statuses: list = field(default_factory=list)
    redirect: str | None = None
    etag: str | None = None
    page: bool = False


class Site:
    """A server in a thread. Subclasses answer in `reply(handler)`."""

    def __init__(self):
        self.log: list[tuple[str, str, str]] = []
        """(method, path with query, Range)"""
        self.headers_seen: list[tuple[str, dict[str, str]]] = []
        self.sent: Counter[str] = Counter()
        """path → bytes of bodies"""
        self.lock = threading.Lock()
        self.closing = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                with site.lock:
                    site.log.append((self.command, self.path, self.headers.get("Range", "")))
                    site.headers_seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                try:
                    site.reply(self)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request, client_address):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return self.endpoint + path

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def reply(self, handler: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------- answers

    def answer(self, handler, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        handler.send_response(status)
        for key, value in (headers or {}).items():
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    def answer_json(self, handler, value, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.answer(handler, status, body, {"Content-Type": "application/json", **(headers or {})})

    def serve(self, handler, content: bytes, manners: Manners, headers: Mapping[str, str] | None = None) -> None:
        """A file, with the manners asked for."""
        path = handler.path.partition("?")[0]
        if manners.statuses:
            status = manners.statuses.pop(0)
            status, extra = status if isinstance(status, tuple) else (status, {})
            self.answer(handler, status, b"not now", extra)
            return
        if manners.redirect is not None:
            self.answer(handler, 302, b"", {"Location": manners.redirect})
            return
        etag = f'"{hashlib.md5(content).hexdigest()}"' if manners.etag is None else manners.etag
        start, end, status, out = 0, len(content) - 1, 200, {}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        unchanged = handler.headers.get("If-Range", etag) == etag
        if manners.ranges and asked and unchanged:
            start, status = int(asked[1]), 206
            if start >= len(content):
                self.answer(handler, 416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            end = min(int(asked[2] or len(content)), len(content) - 1)
            out["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        body = content[start : end + 1]
        out |= {"ETag": etag} if etag else {}
        out |= {"Content-Type": "text/html; charset=utf-8"} if manners.page else {}
        handler.send_response(status)
        for key, value in {**out, **(headers or {}), "Content-Length": str(len(body) + manners.announce)}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command != "HEAD":
            self._send_body(handler, path, body, manners)

    def _send_body(self, handler, path: str, body: bytes, manners: Manners) -> None:
        stop_at = min(len(body), manners.cut_every or len(body))
        if manners.cut_once_at is not None and len(body) > manners.cut_once_at:
            stop_at, manners.cut_once_at = manners.cut_once_at, None
        stalls = manners.stall_at is not None and len(body) > manners.stall_at
        if stalls:
            stop_at, manners.stall_at = manners.stall_at, None
        step = 1 << 16 if manners.rate is None else max(1, min(1 << 14, int(manners.rate / 20)))
        position = 0
        while position < stop_at and not self.closing.is_set():
            block = body[position : min(position + step, stop_at)]
            handler.wfile.write(block)
            position += len(block)
            with self.lock:
                self.sent[path] += len(block)
            if manners.rate is not None:
                time.sleep(len(block) / manners.rate)
        if stalls:
            self.closing.wait(LONGEST_WAIT)
        if position != len(body) or manners.announce:
            handler.close_connection = True
            handler.connection.close()


class FileSite(Site):
    """Plain files. `manners[path]` may be changed at any time."""

    def __init__(self, files: Mapping[str, bytes], manners: Mapping[str, Manners] | None = None):
        super().__init__()
        self.files = dict(files)
        self.manners = dict(manners or {})

    def reply(self, handler) -> None:
        path = unquote(urlsplit(handler.path).path)
        manners = self.manners.get(path, Manners())
        if path not in self.files and manners.redirect is None and not manners.statuses:
            self.answer(handler, 404, b"no such file")
            return
        self.serve(handler, self.files.get(path, b""), manners)


@dataclass
class Repository:
    """One repository of a HubSite: its branches point to commits, its commits to files."""

    kind: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str = ""


class HubSite(Site):
    """What huggingface_hub asks of a Hub: info, tree with pages, files; large ones from a CDN if it has one."""

    LFS_FROM = 10_000
    PAGE = 3

    def __init__(self, cdn: FileSite | None = None):
        super().__init__()
        self.cdn = cdn
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.manners: dict[str, Manners] = {}
        """path in a repository → how its content is served"""
        self.status: list = []
        """statuses answered to any request before it is looked at"""
        self.signature = "X-Amz-Signature=secretsignature0123456789"

    def add(self, name: str, files: Mapping[str, bytes], kind: str = "model", branch: str = "main", **more) -> str:
        """Commit files to a branch; returns the commit."""
        repository = self.repositories.setdefault((kind, name), Repository(kind, **more))
        digest = hashlib.sha1(repr(sorted((path, hashlib.sha256(b).hexdigest()) for path, b in files.items())).encode())
        commit = digest.hexdigest()
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        return commit

    def reply(self, handler) -> None:
        if self.status:
            status = self.status.pop(0)
            status, extra = status if isinstance(status, tuple) else (status, {})
            self.answer(handler, status, b"not now", extra)
            return
        parts = urlsplit(handler.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree)(?:/(.*))?)?", path):
            kind, name, what, rest = match[1], match[2], match[3], match[4] or ""
            if (repository := self._open(handler, kind, name)) is None:
                return
            revision, _, folder = rest.partition("/")
            self._reply_api(handler, repository, name, what, revision or "main", folder, query)
            return
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind = "dataset" if match[1] else "model"
            if (repository := self._open(handler, kind, match[2])) is not None:
                self._reply_file(handler, repository, match[3], match[4])
            return
        self.answer(handler, 404, b"no such page")

    def _open(self, handler, kind: str, name: str) -> Repository | None:
        repository = self.repositories.get((kind, name))
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None or (repository.token and not repository.gated and token != repository.token):
            # As the Hub does: 401 for what is not there when nobody is logged in.
            status = 404 if token else 401
            self.answer_json(handler, {"error": "Repository not found"}, status, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def _reply_api(self, handler, repository, name, what, revision, folder, query) -> None:
        commit = repository.branches.get(revision, revision)
        files = repository.commits.get(commit)
        if files is None:
            self.answer_json(handler, {"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        if what != "tree":
            siblings = [{"rfilename": path} for path in files]
            self.answer_json(handler, {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []})
            return
        entries = []
        if folder and not any(path.startswith(folder + "/") for path in files):
            self.answer_json(handler, {"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        for path, content in sorted(files.items()):
            if folder and not path.startswith(folder + "/"):
                continue
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
            if len(content) >= self.LFS_FROM:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        folders = {path.rpartition("/")[0] for path in files if "/" in path}
        entries += [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
        at = int(query.get("cursor", ["0"])[0])
        headers = {}
        if at + self.PAGE < len(entries):
            target = f"{self.endpoint}{quote(urlsplit(handler.path).path)}?recursive=True&cursor={at + self.PAGE}"
            headers["Link"] = f'<{target}>; rel="next"'
        self.answer_json(handler, entries[at : at + self.PAGE], headers=headers)

    def _reply_file(self, handler, repository, revision: str, path: str) -> None:
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository.gated and (not token or token != repository.token):
            status = 403 if token else 401
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}
            self.answer_json(handler, {"error": "gated"}, status, headers)
            return
        commit = repository.branches.get(revision, revision)
        content = repository.commits.get(commit, {}).get(path)
        if content is None:
            self.answer_json(handler, {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": commit}
        etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if len(content) >= self.LFS_FROM:
            etag = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{etag}"'}
            if self.cdn is not None:
                self.cdn.files[f"/cdn/{etag}"] = content
                location = f"{self.cdn.endpoint}/cdn/{etag}?{self.signature}"
                self.answer(handler, 302, b"", headers | {"Location": location})
                return
        manners = self.manners.get(path) or Manners()
        manners.etag = f'"{etag}"'
        self.serve(handler, content, manners, headers)

    def content_sent(self) -> int:
        """Bytes of file contents that left this server."""
        return sum(self.sent.values()) + (sum(self.cdn.sent.values()) if self.cdn is not None else 0)


class ModelScopeSite(Site):
    """ModelScope's plain HTTP API, for models and data sets."""

    def __init__(self):
        super().__init__()
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.manners: dict[str, Manners] = {}
        self.digests = True

    def add(self, name: str, files: Mapping[str, bytes], kind: str = "model") -> None:
        self.repositories[kind, name] = dict(files)

    def reply(self, handler) -> None:
        parts = urlsplit(handler.path)
        path, query = unquote(parts.path), {k: v[0] for k, v in parse_qs(parts.query).items()}
        names = list(self.repositories)
        if match := re.fullmatch(r"/api/v1/datasets/(\d+)/repo/tree", path):
            files = self.repositories[names[int(match[1])]]
            page, size = int(query["PageNumber"]), int(query["PageSize"])
            entries = self._entries(files)[(page - 1) * size : page * size]
            self.answer_json(handler, {"Code": 200, "Data": {"Files": entries}, "Success": True})
        elif match := re.fullmatch(r"/api/v1/(model|dataset)s/([^/]+/[^/]+)(/repo/files|/repo)?", path):
            key = (match[1], match[2])
            if key not in self.repositories:
                self.answer_json(handler, {"Code": 10010205001, "Message": "not found", "Success": False}, 404)
            elif match[3] == "/repo":
                content = self.repositories[key].get(query["FilePath"])
                if content is None:
                    self.answer_json(handler, {"Code": 404, "Message": "no such file"}, 404)
                else:
                    self.serve(handler, content, self.manners.get(query["FilePath"]) or Manners())
            elif match[1] == "dataset":
                self.answer_json(handler, {"Code": 200, "Data": {"Id": names.index(key), "Type": 4}, "Success": True})
            else:
                self.answer_json(handler, {"Code": 200, "Data": {"Files": self._entries(self.repositories[key])}})
        else:
            self.answer(handler, 404, b"no such page")

    def _entries(self, files: Mapping[str, bytes]) -> list[dict]:
        entries = [{"Path": p, "Name": p.rpartition("/")[2], "Type": "tree", "Size": 0} for p in _folders(files)]
        for path, content in sorted(files.items()):
            entry = {"Path": path, "Name": path.rpartition("/")[2], "Type": "blob", "Size": len(content)}
            if self.digests:
                entry["Sha256"] = hashlib.sha256(content).hexdigest()
            entries.append(entry)
        return entries


def _folders(files: Mapping[str, bytes]) -> list[str]:
    return sorted({path.rpartition("/")[0] for path in files if "/" in path})


class ProxySite(Site):
    """A forward proxy for plain http: fetches what it is asked for, or answers from `pages` (address → answer)."""

    def __init__(self, pages: Mapping[str, Callable]):
        super().__init__()
        self.pages = dict(pages)

    def reply(self, handler) -> None:
        address = handler.path.partition("?")[0]
        page = self.pages.get(address)
        if page is None:
            self.answer(handler, 404, b"not behind this proxy")
        else:
            page(self, handler)


def content(size: int, seed: int = 0) -> bytes:
    """Bytes that don't compress and don't repeat."""
    return random.Random(f"{size} {seed}").randbytes(size)


def files(folder: Path) -> dict[str, bytes]:
    """What a user finds in a folder: path → content, without fetch's own files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".llavanext" not in path.parts
    }


def flip(path: Path) -> None:
    """Change one bit in the middle, and keep the size and the time."""
    data, times = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

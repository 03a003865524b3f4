"""`llavanext fetch` as a user runs it: processes of their own against real servers on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.unit.fetching.loopback import FileSite, HubSite, Manners, ModelScopeSite, content, files, flip

BIG = content(4_000_000, 1)
SECOND = content(2_000_000, 2)
MODEL = {
    "config.json": b'{"model_type": "llava_next_video"}',
    "model-00001-of-00002.safetensors": BIG,
    "model-00002-of-00002.safetensors": SECOND,
    "model.safetensors.index.json": b"{}",
    "tokenizer.model": content(50_000, 3),
    "README.md": b"not wanted",
}
VIDEO_7B = {path: data for path, data in MODEL.items() if path != "README.md"}
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def hub():
    with FileSite({}) as cdn, HubSite(cdn) as site:
        site.add("llava-hf/LLaVA-NeXT-Video-7B-hf", MODEL)
        yield site


@pytest.fixture
def environment(tmp_path, hub):
    """The user's, without their network, tokens and caches."""
    dropped = ("PROXY", "HF_", "HUGGING", "MODELSCOPE")
    kept = {k: v for k, v in os.environ.items() if not any(word in k.upper() for word in dropped)}
    home = tmp_path / "home"
    home.mkdir()
    return kept | {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub.endpoint, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def llavanext(environment):
    """Run a command to its end, or with `wait=False` start it."""
    started = []

    def run(*words, wait: bool = True, **variables):
        command = [sys.executable, "-m", "llavanext_cli", *map(str, words)]
        process = subprocess.Popen(
            command,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        if not wait:
            return process
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def cdn_path(data: bytes) -> str:
    return f"/cdn/{hashlib.sha256(data).hexdigest()}"


def the_error(done, code: int = 1) -> str:
    """The one line of an error with a hint, checked for its form."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    hints = [line for line in done.stderr.splitlines() if line.startswith("Hint: ")]
    assert len(errors) == 1 and len(hints) == 1, done.stderr
    return errors[0] + "\n" + hints[0]


# ------------------------------------------------------------------------------------------------------- the long way


def test_cold_warm_flipped_and_repaired(llavanext, hub, tmp_path):
    to = tmp_path / "models" / "video-7b"
    cold = llavanext("fetch", "video-7b", "--to", to)
    assert cold.returncode == 0, cold.stderr
    assert files(to) == VIDEO_7B and cold.stdout == ""
    assert hub.content_sent() == sum(map(len, VIDEO_7B.values()))
    assert f"Next: llavanext convert {to} {to}-mindspore" in cold.stderr.splitlines()

    sent = hub.content_sent()
    warm = llavanext("fetch", "video-7b", "--to", to)
    assert warm.returncode == 0 and hub.content_sent() == sent
    assert f"0 files fetched (0 B), 5 already there: {to}" in warm.stderr

    flip(to / "model-00002-of-00002.safetensors")
    found = llavanext("fetch", "--check", to, "--dry-run")
    assert "broken or missing files: 1" in the_error(found)
    assert "model-00002-of-00002.safetensors: sha256" in found.stderr
    assert hub.content_sent() == sent
    repaired = llavanext("fetch", "--check", to)
    assert repaired.returncode == 0 and "5 files read, 1 of them broken and now repaired (2 MB" in repaired.stderr
    assert files(to) == VIDEO_7B and hub.content_sent() - sent == len(SECOND)

    asked = len(hub.log)
    assert "5 files read (6.05 MB): all are intact." in llavanext("fetch", "--check", to).stderr
    assert len(hub.log) == asked


@pytest.mark.parametrize("kind", ["hub", "web"])
def test_killed_half_way_only_the_rest_is_transferred(llavanext, tmp_path, kind):
    data = content(24_000_000, 4)  # huggingface_hub writes pieces of 10 MB
    digest = hashlib.sha256(data).hexdigest()
    with FileSite({"/big.bin": data}) as cdn, HubSite(cdn) as hub:
        hub.add("org/big", {"big.bin": data})
        path = f"/cdn/{digest}" if kind == "hub" else "/big.bin"
        name = "org/big" if kind == "hub" else f"{cdn.url(path)}#sha256={digest}"
        words = ("fetch", name, "--to", tmp_path / "to", "--endpoint", hub.endpoint)
        cdn.manners[path] = Manners(rate=10_000_000)
        process = llavanext(*words, wait=False)
        wait_for(lambda: cdn.sent[path] > 18_000_000)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -9 and files(tmp_path / "to") == {}
        time.sleep(0.3)
        before = cdn.sent[path]
        assert before < len(data)
        cdn.manners[path] = Manners()
        done = llavanext(*words)
        assert done.returncode == 0, done.stderr
        assert files(tmp_path / "to") == {"big.bin": data} and cdn.sent[path] - before <= len(data) - 10_000_000


def test_two_processes_at_once(llavanext, hub, tmp_path):
    hub.cdn.manners[cdn_path(BIG)] = Manners(rate=1_000_000)
    first = llavanext("fetch", "video-7b", "--to", tmp_path / "to", wait=False)
    wait_for(lambda: hub.cdn.sent[cdn_path(BIG)] > 100_000)
    error = the_error(llavanext("fetch", "video-7b", "--to", tmp_path / "to"))
    assert "is in use by another llavanext command" in error and "wait until that has ended" in error
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert "5 already there" in llavanext("fetch", "video-7b", "--to", tmp_path / "to").stderr
    assert files(tmp_path / "to") == VIDEO_7B and hub.content_sent() == sum(map(len, VIDEO_7B.values()))


@pytest.mark.parametrize("kind", ["hub", "web"])
def test_ctrl_c(llavanext, hub, tmp_path, kind):
    with FileSite({"/big.bin": BIG}, {"/big.bin": Manners(rate=250_000)}) as site:
        hub.cdn.manners[cdn_path(BIG)] = Manners(rate=250_000)
        name = ("video-7b", "--only", "model-00001*") if kind == "hub" else (site.url("/big.bin"),)
        serving = hub.cdn if kind == "hub" else site
        process = llavanext("fetch", *name, "--to", tmp_path / "to", wait=False)
        wait_for(lambda: serving.sent.total() > 600_000)
        os.killpg(process.pid, signal.SIGINT)
        started = time.monotonic()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130, err
        assert time.monotonic() - started < 8 and "Traceback" not in err
        assert "What has arrived is kept" in err and "Interrupted." in err
        time.sleep(0.3)
        for manners in (*hub.cdn.manners.values(), *site.manners.values()):
            manners.rate = None
        done = llavanext("fetch", *name, "--to", tmp_path / "to")
        assert done.returncode == 0, done.stderr
        assert list(files(tmp_path / "to").values()) == [BIG]


def test_modelscope_is_the_second_source(llavanext, tmp_path):
    with ModelScopeSite() as scope:
        scope.add("swift/LLaVA-NeXT-Video-7B-hf", MODEL)
        words = ("fetch", "video-7b", "--to", tmp_path / "to", "--source", "modelscope", "--endpoint", scope.endpoint)
        done = llavanext(*words)
        assert done.returncode == 0, done.stderr
        assert files(tmp_path / "to") == VIDEO_7B and f"from {scope.endpoint}/models/swift/" in done.stderr
        before = scope.sent.total()
        assert llavanext(*words).returncode == 0 and scope.sent.total() == before


# ----------------------------------------------------------------------------------------------------- what is printed


def test_list_and_json(llavanext, hub, tmp_path):
    listed = llavanext("fetch", "--list")
    assert listed.returncode == 0 and hub.log == []
    lines = listed.stdout.splitlines()
    assert len(lines) == 9 and lines[1].split()[:3] == ["video-7b", "14.1", "GB"]
    assert {artifact["name"] for artifact in json.loads(llavanext("fetch", "--list", "--json").stdout)} == {
        line.split()[0] for line in lines[1:]
    }
    dry = llavanext("fetch", "video-7b", "--to", tmp_path / "to", "--dry-run")
    assert dry.returncode == 0 and "To fetch: 5 files, 6.05 MB; 6.05 MB of disk needed, " in dry.stderr
    assert not (tmp_path / "to").exists()
    report = json.loads(llavanext("fetch", "video-7b", "--to", tmp_path / "to", "--json").stdout)
    assert report["fetched"] == 5 and report["artifacts"][0]["requested"] == "main"
    assert report["next"] == [f"llavanext convert {tmp_path}/to {tmp_path}/to-mindspore"]
    checked = json.loads(llavanext("fetch", "--check", tmp_path / "to", "--json").stdout)
    assert checked["files"] == 5 and checked["broken"] == []


def test_progress_is_shown_and_the_working_folder_stays_clean(llavanext, hub, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hub.cdn.manners[cdn_path(BIG)] = Manners(rate=1_500_000)
    done = llavanext("fetch", "video-7b", "--to", tmp_path / "to")
    assert "Downloading: " in done.stderr and "6.05 MB" in done.stderr
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        ((), 2, "name what to fetch, or use --list or --check DIR"),
        (("video-7b",), 2, "--to FOLDER is missing"),
        (("video7b",), 1, "unknown artifact 'video7b'\nHint: did you mean video-7b?"),
        (("video7b", "--to", "x"), 1, "unknown artifact 'video7b'\nHint: did you mean video-7b?"),
        (("video-7b", "--to", "x", "--source", "ftp"), 2, "'ftp' is not one of 'hf', 'modelscope'"),
        (("video-7b", "--to", "x", "--endpoint", "nonsense"), 1, "--endpoint: 'nonsense' is not an address"),
        (("video-7b", "--to", "x", "--shards", "1"), 1, "video-7b has no shards"),
        (("video-7b", "--to", "x", "--only", "*.gguf"), 1, "has no file like *.gguf"),
        (("video-7b", "--to", "x", "--revision", "man"), 1, "-7B-hf at revision man (HTTP 404)"),
        (("video-7b", "mix665k", "--to", "x", "--revision", "a"), 1, "--revision applies to one artifact"),
        (("--check", "x"), 1, "x has no files that llavanext fetch downloaded"),
        (("--check", "x", "video-7b"), 2, "--check takes a folder and repairs it: omit a name"),
        (("--check", "x", "--force", "--only", "y"), 2, "omit --only, --force"),
        (("--list", "--dry-run"), 2, "--list only shows the artifacts: omit --dry-run"),
        (("org/nothing", "--to", "x"), 1, "has no model org/nothing, or it is private"),
    ],
)
def test_what_users_get_wrong(hub, tmp_path, monkeypatch, words, code, what):
    from typer.testing import CliRunner

    from llavanext_cli.app import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    done = CliRunner().invoke(app, ["fetch", *words])
    assert done.exit_code == code and what in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_file_without_a_digest(llavanext, tmp_path):
    with FileSite({"/a.bin": SECOND}) as site:
        planned = llavanext("fetch", site.url("/a.bin"), "--to", tmp_path / "to", "--dry-run")
        assert "To fetch: 1 file, 2 MB;" in planned.stderr and planned.returncode == 0
        done = llavanext("fetch", site.url("/a.bin"), "--to", tmp_path / "to")
        again = llavanext("fetch", site.url("/a.bin"), "--to", tmp_path / "to")
    assert "1 file without a published digest: only the size was compared." in done.stderr
    assert "1 file fetched (2 MB)" in done.stderr and files(tmp_path / "to") == {"a.bin": SECOND}
    assert f"{site.url('/a.bin')}: 1 file, 2 MB\n" in done.stderr
    assert "0 files fetched (0 B), 1 already there: " in again.stderr


# ------------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize("verbose", [(), ("-v",)])
def test_the_token_appears_nowhere(llavanext, hub, tmp_path, verbose):
    hub.add("org/gated", MODEL, gated=True, token="hf_another_token_altogether")
    outputs = []
    for name in ("org/gated", "org/nothing", "video-7b"):
        hub.cdn.manners[cdn_path(BIG)] = Manners(ranges=False, cut_every=100)
        done = llavanext(
            "fetch", name, "--to", tmp_path / name.replace("/", "-"), "--timeout", "0.5", "--retries", "1", *verbose,
            HF_TOKEN=TOKEN, HF_DEBUG="1",
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        outputs.append(done.stdout + done.stderr)
    hub.cdn.manners.clear()
    done = llavanext("fetch", "video-7b", "--to", tmp_path / "video-7b", *verbose, HF_TOKEN=TOKEN)
    assert done.returncode == 0 and files(tmp_path / "video-7b") == VIDEO_7B
    outputs.append(done.stdout + done.stderr)
    state = [path.read_bytes() for path in (tmp_path / "video-7b").rglob("*") if path.is_file()]
    for text in (*outputs, *(data.decode("latin1") for data in state)):
        assert TOKEN not in text and "secretsignature" not in text
    assert any(headers.get("authorization") == f"Bearer {TOKEN}" for _, headers in hub.headers_seen)

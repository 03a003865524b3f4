"""`llavanext fetch` as a user runs it: processes of their own against real servers on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.fetching.loopback import FileSite, HubSite, Manners, ModelScopeSite, ProxySite, content

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


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".llavanext" not in path.parts
    }


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
    assert "0 files fetched (0 B), 5 were there" in warm.stderr

    rotten = to / "model-00002-of-00002.safetensors"
    data = bytearray(rotten.read_bytes())
    data[1_000_000] ^= 1
    times = rotten.stat()
    rotten.write_bytes(data)
    os.utime(rotten, ns=(times.st_atime_ns, times.st_mtime_ns))
    told = llavanext("fetch", "--check", to, "--dry-run")
    assert "1 of 5 files in" in the_error(told) and "model-00002-of-00002.safetensors: sha256" in told.stderr
    assert hub.content_sent() == sent
    repaired = llavanext("fetch", "--check", to)
    assert repaired.returncode == 0 and "1 of them broken and now whole again (2 MB fetched)" in repaired.stderr
    assert files(to) == VIDEO_7B and hub.content_sent() - sent == len(SECOND)

    asked = len(hub.log)
    assert "5 files read (6.05 MB): all are whole." in llavanext("fetch", "--check", to).stderr
    assert len(hub.log) == asked


@pytest.mark.parametrize("kind", ["hub", "web"])
def test_killed_half_way_only_the_rest_is_transferred(llavanext, hub, tmp_path, kind):
    with FileSite({"/big.bin": BIG}) as site:
        if kind == "hub":
            serving, path = hub.cdn, cdn_path(BIG)
            words = ("fetch", "video-7b", "--to", tmp_path / "to", "--only", "model-00001*")
            goal = tmp_path / "to" / "model-00001-of-00002.safetensors"
        else:
            serving, path = site, "/big.bin"
            words = (
                "fetch",
                site.url("/big.bin") + f"#sha256={hashlib.sha256(BIG).hexdigest()}",
                "--to",
                tmp_path / "to",
            )
            goal = tmp_path / "to" / "big.bin"
        serving.manners[path] = Manners(rate=700_000 if kind == "hub" else 250_000)
        process = llavanext(*words, wait=False)
        wait_for(lambda: serving.sent[path] > len(BIG) // 2)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -9 and not goal.exists()
        time.sleep(0.3)
        before = serving.sent[path]
        assert before < len(BIG) * 0.9
        serving.manners[path] = Manners()
        done = llavanext(*words)
        assert done.returncode == 0, done.stderr
        assert goal.read_bytes() == BIG
        # What had left the server and was not written yet when the process died comes again, and no more.
        assert serving.sent[path] - before <= len(BIG) - before + 500_000


def test_two_processes_at_once(llavanext, hub, tmp_path):
    hub.cdn.manners[cdn_path(BIG)] = Manners(rate=2_000_000)
    first = llavanext("fetch", "video-7b", "--to", tmp_path / "to", wait=False)
    wait_for(lambda: hub.cdn.sent[cdn_path(BIG)] > 100_000)
    second = llavanext("fetch", "video-7b", "--to", tmp_path / "to", wait=False)
    ends = [process.communicate(timeout=60) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), ends
    assert "another fetch is working in" in ends[1][1] and "0 files fetched (0 B), 5 were there" in ends[1][1]
    assert files(tmp_path / "to") == VIDEO_7B and hub.content_sent() == sum(map(len, VIDEO_7B.values()))


def test_two_processes_and_two_artifacts_in_one_folder(llavanext, hub, tmp_path):
    hub.add("org/set", {"answers.json": b"[]"}, "dataset")
    processes = [
        llavanext("fetch", name, "--to", tmp_path / "to", wait=False) for name in ("video-7b", "dataset:org/set")
    ]
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert files(tmp_path / "to") == VIDEO_7B | {"answers.json": b"[]"}
    manifest = json.loads((tmp_path / "to/.llavanext/manifest.json").read_text())
    assert set(manifest["artifacts"]) == {"video-7b", "dataset:org/set"}


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
        before = serving.sent.total()
        for manners in (*hub.cdn.manners.values(), *site.manners.values()):
            manners.rate = None
        done = llavanext("fetch", *name, "--to", tmp_path / "to")
        assert done.returncode == 0, done.stderr
        assert serving.sent.total() - before < len(BIG) - 300_000  # what was kept did not come again
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


def test_progress_is_told_and_the_working_folder_stays_clean(llavanext, hub, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hub.cdn.manners[cdn_path(BIG)] = Manners(rate=1_500_000)
    done = llavanext("fetch", "video-7b", "--to", tmp_path / "to")
    assert "Downloading: " in done.stderr and "6.05 MB" in done.stderr
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        ((), 2, "name what to fetch"),
        (("video-7b",), 2, "--to FOLDER is missing"),
        (("video7b",), 1, "no artifact is called 'video7b'\nHint: Did you mean video-7b?"),
        (("video7b", "--to", "x"), 1, "no artifact is called 'video7b'\nHint: Did you mean video-7b?"),
        (("video-7b", "--to", "x", "--source", "ftp"), 2, "is not one of"),
        (("video-7b", "--to", "x", "--endpoint", "nonsense"), 1, "an endpoint is an address such as https://host"),
        (("video-7b", "--to", "x", "--shards", "1"), 1, "video-7b has no shards"),
        (("video-7b", "--to", "x", "--only", "*.gguf"), 1, "has no file that is wanted: *.gguf"),
        (("video-7b", "--to", "x", "--revision", "man"), 1, "has no revision 'man'\nHint: It has main."),
        (("video-7b", "mix665k", "--to", "x", "--revision", "a"), 1, "--revision is of one artifact"),
        (("--check", "x"), 1, "holds nothing that was fetched"),
        (("--check", "x", "video-7b"), 2, "--check takes a folder"),
        (("--check", "x", "--force", "--only", "y"), 2, "leave --only, --force out"),
        (("--list", "--dry-run"), 2, "leave --dry-run out"),
        (("org/nothing", "--to", "x"), 1, "has no model org/nothing, or it is private"),
    ],
)
def test_what_users_get_wrong(llavanext, tmp_path, monkeypatch, words, code, what):
    monkeypatch.chdir(tmp_path)
    done = llavanext("fetch", *words)
    if code == 1:
        assert what in the_error(done)
    else:
        assert done.returncode == code and what in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_file_without_a_digest_is_told_of_and_one_file_is_one(llavanext, tmp_path):
    with FileSite({"/a.bin": SECOND}) as site:
        planned = llavanext("fetch", site.url("/a.bin"), "--to", tmp_path / "to", "--dry-run")
        assert "To fetch: 1 file, 2 MB;" in planned.stderr and planned.returncode == 0
        done = llavanext("fetch", site.url("/a.bin"), "--to", tmp_path / "to")
        again = llavanext("fetch", site.url("/a.bin"), "--to", tmp_path / "to")
    assert "1 file without a published digest: its size alone was checked." in done.stderr
    assert "1 file fetched (2 MB)" in done.stderr and files(tmp_path / "to") == {"a.bin": SECOND}
    assert f"{site.url('/a.bin')}: 1 file, 2 MB\n" in done.stderr
    assert "0 files fetched (0 B), 1 was there: " in again.stderr


# ------------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize("verbose", [(), ("-v",)])
def test_the_token_appears_nowhere(llavanext, hub, tmp_path, verbose):
    hub.add("org/gated", MODEL, gated=True, token="hf_another_token_altogether")
    outputs = []
    for name in ("org/gated", "org/nothing", "video-7b"):
        hub.cdn.manners[cdn_path(BIG)] = Manners(stall_at=100)
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


def test_a_password_in_an_address_is_used_and_not_shown(llavanext, tmp_path):
    with FileSite({"/a.bin": b"1"}) as site:
        address = site.url("/a.bin").replace("://", "://user:topsecret@") + "?sig=topsecret"
        done = llavanext("fetch", address, "--to", tmp_path / "to")
        assert done.returncode == 0, done.stderr
        again = llavanext("fetch", address.replace("a.bin", "b.bin"), "--to", tmp_path / "to", "-v")
        the_error(again)
        assert {headers["authorization"].partition(" ")[0] for _, headers in site.headers_seen} == {"Basic"}
    written = (tmp_path / "to/.llavanext/manifest.json").read_text()
    assert "topsecret" not in done.stderr + again.stderr + written


# ------------------------------------------------------------------------------------------------------------ bad days


@pytest.mark.parametrize(
    ("manners", "what"),
    [
        (Manners(statuses=[404] * 9), "has no /a.bin"),
        (Manners(statuses=[403] * 9), "does not give out a.bin (HTTP 403)"),
        (Manners(statuses=[500] * 9), "is in trouble (HTTP 500), 2 times in a row"),
        (Manners(statuses=[(429, {"Retry-After": "86400"})] * 9), "to come back in 24.0 h"),
        (Manners(stall_at=100), "does not deliver a.bin"),
        (Manners(ranges=False, cut_every=100_000), "does not deliver a.bin whole"),
        (Manners(ranges=False, announce=1000), "does not deliver a.bin whole"),
        (Manners(redirect="file:///etc/passwd"), "redirects to an address that is not on the web"),
        (Manners(encoding="gzip"), "compressed, though asked not to"),
    ],
)
def test_bad_servers(llavanext, tmp_path, manners, what):
    with FileSite({"/a.bin": SECOND}, {"/a.bin": manners}) as site:
        digest = hashlib.sha256(SECOND).hexdigest()
        words = ("fetch", f"{site.url('/a.bin')}#sha256={digest}", "--to", tmp_path / "to")
        done = llavanext(*words, "--timeout", "0.5", "--retries", "1")
        assert what in the_error(done)
        assert files(tmp_path / "to") == {}
        site.manners.clear()
        done = llavanext(*words)
        assert done.returncode == 0 and files(tmp_path / "to") == {"a.bin": SECOND}


def test_a_wrong_digest(llavanext, tmp_path):
    with FileSite({"/a.bin": SECOND}) as site:
        done = llavanext("fetch", f"{site.url('/a.bin')}#sha256={'0' * 64}", "--to", tmp_path / "to")
    assert "a.bin is not what it should be: sha256" in the_error(done) and files(tmp_path / "to") == {}


def test_gated_says_what_to_accept_and_where(llavanext, hub, tmp_path):
    hub.add("org/gated", MODEL, gated=True, token=TOKEN)
    error = the_error(llavanext("fetch", "org/gated", "--to", tmp_path / "to"))
    assert f"accept them at {hub.endpoint}/org/gated" in error
    assert llavanext("fetch", "org/gated", "--to", tmp_path / "to", HF_TOKEN=TOKEN).returncode == 0
    assert files(tmp_path / "to") == MODEL


def test_no_network(llavanext, hub, tmp_path):
    assert "no host called nowhere.invalid (DNS)" in the_error(
        llavanext("fetch", "video-7b", "--to", tmp_path / "to", HF_ENDPOINT="https://nowhere.invalid")
    )
    hub.server.shutdown()
    hub.server.server_close()
    assert "refuses the connection" in the_error(llavanext("fetch", "video-7b", "--to", tmp_path / "to"))
    assert not (tmp_path / "to").exists()


def test_proxy_variables_are_honoured(llavanext, tmp_path):
    pages = {"http://files.example/a.bin": lambda proxy, handler: proxy.serve(handler, SECOND, Manners())}
    with ProxySite(pages) as proxy:
        done = llavanext("fetch", "http://files.example/a.bin", "--to", tmp_path / "to", HTTP_PROXY=proxy.endpoint,
                         http_proxy=proxy.endpoint)  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "to") == {"a.bin": SECOND}


def test_a_reader_that_goes_away_is_no_error(llavanext, hub, tmp_path, environment):
    words = f"{sys.executable} -m llavanext_cli fetch --list | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", words], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("name")

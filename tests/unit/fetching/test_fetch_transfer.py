"""Downloads of plain addresses from servers that misbehave in every way."""

from __future__ import annotations

import threading
import time

import pytest

from llavanext_cli.errors import FetchError
from llavanext_cli.fetching import crew
from llavanext_cli.fetching.journal import Journal, merge
from llavanext_cli.fetching.net import Limits, Net, StoppedError, retry_after
from llavanext_cli.fetching.transfer import download_url, probe_size
from tests.unit.fetching.loopback import FileSite, Manners, ProxySite, content

SIZE = 3_000_000
DATA = content(SIZE)


@pytest.fixture(autouse=True)
def all_at_once(monkeypatch):
    """Loopback would bring these files before a second connection is opened, and several are what can go wrong."""
    monkeypatch.setattr(crew, "RAMP_SECONDS", 0.001)
    monkeypatch.setattr(crew, "FAST", 1 << 60)


def get(net, site, part, path="/a.bin", **options) -> int:
    return download_url(net, site.url(path), part, **options)


@pytest.mark.parametrize(("fast", "most", "least"), [(0, 2, 2), (1 << 60, 4, 4), (100 << 20, 4, 3)])
def test_a_fast_line_gets_one_connection_and_a_slow_one_several(net, tmp_path, monkeypatch, fast, most, least):
    monkeypatch.setattr(crew, "RAMP_SECONDS", 0.1)
    monkeypatch.setattr(crew, "FAST", fast)
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(rate=2_000_000)}) as site:
        opened = []
        plain = site.server.get_request
        site.server.get_request = lambda: opened.append(1) or plain()
        get(net, site, tmp_path / "a", connections=3)
    assert (tmp_path / "a").read_bytes() == DATA
    assert least <= len(opened) <= most  # the probe has one of its own


def test_several_connections_bring_every_byte_once(net, tmp_path):
    with FileSite({"/a.bin": DATA}) as site:
        told = []
        transferred = get(net, site, tmp_path / "a", connections=3, report=lambda done, prefix: told.append(prefix))
    assert (tmp_path / "a").read_bytes() == DATA
    assert transferred == SIZE and site.sent["/a.bin"] == SIZE + 1  # and the probe's byte
    assert told[-1] == SIZE and len({line[2] for line in site.log}) >= 4
    assert not (tmp_path / "a.journal").exists()


@pytest.mark.parametrize("size", [0, 1, 65_536, (1 << 20) + 1])
def test_any_size(net, tmp_path, size):
    data = content(size)
    with FileSite({"/a.bin": data}) as site:
        get(net, site, tmp_path / "a", size=size, connections=4)
    assert (tmp_path / "a").read_bytes() == data


def test_connections_are_used_again(net, tmp_path):
    with FileSite({"/a.bin": DATA}) as site:
        opened = []
        plain = site.server.get_request
        site.server.get_request = lambda: opened.append(1) or plain()
        get(net, site, tmp_path / "a", connections=1)
    assert len(site.log) >= 4  # the probe and three pieces
    assert len(opened) <= 2  # the probe is made by another thread than the pieces


def test_a_connection_cut_at_every_100_kb_is_no_obstacle(net, tmp_path):
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(cut_every=100_000)}) as site:
        transferred = get(net, site, tmp_path / "a", connections=2)
    assert (tmp_path / "a").read_bytes() == DATA
    assert transferred == SIZE  # what came before each cut was kept


def test_a_cut_connection_without_ranges_starts_again_and_gives_up(net, tmp_path):
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(ranges=False, cut_every=100_000)}) as site:
        with pytest.raises(FetchError, match=r"does not deliver a.bin whole") as caught:
            get(net, site, tmp_path / "a")
        assert "cannot resume" in caught.value.hint
        assert site.sent["/a.bin"] == 3 * 100_000  # one attempt and two more


def test_without_ranges_one_cut_is_survived(net, tmp_path):
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(ranges=False, cut_once_at=100_000)}) as site:
        get(net, site, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA


@pytest.mark.parametrize("ranges", [True, False])
def test_chunked_answers(net, tmp_path, ranges):
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(ranges=ranges, chunked=True)}) as site:
        get(net, site, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA


def test_a_chunked_answer_that_breaks_off_is_not_taken_for_whole(net, tmp_path):
    with (
        FileSite({"/a.bin": DATA}, {"/a.bin": Manners(ranges=False, chunked=True, cut_every=100_000)}) as site,
        pytest.raises(FetchError, match=r"does not deliver"),
    ):
        get(net, site, tmp_path / "a")


@pytest.mark.parametrize("lie", [5000, -5000])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_lies_about_the_length(net, tmp_path, lie, ranges):
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(ranges=ranges, announce=lie)}) as site:
        if ranges and lie > 0:  # what an answer lacks is asked for again
            get(net, site, tmp_path / "a", size=SIZE)
            assert (tmp_path / "a").read_bytes() == DATA
        else:  # the last 5000 bytes never come
            with pytest.raises(FetchError, match=r"not 3000000|does not deliver a.bin: the answer is shorter"):
                get(net, site, tmp_path / "a", size=SIZE)


def test_a_length_below_nothing_is_not_waited_for(net, tmp_path):
    with (
        FileSite({"/a.bin": DATA}, {"/a.bin": Manners(ranges=False, announce=-SIZE - 5)}) as site,
        pytest.raises(FetchError, match=r"announces a length that is none: '-5'"),
    ):
        get(net, site, tmp_path / "a")


def test_a_length_of_digits_that_are_no_number(net, tmp_path):
    def announce(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "²")  # str.isdigit says yes, int says no
        handler.end_headers()
        handler.close_connection = True
        return True

    with FileSite({"/a.bin": DATA}) as site:
        site.hook = announce
        with pytest.raises(FetchError, match=r"announces a length that is none: '²'"):
            get(net, site, tmp_path / "a")
        assert probe_size(net, site.url("/a.bin")) is None
    assert not (tmp_path / "a").exists()


def test_a_total_that_is_not_true(net, tmp_path):
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(wrong_total=SIZE + 9)}) as site:
        with pytest.raises(FetchError, match=r"has 3000009 bytes at 127.0.0.1, not 3000000"):
            get(net, site, tmp_path / "a", size=SIZE)
        with pytest.raises(FetchError, match=r"HTTP 416"):
            get(net, site, tmp_path / "b")


def test_ranges_that_are_not_those_asked_for(net, tmp_path):
    with FileSite({"/a.bin": DATA}) as site:
        site.hook = lambda handler: setattr(
            site, "manners", {"/a.bin": Manners(shift=0 if handler.headers["Range"] == "bytes=0-0" else 7)}
        )
        with pytest.raises(FetchError, match=r"sends byte 7 when asked for byte 0"):
            get(net, site, tmp_path / "a", connections=1)


def test_silence_ends_a_connection_and_the_rest_is_asked_for(net, tmp_path):
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(stall_at=50_000, stall_times=1)}) as site:
        started = time.monotonic()
        transferred = get(net, site, tmp_path / "a", connections=1)
    assert (tmp_path / "a").read_bytes() == DATA and transferred == SIZE
    assert 0.9 < time.monotonic() - started < 6


def test_silence_for_ever_is_an_error(net, tmp_path):
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(stall_at=0)}) as site:
        site.hook = lambda handler: handler.headers["Range"] == "bytes=0-0" and not site.serve(handler, DATA, Manners())
        with pytest.raises(FetchError, match=r"does not deliver a.bin: no byte came for too long") as caught:
            get(net, site, tmp_path / "a", connections=2)
        assert "--timeout" in caught.value.hint


def test_a_trickle_counts_as_silence(tmp_path):
    net = Net(Limits(stall=0.6, least_rate=100_000, retries=0, pause=0.01))
    with (
        FileSite({"/a.bin": DATA}, {"/a.bin": Manners(rate=5000)}) as site,
        pytest.raises(FetchError, match=r"less than 100000 bytes a second"),
    ):
        get(net, site, tmp_path / "a", connections=1)


def test_busy_answers_are_waited_out(net, tmp_path):
    notes = []
    net.note = notes.append
    statuses = [503, (429, {"Retry-After": "0"}), 500, 502]
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(statuses=statuses[:2])}) as site:
        get(net, site, tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == DATA
        site.manners["/a.bin"].statuses = [(429, {"Retry-After": "2"})]
        started = time.monotonic()
        get(net, site, tmp_path / "b")
        assert time.monotonic() - started >= 2
    assert notes == ["127.0.0.1 asks us to slow down (429); waiting 2 s"]


@pytest.mark.parametrize(
    ("status", "what"),
    [
        ((429, {"Retry-After": "7200"}), r"asks us to slow down \(429\), and to come back in 2.0 h"),
        ((503, {"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}), "come back in"),
        (429, "asks us to slow down .429., 3 times in a row"),
        (500, "is in trouble .HTTP 500., 3 times in a row"),
        (404, "has no /a.bin"),
        (403, "does not give out a.bin"),
        (418, "answers HTTP 418 for a.bin"),
    ],
)
def test_refusals(net, tmp_path, status, what):
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(statuses=[status] * 9)}) as site:
        with pytest.raises(FetchError, match=what) as caught:
            get(net, site, tmp_path / "a")
        assert caught.value.hint


def test_retry_after_reads_numbers_and_dates():
    assert retry_after("12") == 12 and retry_after("") is None and retry_after("soon") is None
    assert retry_after("Mon, 01 Jan 2001 00:00:00 GMT") == 0


def test_a_second_connection_that_is_refused_leaves_its_part_to_the_first(net, tmp_path):
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(rate=3_000_000)}) as site:
        busy = threading.Semaphore(1)

        def one_at_a_time(handler):
            if handler.headers["Range"] == "bytes=0-0":
                return False
            if not busy.acquire(blocking=False):
                site.answer(handler, 503)
                return True
            try:
                site.serve(handler, DATA, site.manners["/a.bin"])
            finally:
                busy.release()
            return True

        site.hook = one_at_a_time
        get(net, site, tmp_path / "a", connections=3)
    assert (tmp_path / "a").read_bytes() == DATA


def test_a_file_that_changes_on_the_server_is_begun_anew(net, tmp_path):
    other = content(SIZE, 1)
    with FileSite({"/a.bin": DATA}) as site:
        asked = []

        def change(handler):
            asked.append(1)
            if len(asked) == 3:
                site.files["/a.bin"] = other

        site.hook = change
        get(net, site, tmp_path / "a", connections=1)
    assert (tmp_path / "a").read_bytes() == other


def test_a_file_that_changes_all_the_time(net, tmp_path):
    with FileSite({"/a.bin": DATA}) as site:
        site.hook = lambda handler: site.files.update({"/a.bin": content(SIZE, len(site.log))})
        with pytest.raises(FetchError, match=r"changes while it is being downloaded"):
            get(net, site, tmp_path / "a")


def test_compressed_although_asked_not_to(net, tmp_path):
    with (
        FileSite({"/a.bin": DATA}, {"/a.bin": Manners(encoding="gzip")}) as site,
        pytest.raises(FetchError, match=r"compressed, though asked not to"),
    ):
        get(net, site, tmp_path / "a")
    assert [headers["accept-encoding"] for _, headers in site.headers_seen] == ["identity"]


# -------------------------------------------------------------------------------------------- resuming


def interrupt(net, site, part, after: int, **options) -> None:
    """Download until `after` bytes are there, then stop."""

    was_stopped = threading.Event()

    def report(done: int, prefix: int) -> None:
        if done >= after and not was_stopped.is_set():  # another connection may still report while this one ends
            was_stopped.set()
            net.stop.set()

    with pytest.raises(StoppedError):
        get(net, site, part, report=report, **options)
    net.stop.clear()


def test_only_the_rest_is_transferred(net, tmp_path):
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(rate=4_000_000)}) as site:
        interrupt(net, site, tmp_path / "a", SIZE // 2, connections=2)
        time.sleep(0.3)
        before = site.sent["/a.bin"]
        site.manners.clear()
        transferred = get(net, site, tmp_path / "a", connections=2)
        assert (tmp_path / "a").read_bytes() == DATA
        assert site.sent["/a.bin"] - before == transferred + 1 <= SIZE // 2 + 1


def test_nothing_is_resumed_when_nobody_can_tell_whether_it_is_the_same_file(net, tmp_path):
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(rate=4_000_000, etag="")}) as site:
        interrupt(net, site, tmp_path / "a", SIZE // 2, connections=1)
        site.files["/a.bin"] = content(SIZE, 2)
        site.manners["/a.bin"].rate = None
        assert get(net, site, tmp_path / "a", connections=1) == SIZE
        assert (tmp_path / "a").read_bytes() == site.files["/a.bin"]


def test_a_known_digest_allows_to_resume_from_another_server(net, tmp_path):
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(rate=4_000_000, etag="")}) as site:
        interrupt(net, site, tmp_path / "a", SIZE // 2, connections=1, version="digest")
    with FileSite({"/a.bin": DATA}) as mirror:
        assert get(net, mirror, tmp_path / "a", version="digest") <= SIZE // 2
    assert (tmp_path / "a").read_bytes() == DATA


def test_nothing_is_resumed_after_a_server_stopped_serving_ranges_for_a_while(net, tmp_path):
    with FileSite({"/a.bin": DATA}, {"/a.bin": Manners(rate=4_000_000)}) as site:
        interrupt(net, site, tmp_path / "a", SIZE // 2, connections=1)
        site.manners["/a.bin"] = Manners(ranges=False, cut_every=100_000)
        with pytest.raises(FetchError, match=r"does not deliver a.bin whole"):
            get(net, site, tmp_path / "a")
        assert not (tmp_path / "a.journal").exists()  # its bytes were overwritten
        site.manners.clear()
        assert get(net, site, tmp_path / "a", connections=1) == SIZE
    assert (tmp_path / "a").read_bytes() == DATA


def test_journal_survives_a_line_that_was_cut_off_and_nonsense(tmp_path):
    part = tmp_path / "a"
    journal = Journal(part, 1000, "v")
    journal.add(0, 100)
    journal.add(500, 600)
    journal.close()
    with open(journal.path, "a") as file:
        file.write("600 x\n-5 7\n900 2000\n90 80\n700 80")
    again = Journal(part, 1000, "v")
    assert again.spans == [(0, 100), (500, 600)] and again.missing() == [(100, 500), (600, 1000)]
    assert (again.done, again.prefix) == (200, 100)
    again.remove()
    assert Journal(part, 1000, "v").spans == [] and Journal(part, 1000, "w").spans == []


def test_journal_of_another_version_or_size_counts_for_nothing(tmp_path):
    part = tmp_path / "a"
    journal = Journal(part, 1000, "v")
    journal.add(0, 1000)
    journal.close()
    assert Journal(part, 1000, "other").missing() == [(0, 1000)]
    assert Journal(part, 999, "other").missing() == [(0, 999)] and part.stat().st_size == 999


def test_journal_of_a_part_that_lost_bytes_counts_for_nothing(tmp_path):
    part = tmp_path / "a"
    journal = Journal(part, 1000, "v")
    journal.add(0, 600)
    journal.close()
    part.write_bytes(bytes(100))
    assert Journal(part, 1000, "v").missing() == [(0, 1000)] and part.stat().st_size == 1000


def test_merge_joins_what_touches():
    assert merge([(5, 7), (0, 2), (2, 3), (6, 9)]) == [(0, 3), (5, 9)]


# ------------------------------------------------------------------------------------------- redirects


def test_a_redirect_is_followed_and_its_target_serves_the_ranges(net, tmp_path):
    with FileSite({"/b.bin": DATA}) as site:
        site.manners["/a.bin"] = Manners(redirect="/b.bin")
        get(net, site, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a", "gopher://x/", "data:,x"])
def test_a_redirect_off_the_web_is_refused(net, tmp_path, target):
    with (
        FileSite({}, {"/a.bin": Manners(redirect=target)}) as site,
        pytest.raises(FetchError, match=r"redirects to an address that is not on the web"),
    ):
        get(net, site, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_redirects_in_a_circle(net, tmp_path):
    with (
        FileSite({}, {"/a.bin": Manners(redirect="/a.bin")}) as site,
        pytest.raises(FetchError, match=r"redirects in a circle"),
    ):
        get(net, site, tmp_path / "a")


def test_a_public_server_may_not_redirect_to_a_private_one_and_proxies_are_used(net, tmp_path, monkeypatch):
    with FileSite({"/secret": DATA}) as private:
        pages = {
            "http://93.184.215.14/a.bin": lambda it, h: it.answer(h, 302, b"", {"Location": private.url("/secret")}),
            "http://93.184.215.14/b.bin": lambda it, h: it.serve(h, DATA, Manners()),
        }
        with ProxySite(pages) as proxy:
            monkeypatch.setenv("http_proxy", proxy.endpoint)
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            with pytest.raises(FetchError, match=r"93.184.215.14 is public and redirects to the private address 127"):
                download_url(net, "http://93.184.215.14/a.bin", tmp_path / "a")
            assert private.log == []
            download_url(net, "http://93.184.215.14/b.bin", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == DATA and len(proxy.log) >= 3


def test_an_endless_body_of_a_redirect_is_not_swallowed(net, tmp_path, monkeypatch):
    from llavanext_cli.fetching import net as net_module

    monkeypatch.setattr(net_module, "LARGEST_ANSWER", 100_000)
    with FileSite({"/b.bin": DATA}) as site:

        def hook(handler):
            if handler.path != "/a.bin":
                return False
            handler.send_response(302)
            handler.send_header("Location", "/b.bin")
            handler.send_header("Content-Length", str(10**12))
            handler.end_headers()
            for _ in range(1000):
                handler.wfile.write(b"x" * 65536)
            return True

        site.hook = hook
        with pytest.raises(FetchError, match=r"endless answer"):
            get(net, site, tmp_path / "a")


# ------------------------------------------------------------------------------------------- no answer


def test_nobody_listens(net, tmp_path):
    with FileSite({}) as site:
        address = site.url("/a.bin")
    with pytest.raises(FetchError, match=r"127.0.0.1:\d+ refuses the connection") as caught:
        download_url(net, address, tmp_path / "a")
    assert "--endpoint" in caught.value.hint


def test_no_such_host(net, tmp_path):
    with pytest.raises(FetchError, match=r"no host called nowhere.invalid \(DNS\)"):
        download_url(net, "http://nowhere.invalid/a.bin", tmp_path / "a")


def test_a_proxy_that_does_not_work(net, tmp_path, monkeypatch):
    with FileSite({}) as site:
        dead = site.endpoint
    monkeypatch.setenv("http_proxy", dead.replace("://", "://user:secretword@"))
    with pytest.raises(FetchError, match=r"the proxy between here and example.com does not work") as caught:
        download_url(net, "http://example.com/a.bin", tmp_path / "a")
    assert "secretword" not in f"{caught.value}{caught.value.hint}{caught.value.__cause__}"


def test_a_certificate_that_is_not_trusted(net, tmp_path):
    with (
        FileSite({}) as site,
        pytest.raises(FetchError, match=r"certificate of 127.0.0.1 is not trusted|cannot be reached"),
    ):  # speaks no TLS at all
        download_url(net, site.url("/a").replace("http:", "https:"), tmp_path / "a")


def test_a_disk_that_is_full_is_the_systems_error_and_the_journal_stays(net, tmp_path, monkeypatch):
    import errno
    import os

    written = []
    plain = os.pwrite

    def pwrite(descriptor, data, offset):
        if sum(written) > SIZE // 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(plain(descriptor, data, offset))
        return written[-1]

    with FileSite({"/a.bin": DATA}) as site:
        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match=r"No space left"):
            get(net, site, tmp_path / "a", connections=2)
        monkeypatch.undo()
        assert (tmp_path / "a.journal").exists()
        assert get(net, site, tmp_path / "a", connections=2) <= SIZE // 2
    assert (tmp_path / "a").read_bytes() == DATA

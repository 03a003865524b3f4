"""`llavanext mix` as a user runs it: good records in their order, bad ones with their reasons, and no harm done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from llavanext_cli.app import app
from llavanext_cli.errors import DataError
from llavanext_cli.mixing import pipeline, plan
from llavanext_cli.mixing.json_index import index_chunks
from llavanext_cli.mixing.report import REASONS, MixReport
from llavanext_cli.mixing.request import MixRequest
from llavanext_cli.mixing.samples import read_samples

OPEN, CLOSE = "<|reserved_special_token_3|>", "<|reserved_special_token_4|>"


def picture(path: Path, size: tuple[int, int] = (30, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path)
    return path


def record(number: int, path: str | None = None, kind: str = "image", **changes) -> dict:
    head = {"id": number} | ({kind: path} if path else {})
    turns = [
        {"from": "human", "value": ("<image>\n" if path else "") + f"Question {number}?"},
        {"from": "gpt", "value": f"Answer {number} à « 日 »."},
    ]
    return head | {"conversations": turns} | changes


def write_mix(folder: Path, *data_sets: dict) -> Path:
    path = folder / "mix.yaml"
    path.write_text(json.dumps({"datasets": list(data_sets)}))  # JSON is YAML
    return path


def write_data(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    else:
        path.write_text(json.dumps(records, indent=2, ensure_ascii=False))
    return path


def mix(*arguments: object):
    return CliRunner().invoke(app, ["mix", *map(str, arguments)])


def run_mix(mix_file: Path, out: Path, **changes) -> MixReport:
    return pipeline.run_mix(MixRequest(mix_file, out, **changes))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def images(tmp_path) -> Path:
    """A data set of five pictures and a text; one record has no file."""
    folder = tmp_path / "images"
    for number in range(5):
        picture(folder / "coco" / f"{number}.jpg", (30 + number, 20))
    content = [record(number, f"coco/{number}.jpg") for number in range(6)] + [record(6)]
    write_data(folder / "llava.json", content)
    return folder


def test_the_main_job(tmp_path, images, write_clip):
    clip = write_clip("a.mp4", 30)
    (tmp_path / "videos" / "academic_source").mkdir(parents=True)
    clip.rename(tmp_path / "videos" / "academic_source" / "a.mp4")
    write_data(tmp_path / "videos" / "qa.jsonl", [record(8, "academic_source/a.mp4", "video", data_source="x")] * 2)
    mix_file = write_mix(
        tmp_path,
        {"json_path": "images/llava.json", "name": "still"},
        {"json_path": "videos/qa.jsonl", "sampling_strategy": "end:50%"},
    )
    out = tmp_path / "samples.jsonl"
    result = mix(mix_file, "--out", out, "--check", "full", "--rejects", tmp_path / "bad.jsonl")
    assert result.exit_code == 0, result.stderr
    head, *samples = lines(out)
    assert head["llavanext_mix"] == 1 and head["seed"] == 0
    assert head["roots"] == {"still": "images", "qa": "videos"}
    assert [(s["source"], s["id"]) for s in samples] == [*(("still", str(n)) for n in (0, 1, 2, 3, 4, 6)), ("qa", "8")]
    assert samples[3]["media"] == [{"kind": "image", "path": "coco/3.jpg", "size": [20, 33]}]
    assert samples[5]["media"] == []
    assert samples[6]["media"] == [{"kind": "video", "path": "academic_source/a.mp4", "size": [96, 128]}]
    assert samples[6]["turns"][0]["text"] == "<video>\nQuestion 8?"
    assert samples[0]["turns"][1] == {"role": "assistant", "text": "Answer 0 à « 日 »."}
    (bad,) = lines(tmp_path / "bad.jsonl")
    assert (bad["source"], bad["record"], bad["id"], bad["reason"]) == ("still", 5, "5", "missing")
    assert (images / "llava.json").read_text().splitlines()[bad["line"] - 1].strip() == "{"
    assert "coco/5.jpg" in bad["detail"]
    assert "still" in result.stdout and "a missing file" in result.stdout
    assert "Wrote 7 samples" in result.stderr

    file = read_samples(out)
    assert len(file) == 7 and file.roots["still"] == images
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bad.jsonl", "images", "mix.yaml", "samples.jsonl", "samples.jsonl.cache", "videos"
    ]  # fmt: skip


def test_json_report(tmp_path, images):
    result = mix(write_mix(tmp_path, {"json_path": "images/llava.json"}), "-o", tmp_path / "s.jsonl", "--json")
    report = json.loads(result.stdout)
    assert (report["sampled"], report["kept"], report["dropped"]) == (7, 6, {"missing": 1})
    assert report["contents"] == {"image": 5, "text": 1}
    assert report["sizes"] == [{"kind": "image", "longer_side": 0, "count": 5}]
    assert (report["files_checked"], report["files_known"]) == (5, 0)
    assert report["sources"][0]["records"] == 7


def test_a_page_with_plots(tmp_path, images):
    mix_file = write_mix(tmp_path, {"json_path": "images/llava.json", "name": "<still>"})
    result = mix(mix_file, "-o", tmp_path / "s.jsonl", "--report", tmp_path / "mix.html")
    assert result.exit_code == 0, result.stderr
    assert f"The report is in {tmp_path / 'mix.html'}" in result.stderr
    page = (tmp_path / "mix.html").read_text()
    assert "<td>&lt;still&gt;</td><td>all</td>" in page and "a missing file" in page
    assert '<td>0-255</td><td class="number">5</td>' in page
    again = mix(mix_file, "-o", tmp_path / "t.jsonl", "--report", tmp_path / "mix.html")
    assert again.exit_code == 1 and "mix.html already holds a report" in again.stderr
    assert not (tmp_path / "t.jsonl").exists()


def test_a_dry_run_writes_only_the_cache(tmp_path, images):
    mix_file = write_mix(tmp_path, {"json_path": "images/llava.json"})
    result = mix(mix_file, "-o", tmp_path / "s.jsonl", "--dry-run", "--rejects", tmp_path / "bad.jsonl")
    assert result.exit_code == 0 and "Would write 6 samples" in result.stderr
    assert "neither --rejects nor --report" in result.stderr and "bad records are in" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "mix.yaml", "s.jsonl.cache"]


def test_a_file_with_the_name_of_the_cache_is_left_alone(tmp_path, images):
    mix_file = write_mix(tmp_path, {"json_path": "images/llava.json"})
    (tmp_path / "s.jsonl.cache").write_text("mine")
    for more in (["--dry-run"], []):
        result = mix(mix_file, "-o", tmp_path / "s.jsonl", *more)
        assert result.exit_code == 0 and "s.jsonl.cache is not a cache of llavanext mix" in result.stderr
        assert (tmp_path / "s.jsonl.cache").read_text() == "mine"
    mix_file.rename(tmp_path / "t.jsonl.cache")
    for more in (["--dry-run"], ["--force"]):
        result = mix(tmp_path / "t.jsonl.cache", "-o", tmp_path / "t.jsonl", *more)
        assert result.exit_code == 1 and "writing there would damage the input" in result.stderr
    assert "llava.json" in (tmp_path / "t.jsonl.cache").read_text()


@pytest.mark.parametrize("change", ["gone", "shorter", "other"])
@pytest.mark.parametrize("check", ["none", "header"])
def test_a_data_file_that_changes_under_way(tmp_path, monkeypatch, change, check):
    """Workers read the file again: what they find must be what was planned."""
    data = write_data(tmp_path / "data.json", [record(n) for n in range(3000)])

    def index(path: Path):
        yield from index_chunks(path)
        if change == "gone":
            data.unlink()
        else:
            text = data.read_text()
            data.write_text(text[:5000] if change == "shorter" else text.replace("Answer", "answer"))

    monkeypatch.setattr(plan, "index_chunks", index)
    result = mix(write_mix(tmp_path, {"json_path": "data.json"}), "-o", tmp_path / "s.jsonl", "--check", check)
    assert result.exit_code == 1 and "data.json changed while it was read" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "s.jsonl").exists()


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_records_of_any_length_keep_their_order(tmp_path, suffix):
    """A few lines, megabytes, and more than a slot of the workers' shared memory holds."""
    lengths = [10, 5_000_000, 20, 700_000, 3_000_000, 30, 9_000_000, 40] * 2
    records = [record(number) for number in range(len(lengths))]
    for entry, length in zip(records, lengths, strict=True):
        entry["conversations"][1]["value"] = "é" * length
    data = write_data(tmp_path / f"data{suffix}", records)
    mix_file = write_mix(tmp_path, {"json_path": str(data), "sampling_strategy": "all"})
    out = tmp_path / "out.jsonl"
    report = run_mix(mix_file, out, check="exists", workers=2)
    assert report.kept == len(lengths)
    assert [len(line["turns"][1]["text"]) for line in lines(out)[1:]] == lengths


def test_random_is_repeatable_and_seeded(tmp_path):
    write_data(tmp_path / "a.json", [record(number) for number in range(100)])
    mix_file = write_mix(tmp_path, {"json_path": "a.json", "sampling_strategy": "random:12.5%"})
    chosen = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        out = tmp_path / f"{name}.jsonl"
        run_mix(mix_file, out, seed=seed, check="none", workers=1 + seed)
        chosen.append([sample.id for sample in read_samples(out)])
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 13 and chosen[0] == sorted(chosen[0], key=int)


def test_media_are_looked_up_under_their_own_root_only(tmp_path):
    picture(tmp_path / "one" / "a.jpg")
    for name in ("one", "two"):
        write_data(tmp_path / name / "data.json", [record(1, "a.jpg"), record(2)])
    write_data(tmp_path / "three" / "data.json", [record(1, "a.jpg")])
    mix_file = write_mix(
        tmp_path,
        {"json_path": "one/data.json", "name": "one"},
        {"json_path": "two/data.json", "name": "two"},
        {"json_path": "three/data.json", "name": "three", "media_root": "one"},
    )
    for check in ("exists", "header"):
        report = run_mix(mix_file, tmp_path / f"{check}.jsonl", check=check, workers=1)
        assert [(s.kept, dict(s.dropped)) for s in report.sources] == [(2, {}), (1, {"missing": 1}), (1, {})]


# --- the second run


def test_checks_are_remembered(tmp_path, images):
    mix_file = write_mix(tmp_path, {"json_path": "images/llava.json"})
    first = run_mix(mix_file, tmp_path / "s.jsonl", check="full", workers=1)
    wanted = (tmp_path / "s.jsonl").read_bytes()
    assert (first.files, first.files_known) == (5, 0)
    # Nobody looks into this file again: its length and its time are the same.
    spoiled = images / "coco" / "2.jpg"
    state = spoiled.stat()
    spoiled.write_bytes(bytes(state.st_size))
    os.utime(spoiled, ns=(state.st_atime_ns, state.st_mtime_ns))
    second = run_mix(mix_file, tmp_path / "s.jsonl", check="full", workers=2, force=True)
    assert (second.files, second.files_known) == (5, 5)
    assert (tmp_path / "s.jsonl").read_bytes() == wanted
    spoiled.touch()
    third = run_mix(mix_file, tmp_path / "s.jsonl", check="full", workers=1, force=True)
    assert third.files_known == 4 and dict(third.dropped) == {"missing": 1, "corrupt": 1}


def test_a_file_is_checked_once_however_many_records_name_it(tmp_path):
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg")
    write_data(tmp_path / "data.json", [record(n, "ab"[n % 2] + ".jpg", text="x" * 3000) for n in range(3000)])
    report = run_mix(write_mix(tmp_path, {"json_path": "data.json"}), tmp_path / "s.jsonl", check="header", workers=2)
    assert (report.kept, report.files) == (3000, 2 + report.files_known)


# --- what is dropped


GOOD = {"text": record(1), "image": record(2, "good.jpg")}
BAD = {
    "missing": record(3, "none.jpg"),
    "not_a_record": 5,
    "no_answer": {"id": 6, "conversations": []},
    "empty_answer": record(7, conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": " "}]),
    "speakers": record(8, conversations=[{"from": "human", "value": "q"}] * 2),
    "placeholders": record(9, "good.jpg", conversations=record(9)["conversations"]),
    "outside_root": record(10, "../../etc/passwd"),
    "link_loop": record(11, "loop.jpg"),
    "empty_file": record(12, "empty.jpg"),
}
ONLY_INSIDE = {"corrupt": record(13, "text.jpg"), "no_frames": record(14, "text.mp4", "video")}


@pytest.fixture(scope="module")
def media_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    picture(folder / "good.jpg")
    (folder / "empty.jpg").touch()
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "text.jpg").write_text("no picture")
    (folder / "text.mp4").write_text("no clip")
    return folder


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from([*GOOD, *GOOD, *BAD, *ONLY_INSIDE]), max_size=60),
    check=st.sampled_from(["exists", "header", "full"]),
    suffix=st.sampled_from([".json", ".jsonl"]),
)
def test_exactly_the_good_ones_are_kept_in_order(tmp_path_factory, media_folder, kinds, check, suffix):
    folder = tmp_path_factory.mktemp("mix")
    kinds = ["text", *kinds]
    every = GOOD | BAD | ONLY_INSIDE
    content = [
        every[kind] | {"id": f"{n}-{kind}"} if isinstance(every[kind], dict) else every[kind]
        for n, kind in enumerate(kinds)
    ]
    write_data(folder / f"data{suffix}", content)
    mix_file = write_mix(folder, {"json_path": f"data{suffix}", "media_root": str(media_folder)})
    report = run_mix(mix_file, folder / "s.jsonl", check=check, workers=2, rejects=folder / "bad.jsonl")
    fine = set(GOOD) | (set(ONLY_INSIDE) if check == "exists" else set())
    assert [s.id for s in read_samples(folder / "s.jsonl")] == [f"{n}-{k}" for n, k in enumerate(kinds) if k in fine]
    rejected = lines(folder / "bad.jsonl")
    assert [row["record"] for row in rejected] == [n for n, kind in enumerate(kinds) if kind not in fine]
    for row in rejected:
        expected = kinds[row["record"]]
        assert row["reason"] == expected or (expected == "no_frames" and row["reason"] == "corrupt")
        assert row["reason"] in REASONS
    assert report.dropped.total() == len(rejected)


def test_on_bad_fail_lists_all_and_writes_nothing(tmp_path, images):
    mix_file = write_mix(tmp_path, {"json_path": "images/llava.json"})
    result = mix(mix_file, "-o", tmp_path / "s.jsonl", "--on-bad", "fail", "--check", "exists")
    assert result.exit_code == 1 and not (tmp_path / "s.jsonl").exists()
    assert "1 of 7 records are bad, and no samples were written" in result.stderr
    assert f"{images}/llava.json, line" in result.stderr and "id 5" in result.stderr
    listed = mix(mix_file, "-o", tmp_path / "s.jsonl", "--on-bad", "fail", "--rejects", tmp_path / "bad.jsonl")
    assert listed.exit_code == 1 and len(lines(tmp_path / "bad.jsonl")) == 1
    assert not (tmp_path / "s.jsonl").exists()


def test_a_check_that_takes_too_long(tmp_path):
    Image.new("RGB", (8000, 8000)).save(tmp_path / "slow.png", compress_level=1)
    picture(tmp_path / "a.jpg")
    write_data(tmp_path / "data.json", [record(1, "slow.png"), record(2, "a.jpg"), record(3)])
    mix_file = write_mix(tmp_path, {"json_path": "data.json"})
    report = run_mix(
        mix_file, tmp_path / "s.jsonl", check="full", workers=1, time_limit=0.1, rejects=tmp_path / "b.jsonl"
    )
    assert "timeout" in report.dropped
    assert "slow.png: the check took more than 0.1 s" in lines(tmp_path / "b.jsonl")[0]["detail"]
    patient = run_mix(mix_file, tmp_path / "s.jsonl", check="full", workers=1, force=True)
    assert patient.kept == 3, "a time-out is not remembered"


# --- the form of MindFormers


def test_byte_for_byte_what_the_original_writes(tmp_path, images):
    content = json.loads((images / "llava.json").read_text()) * 400  # several chunks
    write_data(images / "llava.json", content)
    mix_file = write_mix(tmp_path, {"json_path": str(images / "llava.json")})
    result = mix(mix_file, "-o", tmp_path / "processed.json", "--check", "exists", "--workers", 2)
    assert result.exit_code == 0
    expected = []
    for entry in content:
        if "image" in entry and not (images / entry["image"]).is_file():
            continue
        turns = [dict(turn) for turn in entry["conversations"]]
        path = f"{images}/{entry['image']}" if "image" in entry else ""
        turns[0]["value"] = f"{OPEN}{path}{CLOSE}{turns[0]['value']}"
        for turn in turns[1:]:
            turn["value"] = "<text>" + turn["value"]
        expected.append({"conversations": turns})
    assert (tmp_path / "processed.json").read_text() == json.dumps(expected, indent=2, ensure_ascii=False)
    back = read_samples(tmp_path / "processed.json")
    assert len(back) == len(expected) and back[0].media[0].path == f"{images}/coco/0.jpg"


# --- lengths


def test_token_counts(tmp_path, make_tokenizer_folder):
    from llavanext_cli.config.architecture import Architecture
    from llavanext_cli.config.hf_config import architecture_to_hf
    from llavanext_cli.processing.processor import Processor
    from llavanext_cli.processing.tokenizer import load_tokenizer

    folder = make_tokenizer_folder()
    tokens = json.loads((folder / "added_tokens.json").read_text())
    arch = Architecture(image_token_index=tokens["<image>"], video_token_index=tokens["<video>"])
    (folder / "config.json").write_text(json.dumps(architecture_to_hf(arch)))
    picture(tmp_path / "small.jpg", (336, 336))
    picture(tmp_path / "wide.jpg", (640, 480))
    write_data(tmp_path / "data.json", [record(1, "small.jpg"), record(2, "wide.jpg"), record(3)])
    mix_file = write_mix(tmp_path, {"json_path": "data.json"})
    report = run_mix(
        mix_file, tmp_path / "s.jsonl", tokenizer=folder, max_tokens=2000, workers=1, rejects=tmp_path / "b.jsonl"
    )
    assert [s.id for s in read_samples(tmp_path / "s.jsonl")] == ["1", "3"]
    assert dict(report.dropped) == {"too_long": 1}
    (row,) = lines(tmp_path / "b.jsonl")
    run_mix(mix_file, tmp_path / "all.jsonl", workers=1)
    file = read_samples(tmp_path / "all.jsonl")
    counts = [Processor(arch, load_tokenizer(folder)).measure(sample, file.roots).tokens for sample in file]
    assert row["detail"] == f"the sample has {counts[1]} tokens, and 2000 fit"
    assert sorted(report.tokens.elements()) == sorted(counts)
    shown = report.to_dict()["tokens"]
    assert (shown["longest"], shown["too_long"], shown["total"]) == (counts[1], 1, sum(counts))

    told = mix(mix_file, "-o", tmp_path / "x.jsonl", "--tokenizer", folder, "--preset", "video-7b-stage2")
    assert told.exit_code == 0 and "The longest sample has" in told.stderr and " fit: 0 are too long" in told.stderr
    no_sizes = mix(mix_file, "-o", tmp_path / "y.jsonl", "--tokenizer", folder, "--check", "exists")
    assert no_sizes.exit_code == 1 and "counting tokens needs the sizes of images" in no_sizes.stderr
    no_tokenizer = mix(mix_file, "-o", tmp_path / "y.jsonl", "--max-tokens", 5)
    assert no_tokenizer.exit_code == 1 and "counting tokens needs a tokenizer" in no_tokenizer.stderr


# --- bad input


def test_faults_of_files_are_one_line_a_hint_and_nothing_left(tmp_path, images):
    def fails(mix_file: Path, says: str, *more: object, out: Path | None = None) -> None:
        before = sorted(tmp_path.rglob("*"))
        result = mix(mix_file, "--out", out or tmp_path / "s.jsonl", *more)
        assert result.exit_code == 1, result.stdout
        assert says in result.stderr and "Hint: " in result.stderr and "Traceback" not in result.stderr
        assert result.stdout == ""
        assert sorted(tmp_path.rglob("*")) == before

    good = write_mix(tmp_path, {"json_path": "images/llava.json"})
    fails(good, "the folder " + str(tmp_path / "none") + " does not exist", out=tmp_path / "none" / "s.jsonl")
    fails(good, "is a folder, not a file", out=images)
    fails(good, "two outputs have the same name", "--rejects", tmp_path / "s.jsonl")
    fails(good, "two outputs have the same name", "--report", tmp_path / "s.html", out=tmp_path / "s.html")
    fails(good, "two outputs have the same name", "--rejects", images / ".." / "s.jsonl")
    fails(good, "two outputs have the same name", "--rejects", tmp_path / "s.jsonl.cache")
    os.mkfifo(tmp_path / "pipe")
    fails(good, "is a device or a pipe", "--force", out=tmp_path / "pipe")
    assert not (tmp_path / "pipe").is_file()  # nor would be /dev/null, for root
    fails(good, "writing there would damage the input", "--force", out=images / "llava.json")
    fails(good, "writing there would damage the input", "--force", "--rejects", good)
    for more in ((), ("--force",)):
        fails(good, "exists and is not a mix", *more, out=images / "coco" / "0.jpg")
        fails(good, "exists and is not a list of rejected records", *more, "--rejects", images / "coco" / "0.jpg")
    html = (images / "coco" / "0.jpg").rename(images / "coco" / "0.html")
    fails(good, "exists and is not a report", "--force", "--report", html)
    fails(good, "the report is an HTML page", "--report", tmp_path / "r.png")
    fails(good, "-: a mix cannot write to stdout", out=Path("-"))
    fails(good, "-: a mix cannot write to stdout", "--rejects", "-")
    fails(tmp_path / "none.yaml", "no such mix file")
    (tmp_path / "there.jsonl").write_text("mine")
    fails(good, "there.jsonl exists and is not a mix", out=tmp_path / "there.jsonl")
    assert (tmp_path / "there.jsonl").read_text() == "mine"

    (tmp_path / "cut.json").write_text((images / "llava.json").read_text()[:700])
    fails(write_mix(tmp_path, {"json_path": "cut.json"}), "cut.json, line ")
    fails(write_mix(tmp_path, {"json_path": "none.json"}), "none.json does not exist")
    fails(write_mix(tmp_path, {"json_path": "images/llava.json", "sampling_strategy": "first:101%"}), "more than 100 %")
    fails(
        write_mix(tmp_path, {"json_path": "images/llava.json", "sampling_strategy": "end:0"}), "has no records at all"
    )
    (tmp_path / "empty.json").write_text("[]")
    fails(write_mix(tmp_path, {"json_path": "empty.json"}), "has no records at all")


def test_all_records_bad_is_an_error(tmp_path):
    write_data(tmp_path / "data.json", [record(1, "a.jpg"), record(2, "b.jpg")])
    result = mix(write_mix(tmp_path, {"json_path": "data.json"}), "-o", tmp_path / "s.jsonl", "--check", "exists")
    assert result.exit_code == 1 and "all 2 records are bad" in result.stderr and "media_root" in result.stderr
    assert not (tmp_path / "s.jsonl").exists()
    mix(tmp_path / "mix.yaml", "-o", tmp_path / "s.jsonl")
    assert not (tmp_path / "s.jsonl.cache").exists(), "no file was checked, and an empty cache is of no use"


def test_a_mix_replaces_what_a_mix_has_written(tmp_path, images):
    mix_file = write_mix(tmp_path, {"json_path": "images/llava.json"})
    more = ("--force", "--rejects", tmp_path / "bad.jsonl", "--report", tmp_path / "mix.html")
    for name, other in (("s.jsonl", "llavanext"), ("s.jsonl", "mindformers"), ("s.json", "mindformers")):
        for _ in range(2):
            result = mix(mix_file, "-o", tmp_path / name, "--format", other, *more)
            assert result.exit_code == 0, result.stderr


def test_a_number_that_json_does_not_have_is_named(tmp_path):
    write_data(tmp_path / "data.json", [record(1), record(2, score=float("nan"))])
    mix_file = write_mix(tmp_path, {"json_path": "data.json"})
    result = mix(mix_file, "-o", tmp_path / "s.jsonl", "--on-bad", "fail")
    assert result.exit_code == 1 and "NaN or Infinity" in result.stderr and "Unicode" not in result.stderr


def test_the_folder_is_asked_for_only_where_files_are_missing(tmp_path):
    write_data(tmp_path / "data.json", ["no record"])
    result = mix(write_mix(tmp_path, {"json_path": "data.json"}), "-o", tmp_path / "s.jsonl")
    assert result.exit_code == 1 and "--rejects FILE" in result.stderr and "media_root" not in result.stderr


def test_usage_errors(tmp_path):
    assert mix(tmp_path / "mix.yaml").exit_code == 2
    assert mix(tmp_path / "mix.yaml", "-o", "x", "--check", "some").exit_code == 2
    assert mix(tmp_path / "mix.yaml", "-o", "x", "--seed", "-5").exit_code == 2
    assert mix(tmp_path / "mix.yaml", "-o", "x", "--workers", "0").exit_code == 2
    assert mix(tmp_path / "mix.yaml", "-o", "x", "--workers", "2000").exit_code == 2
    assert mix(tmp_path / "mix.yaml", "-o", "x", "--time-limit", "nan").exit_code == 2
    assert mix(tmp_path / "mix.yaml", "-o", "x", "--time-limit", "inf").exit_code == 2
    assert mix(tmp_path / "mix.yaml", "-o", "x", "--frames", "999999999").exit_code == 2


def test_names_that_are_not_unicode(tmp_path):
    """Linux allows any bytes in a name. An output may have such a name; a root that JSON has to hold may not."""
    write_data(tmp_path / "data.json", [record(1)])
    odd = tmp_path / os.fsdecode(b"odd\xff")
    odd.mkdir()
    good = write_mix(tmp_path, {"json_path": "data.json"})
    assert mix(good, "-o", odd / os.fsdecode(b"\xfe.jsonl")).exit_code == 0
    (tmp_path / "data.json").rename(odd / "data.json")
    good.rename(odd / "mix.yaml")
    refused = mix(odd / "mix.yaml", "-o", tmp_path / "s.jsonl")
    assert refused.exit_code == 1 and "is not Unicode, and JSON cannot hold it" in refused.stderr
    assert not (tmp_path / "s.jsonl").exists()
    write_data(odd / os.fsdecode(b"data\xff.jsonl"), [record(1), record(True, "none.jpg")])
    linked = tmp_path / "mix.yaml"
    linked.write_bytes(b'datasets: [{json_path: "odd\\udcff/data\\udcff.jsonl", media_root: .}]')
    result = mix(linked, "-o", tmp_path / "s.jsonl", "--rejects", tmp_path / "bad.jsonl")
    assert result.exit_code == 0 and len(read_samples(tmp_path / "s.jsonl")) == 1
    (bad,) = lines(tmp_path / "bad.jsonl")
    assert bad["id"] == "true" and bad["file"].endswith("data\N{REPLACEMENT CHARACTER}.jsonl")


def test_a_disk_without_room(tmp_path):
    """A limit on the size of files stands for the full disk: both end in an OSError from write."""
    write_data(tmp_path / "data.json", [record(n, text="x" * 900) for n in range(4000)])
    mix_file = write_mix(tmp_path, {"json_path": "data.json"})
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from llavanext_cli.app import main; main()"
    )
    command = [sys.executable, "-c", code, "mix", str(mix_file), "-o", str(tmp_path / "s.jsonl"), "--check", "none"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "s.jsonl cannot be written: File too large" in result.stderr and "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "mix.yaml"]


def test_a_disk_that_is_full_in_the_end_leaves_nothing(tmp_path, monkeypatch):
    write_data(tmp_path / "data.json", [record(1), record(2, "none.jpg")])
    mix_file = write_mix(tmp_path, {"json_path": "data.json"})
    true_replace = os.replace

    def replace(source: Path, target: Path) -> None:
        if target.name == "r.html":
            raise OSError(28, "No space left on device")
        true_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    more = ["--check", "exists", "--rejects", tmp_path / "bad.jsonl", "--report", tmp_path / "r.html"]
    result = mix(mix_file, "-o", tmp_path / "s.jsonl", *more)
    assert result.exit_code == 1 and "r.html cannot be written: No space left on device" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "mix.yaml"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_ended_from_outside(tmp_path, number, code):
    Image.new("RGB", (8000, 8000)).save(tmp_path / "0.png", compress_level=1)
    for n in range(1, 60):
        os.link(tmp_path / "0.png", tmp_path / f"{n}.png")
    write_data(tmp_path / "data.json", [record(n, f"{n}.png") for n in range(60)])
    mix_file = write_mix(tmp_path, {"json_path": "data.json"})
    command = [
        sys.executable,
        "-m",
        "llavanext_cli",
        "mix",
        str(mix_file),
        "-o",
        str(tmp_path / "s.jsonl"),
        "--check",
        "full",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".s.jsonl.*.partial*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (code, "")
    assert "Traceback" not in stderr and ("Interrupted" in stderr) == (code == 130)
    left = {path.name for path in tmp_path.iterdir()} - {f"{n}.png" for n in range(60)}
    assert left == {"data.json", "mix.yaml", "s.jsonl.cache"}


def test_the_plain_function_refuses_words_it_does_not_know(tmp_path):
    for wrong in ({"check": "all"}, {"on_bad": "keep"}, {"format": "xml"}):
        with pytest.raises(ValueError, match="is one of"):
            run_mix(tmp_path / "mix.yaml", tmp_path / "s.jsonl", **wrong)
    write_data(tmp_path / "data.json", [record(1, "../a.jpg")])
    with pytest.raises(DataError, match="all 1 records are bad"):
        run_mix(write_mix(tmp_path, {"json_path": "data.json"}), tmp_path / "s.jsonl", check="none")


def test_the_benchmark_runs(tmp_path):
    """At a size where its ratios mean nothing; that it measures both sides and finds all records is what counts."""
    pytest.importorskip("cv2")
    script = Path(__file__).parents[1] / "benchmarks" / "bench_mix.py"
    command = [
        sys.executable,
        str(script),
        "--records",
        "320",
        "--clips",
        "2",
        "--workers",
        "1",
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run([*command, "--json", str(tmp_path / "b.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "b.json").read_text())
    assert [part["count"] for part in numbers.values()] == [320, 2]
    for part in numbers.values():
        assert part["faster"] > 0 and part["original"]["mebibytes"] > 5 and part["workers"]["1"]["mebibytes"] > 20
    assert "of the memory" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]

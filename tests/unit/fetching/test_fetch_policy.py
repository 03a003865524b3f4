"""What may be reached, what may be shown, what is known by name, and what comes next."""

from __future__ import annotations

import hashlib
import logging
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llavanext_cli.errors import ConfigError, DataError, FetchError
from llavanext_cli.fetching.digest import Expected, Follower, hash_file
from llavanext_cli.fetching.guard import PRIVATE, PUBLIC, UNKNOWN, check_redirect, reach_of
from llavanext_cli.fetching.nextsteps import next_commands
from llavanext_cli.fetching.paths import matches, matches_loosely, normal, unsafe
from llavanext_cli.fetching.plan import select_files
from llavanext_cli.fetching.redaction import cause_of, no_secrets, public_url, redact
from llavanext_cli.fetching.registry import ARTIFACTS, DATASET, HUB, MODEL, MODELSCOPE, find_artifact
from llavanext_cli.fetching.remote import Listing, Origin, RemoteFile


@pytest.mark.parametrize(
    ("host", "reach"),
    [
        ("127.0.0.1", PRIVATE),
        ("localhost", PRIVATE),
        ("LOCALHOST.", PRIVATE),
        ("x.localhost", PRIVATE),
        ("printer.local", PRIVATE),
        ("10.0.0.1", PRIVATE),
        ("172.31.9.9", PRIVATE),
        ("192.168.1.1", PRIVATE),
        ("169.254.169.254", PRIVATE),
        ("100.64.0.1", PRIVATE),
        ("0.0.0.0", PRIVATE),
        ("224.0.0.1", PRIVATE),
        ("[::1]", PRIVATE),
        ("::ffff:127.0.0.1", PRIVATE),
        ("fe80::1", PRIVATE),
        ("fd00::1", PRIVATE),
        ("2002:7f00:1::", PRIVATE),
        ("127.1", PRIVATE),
        ("2130706433", PRIVATE),
        ("0x7f.0.0.1", PRIVATE),
        ("8.8.8.8", PUBLIC),
        ("2606:4700::1111", PUBLIC),
        ("huggingface.co", UNKNOWN),
    ],
)
def test_reach(host, reach):
    assert reach_of(host, resolve=False) == reach


def test_a_name_that_resolves_to_both_kinds_is_private(monkeypatch):
    import socket

    answers = [(socket.AF_INET, 1, 6, "", (ip, 0)) for ip in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **named: answers)
    assert reach_of("both.example", resolve=True) == PRIVATE
    with pytest.raises(FetchError, match=r"redirects to the private address both\.example"):
        check_redirect("https://8.8.8.8/a", "https://both.example/b", is_proxied=direct)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **named: answers[:1])
    check_redirect("https://8.8.8.8/a", "https://both.example/b", is_proxied=direct)


def proxied(url: str) -> bool:
    return True


def direct(url: str) -> bool:
    return False


def test_redirects():
    check_redirect("http://127.0.0.1:1/a", "http://10.0.0.1/b", is_proxied=proxied)
    check_redirect("http://8.8.8.8/a", "https://8.8.8.8/b", is_proxied=proxied)
    check_redirect("https://8.8.8.8/a", "/b", is_proxied=proxied)
    with pytest.raises(FetchError, match=r"from https to http"):
        check_redirect("https://8.8.8.8/a", "http://8.8.4.4/b", is_proxied=proxied)
    with pytest.raises(FetchError, match=r"private address 2130706433"):
        check_redirect("http://8.8.8.8/a", "//2130706433/b", is_proxied=proxied)
    with pytest.raises(FetchError, match=r"not on the web"):
        check_redirect("http://8.8.8.8/a", "http://[::1/b", is_proxied=proxied)
    with pytest.raises(FetchError, match=r"files\.example is public and redirects to the private address 10\.0\.0\.1"):
        check_redirect("http://files.example/a", "http://10.0.0.1/b", is_proxied=proxied)
    with pytest.raises(FetchError, match=r"private address 127\.0\.0\.1"):  # which NO_PROXY names
        check_redirect("http://files.example/a", "http://127.0.0.1/b", is_proxied=lambda url: "files" in url)


# -------------------------------------------------------------------------------------------------------------- secrets


SECRETS = [
    "GET https://cdn.example/x?X-Amz-Signature=topsecret&Expires=1 failed",
    "proxy http://user:topsecret@proxy:3128 is down",
    "Authorization: Bearer topsecretABC.def",
    "token hf_topsecrettopsecret was refused",
    "url: /repo/file?sig=topsecret (Caused by x)",
    "HTTPSConnectionPool(host='h', port=443): Max retries exceeded with url: /f?token=topsecret",
]


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_taken_out(text, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "topsecretABC.def")
    assert "topsecret" not in redact(text) and len(redact(text)) > 15
    assert "topsecret" not in str(cause_of(ValueError(text)))


def test_what_is_no_secret_stays():
    assert redact("hf_transfer and hf_hub_download") == "hf_transfer and hf_hub_download"
    text = "cannot write to /data/x: what? no room (see https://host/path for more)"
    assert redact(text) == text


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://u:p@host:1/a?id=7", "https://host:1/a?id=7"),
        ("https://host/a?sig=x&id=7", "https://host/a"),
        ("https://host/a?x=" + "a" * 50, "https://host/a"),
        ("https://host/a#b", "https://host/a"),
    ],
)
def test_addresses_that_are_written_down(url, public):
    assert public_url(url) == public


def test_a_bug_s_traceback_and_log_lines_hold_no_secret(monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "topsecretABC")
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("huggingface_hub").addHandler(handler)
    try:
        with pytest.raises(KeyError) as caught, no_secrets():
            logging.getLogger("huggingface_hub").error("asked %s", "https://h/x?sig=topsecret")
            try:
                raise ValueError("token topsecretABC", {"authorization": "Bearer topsecretABC"})
            except ValueError as fault:
                raise KeyError("https://h/x?token=topsecret") from fault
    finally:
        logging.getLogger("huggingface_hub").removeHandler(handler)
    import traceback

    text = "".join(traceback.format_exception(caught.value))
    assert "ValueError" in text and "topsecret" not in text.replace("HF_TOKEN", "").split("Traceback", 1)[1].replace(
        'raise ValueError("token topsecretABC", {"authorization": "Bearer topsecretABC"})', ""
    ).replace('raise KeyError("https://h/x?token=topsecret") from fault', "").replace(
        '"https://h/x?sig=topsecret")', ""
    )
    assert lines == ["asked https://h/x?…"]


# ---------------------------------------------------------------------------------------------------------------- names


@given(st.text(max_size=40))
def test_a_safe_name_stays_in_its_folder(name):
    if not unsafe(name):
        path = Path("/any/folder") / normal(name)
        assert path.is_relative_to("/any/folder") and path != Path("/any/folder")
        assert ".." not in path.parts and "\0" not in name


def test_globs():
    assert matches("a.json", "*.json") and not matches("onnx/a.json", "*.json") and matches("x/y", "**")
    assert matches_loosely("onnx/a.json", "*.json") and matches_loosely("onnx/a.json", "onnx/*")
    assert matches_loosely("d/chat_template.json", "chat_template.*") and not matches_loosely("a", "b")


def test_the_registry_is_whole():
    names = (
        "video-7b video-7b-tokenizer v1.6-vicuna-7b vicuna-7b clip-vit-l-336 mix665k coco-train2017 video178k-academic"
    )
    assert list(ARTIFACTS) == names.split()
    for artifact in ARTIFACTS.values():
        assert artifact.size and artifact.purpose and artifact.licence and (artifact.hub or artifact.web)
        place = artifact.hub
        assert place is None or len(place.revision) == 40 or place.revision == "main"
    assert ARTIFACTS["coco-train2017"].web.size == 19_336_861_798
    assert [a.name for a in ARTIFACTS.values() if a.hub and a.hub.revision == "main"] == [
        "video-7b",
        "video-7b-tokenizer",
    ]


def offered(*paths: str) -> Listing:
    files = tuple(RemoteFile(p, Expected(1, "0" * 64), Origin(HUB, "e", "o/r", MODEL, "c", p)) for p in paths)
    return Listing(HUB, "e/o/r", "main", "c", files)


HUGGING_FACE_FOLDER = [
    *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
]


def test_what_of_a_repository_is_wanted():
    listing = offered(*HUGGING_FACE_FOLDER, "README.md", ".gitattributes", "onnx/model.safetensors", "demo.png")
    picked = [w.path for w in select_files(ARTIFACTS["video-7b"], listing, (), frozenset())]
    assert picked == HUGGING_FACE_FOLDER
    picked = [w.path for w in select_files(ARTIFACTS["video-7b-tokenizer"], listing, (), frozenset())]
    assert picked == [name for name in HUGGING_FACE_FOLDER if "safetensors" not in name]
    clip = offered("pytorch_model.bin", "tf_model.h5", "config.json", "merges.txt", "flax_model.msgpack")
    picked = [w.path for w in select_files(ARTIFACTS["clip-vit-l-336"], clip, (), frozenset())]
    assert picked == ["pytorch_model.bin", "config.json", "merges.txt"]
    both = offered("pytorch_model.bin", "model.safetensors", "config.json")
    picked = [w.path for w in select_files(ARTIFACTS["clip-vit-l-336"], both, (), frozenset())]
    assert picked == ["model.safetensors", "config.json"]


def test_the_video_set_s_files_and_shards():
    tars = [f"0_30_s_academic_v0_1_videos_{n}.tar.gz" for n in range(1, 9)]
    texts = [f"0_30_s_academic_{name}.json" for name in ("oe_v0_1_qa_processed", "mc_v0_1_qa_processed")]
    texts.append("0_30_s_academic_v0_1_cap_processed.json")
    artifact = ARTIFACTS["video178k-academic"]
    everything = select_files(artifact, offered(*texts, *tars, "x.md"), (), frozenset())
    assert [w.path for w in everything] == [*texts, *tars]
    assert [w.path for w in everything if w.unpacking] == tars
    some = select_files(artifact, offered(*texts, *tars), (), frozenset([1, 8]))
    assert [w.path for w in some] == [*texts, tars[0], tars[7]]


def test_names_that_users_type():
    assert find_artifact("org/repo").hub.kind == MODEL and find_artifact("dataset:org/repo").hub.kind == DATASET
    web = find_artifact("https://user:secret@host:8/d/a%20b.zip?token=secret#sha256=" + "A" * 64)
    assert web.web.name == "a b.zip" and web.web.sha256 == "a" * 64
    assert web.name == "https://host:8/d/a%20b.zip"
    for name in (
        "nope",
        "a/b/c",
        "../x/y",
        "/a/b",
        "space:a/b",
        "a/..",
        "",
        "https://",
        "https://host",
        "https://host/",
    ):
        with pytest.raises(ConfigError) as caught:
            find_artifact(name)
        assert caught.value.hint
    for address in ("https://h/a#md5=1", "https://h/a#sha256=zz", "https://[h/a", "https://h:x/a", "https://h/.."):
        with pytest.raises(ConfigError):
            find_artifact(address)
    for wrong, right in {
        "video7b": "video-7b",
        "coco": "coco-train2017",
        "llava-next-video-7b-hf": "LLaVA-NeXT-Video",
    }.items():
        with pytest.raises(ConfigError) as caught:
            find_artifact(wrong)
        assert right in caught.value.hint


def test_origins_from_outside_are_checked():
    good = Origin(HUB, "https://h", "o/r", MODEL, "c", "p")
    assert Origin.from_dict(good.to_dict()) == good
    for data in (None, [], {"source": "file"}, {"source": HUB}, {"source": "url"}, good.to_dict() | {"path": 1}):
        with pytest.raises(DataError):
            Origin.from_dict(data)
    with pytest.raises(DataError):
        Origin.from_dict(good.to_dict() | {"more": "x"})


# -------------------------------------------------------------------------------------------------------------- digests


def test_digests_are_those_of_sha256sum_and_git(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"what is up, doc?")
    found = hash_file(path, want_git=True)
    assert found.git_blob == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"  # from the book "Pro Git"
    assert found.sha256 == subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout[:64]
    assert Expected(16, found.sha256.upper()).fault(found) == "" and "17" in Expected(17).fault(found)
    assert "sha256" in Expected(16, "0" * 64).fault(found) and "git" in Expected(16, "", "0" * 40).fault(found)


def test_a_digest_follows_a_file_that_grows_and_one_that_is_begun_anew(tmp_path):
    data = bytes(range(256)) * 20_000
    for begin_anew in (False, True):
        path = tmp_path / f"{begin_anew}"
        follower = Follower()
        with open(path, "wb") as file:
            follower.follow(lambda path=path: __import__("os").open(path, 0))
            if begin_anew:
                file.write(b"x" * 3_000_000)
                file.flush()
                follower.advance(3_000_000)
                file.seek(0)
                file.truncate()
            for at in range(0, len(data), 500_000):
                file.write(data[at : at + 500_000])
                follower.advance(at)
        assert follower.finish(path).sha256 == hashlib.sha256(data).hexdigest()


# ----------------------------------------------------------------------------------------------------------- next steps


WEIGHTS = ("config.json", "model.safetensors")


def test_the_next_command_of_each_artifact():
    here = Path("/data/my models/video-7b")
    assert next_commands({"video-7b": WEIGHTS}, here) == [
        "llavanext convert '/data/my models/video-7b' '/data/my models/video-7b-mindspore'"
    ]
    assert next_commands({"video-7b": ("config.json",), "x/y": WEIGHTS}, here) == []
    assert next_commands({"video-7b": WEIGHTS}, here, {"video-7b"}) == []
    assert next_commands({"vicuna-7b": ("pytorch_model-1.bin",)}, Path("/d/vicuna-7b")) == [
        "llavanext fetch clip-vit-l-336 --to /d/clip-vit-l-336",
        "llavanext convert --vision /d/clip-vit-l-336 --language /d/vicuna-7b /d/base-mindspore",
    ]
    assert next_commands({"clip-vit-l-336": WEIGHTS}, Path("/d/vicuna-7b"))[0].endswith("--to /d/vicuna-7b-vicuna-7b")
    assert next_commands({"coco-train2017": ("coco/train2017.zip",)}, Path("/d")) == ["llavanext fetch mix665k --to /d"]
    assert next_commands({"mix665k": ("llava_v1_5_mix665k.json",)}, Path("/d"))[0] == (
        "llavanext fetch coco-train2017 --to /d"
    )


@pytest.mark.parametrize("names", [["video-7b-tokenizer"], ["video-7b-tokenizer", "video-7b"]])
def test_the_tokenizer_s_next_command_counts_tokens(names):
    commands = next_commands(dict.fromkeys(names, WEIGHTS), Path("/d/tokenizer"))
    if len(names) == 1:
        assert commands[0] == "llavanext fetch mix665k coco-train2017 --to /d/images"
        assert commands[-1].endswith("--out /d/images/mix665k.samples.jsonl --tokenizer /d/tokenizer")
    else:
        assert commands == ["llavanext convert /d/tokenizer /d/tokenizer-mindspore"]


@pytest.mark.parametrize("name", ["plain", "with space", 'it\'s "quoted" 100%s\\n', "ünïcode", "-dash"])
def test_the_mix_file_that_is_suggested_can_be_written_and_read(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    fetched = {"mix665k": ("llava_v1_5_mix665k.json",), "coco-train2017": ("coco/train2017.zip",)}
    write, mix = next_commands(fetched, folder)
    subprocess.run(["sh", "-c", write], check=True)
    recipe = folder / "mix665k.yaml"
    assert yaml.safe_load(recipe.read_text()) == {
        "datasets": [{"json_path": str(folder / "llava_v1_5_mix665k.json"), "sampling_strategy": "all"}]
    }
    assert shlex.split(mix)[:3] == ["llavanext", "mix", str(recipe)]


def test_the_suggested_commands_are_commands(tmp_path):
    """Each one is understood by the command it names: it gets as far as the folder that is not there."""
    from typer.testing import CliRunner

    from llavanext_cli.app import app

    paths = ("x.safetensors", "llava_v1_5_mix665k.json")
    commands = next_commands(dict.fromkeys(ARTIFACTS, paths), tmp_path / "d")
    commands += next_commands({"video-7b-tokenizer": paths}, tmp_path / "d")
    assert {shlex.split(command)[1] for command in commands if command.startswith("llavanext")} >= {
        "convert",
        "mix",
        "fetch",
    }
    for command in commands:
        words = shlex.split(command)
        if words[0] == "llavanext" and words[1] != "fetch":
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 1, (command, result.output)  # not 2: no usage error


def test_modelscope_names_are_found_for_modelscope():
    from llavanext_cli.fetching.registry import near_names

    assert "swift/LLaVA-NeXT-Video-7B-hf" in near_names("swift/LLaVA-NeXT-Video-7B", MODELSCOPE)
    assert "swift/" not in near_names("swift/LLaVA-NeXT-Video-7B", HUB)

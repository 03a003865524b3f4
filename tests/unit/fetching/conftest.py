"""Nothing in these tests may reach a real network, the user's token or the user's cache."""

from __future__ import annotations

import hashlib

import pytest

from llavanext_cli.fetching.registry import ARTIFACTS, DATASET, Artifact, Place, Unpacking, WebFile
from tests.unit.fetching.folders import ANSWERS, IMAGES, VIDEOS, make_tar, make_zip
from tests.unit.fetching.loopback import FileSite, HubSite


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path_factory):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "HF_ENDPOINT", "MODELSCOPE_DOMAIN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    home = tmp_path_factory.mktemp("hf-home")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # a cut costs a chunk, and these files are small


@pytest.fixture
def images(monkeypatch):
    """A site with a zip as COCO's, and its artifact."""
    data = make_zip(IMAGES)
    with FileSite({"/zips/train2017.zip": data}) as site:
        web = WebFile(site.url("/zips/train2017.zip"), len(data), hashlib.sha256(data).hexdigest())
        rule = Unpacking("coco/train2017.zip", "coco", ("train2017",))
        artifact = Artifact("images", "", "", web=web, under="coco", include=("train2017.zip",), unpacking=rule)
        monkeypatch.setitem(ARTIFACTS, "images", artifact)
        site.artifact = "images"
        yield site


@pytest.fixture
def videos(monkeypatch):
    """A Hub with a data set as LLaVA-Video-178K's, and its artifact."""
    with HubSite() as hub:
        data = {"set/0_30_s_academic_oe_v0_1_qa_processed.json": ANSWERS, "other/x.json": b"no", "README.md": b"no"}
        for number, shard in enumerate(VIDEOS, 1):
            data[f"set/x_videos_{number}.tar.gz"] = make_tar(shard)
        hub.add("org/videos", data, DATASET)
        artifact = Artifact(
            "videos",
            "",
            "",
            hub=Place("org/videos", DATASET, folder="set"),
            include=("*.json", "*_videos_*.tar.gz"),
            shards=r"_videos_(\d+)\.tar\.gz$",
            unpacking=Unpacking("*.tar.gz", "", ("academic_source",)),
        )
        monkeypatch.setitem(ARTIFACTS, "videos", artifact)
        hub.artifact = "videos"
        yield hub

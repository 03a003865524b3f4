"""Nothing in these tests may reach a real network, the user's token or the user's cache."""

from __future__ import annotations

import hashlib

import pytest

from llavanext_cli.fetching.net import Limits, Net
from llavanext_cli.fetching.registry import DATASET, Artifact, Place, Unpacking, WebFile
from tests.unit.fetching.folders import ANSWERS, CLIPS, PICTURES
from tests.unit.fetching.loopback import FileSite, HubSite
from tests.unit.fetching.test_fetch_unpack import make_tar, make_zip


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


@pytest.fixture
def limits() -> Limits:
    """Quick to give up, so that a test that shows how takes seconds."""
    return Limits(connect=2.0, stall=1.0, retries=2, pause=0.02, longest_wait=3.0)


@pytest.fixture
def net(limits) -> Net:
    return Net(limits)


@pytest.fixture
def pictures(tmp_path_factory):
    """A site with a zip as COCO's, and its artifact."""
    data = make_zip(tmp_path_factory.mktemp("zip") / "x", PICTURES).read_bytes()
    with FileSite({"/zips/train2017.zip": data}) as site:
        web = WebFile(site.url("/zips/train2017.zip"), len(data), hashlib.sha256(data).hexdigest())
        rule = Unpacking("coco/train2017.zip", "coco", ("train2017",))
        site.artifact = Artifact("pictures", "", "", web=web, under="coco", include=("train2017.zip",), unpacking=rule)
        yield site


@pytest.fixture
def clips(tmp_path_factory):
    """A Hub with a data set as LLaVA-Video-178K's, and its artifact."""
    folder = tmp_path_factory.mktemp("tar")
    with HubSite() as hub:
        data = {"set/0_30_s_academic_oe_v0_1_qa_processed.json": ANSWERS, "other/x.json": b"no", "README.md": b"no"}
        for number, shard in enumerate(CLIPS, 1):
            data[f"set/x_videos_{number}.tar.gz"] = make_tar(folder / str(number), shard).read_bytes()
        hub.add("org/clips", data, DATASET)
        hub.artifact = Artifact(
            "clips",
            "",
            "",
            hub=Place("org/clips", DATASET, folder="set"),
            include=("*.json", "*_videos_*.tar.gz"),
            shards=r"_videos_(\d+)\.tar\.gz$",
            unpacking=Unpacking("*.tar.gz", "", ("academic_source",)),
        )
        yield hub

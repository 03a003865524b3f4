"""Small data sets as COCO's and LLaVA-Video-178K's, and how a test fetches and checks them."""

from __future__ import annotations

import io
import tarfile
import zipfile

from llavanext_cli.fetching.request import FetchRequest
from llavanext_cli.fetching.run import run_check, run_fetch
from tests.unit.fetching.loopback import content

IMAGES = {f"train2017/{number:012}.jpg": content(30_000, number) for number in range(20)}
VIDEOS = [
    {f"academic_source/part{shard}/{n}.mp4": content(40_000, 10 * shard + n) for n in range(3)} for shard in (1, 2)
]
ANSWERS = b'[{"id": "1"}]'
FETCHED_IMAGES = {f"coco/{name}": data for name, data in IMAGES.items()}
FETCHED_VIDEOS = {"0_30_s_academic_oe_v0_1_qa_processed.json": ANSWERS, **VIDEOS[0], **VIDEOS[1]}


def fetch(site, to, *names, **options):
    """What `llavanext fetch NAMES --to TO` does, impatiently."""
    names = names or (site.artifact,)
    options = {"endpoint": site.endpoint, "timeout": 2.0, "retries": 1, **options}
    return run_fetch(FetchRequest(to=to, names=names, **options))


def check(site, folder, **options):
    """What `llavanext fetch --check FOLDER` does."""
    return run_check(FetchRequest(to=folder, endpoint=site.endpoint, timeout=2.0, retries=1, **options))


def make_zip(files, compression=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def make_tar(files, members=(), mode="w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for entry in members:
            archive.addfile(entry)
    return buffer.getvalue()

"""Small data sets as COCO's and LLaVA-Video-178K's, and how a test fetches them and looks at what came."""

from __future__ import annotations

from pathlib import Path

from llavanext_cli.fetching.net import Limits
from llavanext_cli.fetching.run import run_fetch
from tests.unit.fetching.loopback import content

LIMITS = Limits(connect=2.0, stall=2.0, retries=2, pause=0.02)
PICTURES = {f"train2017/{number:012}.jpg": content(30_000, number) for number in range(60)}
CLIPS = [
    {f"academic_source/part{shard}/{n}.mp4": content(40_000, 10 * shard + n) for n in range(3)} for shard in (1, 2)
]
ANSWERS = b'[{"id": "1"}]'


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".llavanext" not in path.parts
    }


def fetch(site, to, **options):
    options = {"limits": LIMITS, "artifacts": [site.artifact], **options}
    return run_fetch([], to, endpoint=site.endpoint, **options)


COCO = {f"coco/{name}": data for name, data in PICTURES.items()}

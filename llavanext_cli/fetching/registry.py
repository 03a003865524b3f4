"""The artifacts that `fetch` knows by name: where each comes from, at which revision, and where its files go.

This is the only place that names an artifact's repository or address, and its revision. A revision is a commit where
one is known from public records. Where none is, it is a branch ("main"), and the manifest records its commit.

    ARTIFACTS["video178k-academic"] ── hub:        lmms-lab/LLaVA-Video-178K @ 6d8c562…
                                       folder:     0_30_s_academic_v0_1/      (removed from the paths)
                                       include:    *.json, *_videos_*.tar.gz
                                       unpacking:  *.tar.gz ──▶ academic_source/…
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from urllib.parse import unquote, urlsplit

from llavanext_cli.errors import ConfigError
from llavanext_cli.processing.tokenizer import TOKENIZER_FILES

HUB = "hf"
MODELSCOPE = "modelscope"
URL = "url"
MODEL, DATASET = "model", "dataset"

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PICKLED_WEIGHTS = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
MODEL_SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.*",
)


@dataclass(frozen=True)
class Place:
    """A repository of the Hub or of ModelScope.

    Attributes:
        repo: "organisation/name".
        kind: MODEL or DATASET.
        revision: a commit, tag or branch; "" means the source's default branch.
        folder: the part of the repository that is wanted, without slashes around it; removed from the paths.
    """

    repo: str
    kind: str = MODEL
    revision: str = ""
    folder: str = ""


@dataclass(frozen=True)
class WebFile:
    """One file at a plain address, with the digest it must have (empty: not known)."""

    url: str
    size: int = 0
    sha256: str = ""

    @property
    def name(self) -> str:
        return unquote(urlsplit(self.url).path.rpartition("/")[2])


@dataclass(frozen=True)
class Unpacking:
    """What is done with an artifact's archives.

    Attributes:
        pattern: archives, by their path in the folder.
        into: the folder that the members go to ("" is the folder itself).
        tops: names that may stand at the top of the archive. Anything else stops the unpacking.
    """

    pattern: str
    into: str
    tops: tuple[str, ...]


@dataclass(frozen=True)
class Artifact:
    """One thing to fetch.

    Attributes:
        size: bytes to transfer, rounded, for `--list`; 0 when not known.
        under: folder that the files are put in, "" for the folder itself.
        include: globs of the files wanted, against the path below `Place.folder`; a glob without a slash stays at the
            top, and `**` is everything.
        shards: a regular expression with one group, the number of a shard in a file's path; "" when there are none.
    """

    name: str
    purpose: str
    licence: str
    size: int = 0
    hub: Place | None = None
    modelscope: Place | None = None
    web: WebFile | None = None
    under: str = ""
    include: tuple[str, ...] = ("**",)
    shards: str = ""
    unpacking: Unpacking | None = None

    def place(self, source: str) -> Place | None:
        return self.hub if source == HUB else self.modelscope


ARTIFACTS: dict[str, Artifact] = {
    artifact.name: artifact
    for artifact in (
        Artifact(
            name="video-7b",
            purpose="LLaVA-NeXT-Video 7B, ready to convert, fine-tune and ask",
            licence="Llama 2 Community License",
            size=14_130_000_000,
            # No commit of this repository could be confirmed from public records.
            hub=Place("llava-hf/LLaVA-NeXT-Video-7B-hf", revision="main"),
            modelscope=Place("swift/LLaVA-NeXT-Video-7B-hf"),
            include=(*WEIGHTS, *MODEL_SETTINGS, *TOKENIZER_FILES),
        ),
        Artifact(
            name="video-7b-tokenizer",
            purpose="tokenizer and config of video-7b, to count tokens while mixing",
            licence="Llama 2 Community License",
            size=5_000_000,
            hub=Place("llava-hf/LLaVA-NeXT-Video-7B-hf", revision="main"),
            modelscope=Place("swift/LLaVA-NeXT-Video-7B-hf"),
            include=(*MODEL_SETTINGS, *TOKENIZER_FILES),
        ),
        Artifact(
            name="v1.6-vicuna-7b",
            purpose="LLaVA-NeXT 7B for images, a start for training on video",
            licence="Llama 2 Community License",
            size=14_130_000_000,
            hub=Place("llava-hf/llava-v1.6-vicuna-7b-hf", revision="c916e6cdcd760b4cecd1dd4907f84ac649f93b23"),
            modelscope=Place("swift/llava-v1.6-vicuna-7b-hf"),
            include=(*WEIGHTS, *MODEL_SETTINGS, *TOKENIZER_FILES),
        ),
        Artifact(
            name="vicuna-7b",
            purpose="the language model alone, for a base model of your own",
            licence="Llama 2 Community License",
            size=13_480_000_000,
            hub=Place("lmsys/vicuna-7b-v1.5", revision="3321f76e3f527bd14065daf69dad9344000a201d"),
            modelscope=Place("AI-ModelScope/vicuna-7b-v1.5"),
            include=(*WEIGHTS, *PICKLED_WEIGHTS, *MODEL_SETTINGS, *TOKENIZER_FILES),
        ),
        Artifact(
            name="clip-vit-l-336",
            purpose="the vision tower alone, for a base model of your own",
            licence="MIT (OpenAI CLIP)",
            size=1_710_000_000,
            hub=Place("openai/clip-vit-large-patch14-336", revision="ce19dc912ca5cd21c8a653c79e251e808ccabcd1"),
            modelscope=Place("AI-ModelScope/clip-vit-large-patch14-336"),
            include=(*WEIGHTS, *PICKLED_WEIGHTS, *MODEL_SETTINGS, *TOKENIZER_FILES),
        ),
        Artifact(
            name="mix665k",
            purpose="665 K conversations about images (LLaVA-1.5)",
            licence="CC BY 4.0, OpenAI's terms",
            size=1_030_000_000,
            hub=Place("liuhaotian/LLaVA-Instruct-150K", DATASET, "9d451dc7629cfe0469f6ae4432b765cd603d5fcb"),
            modelscope=Place("AI-ModelScope/LLaVA-Instruct-150K", DATASET),
            include=("llava_v1_5_mix665k.json",),
        ),
        Artifact(
            name="coco-train2017",
            purpose="118 K photographs, used by most of mix665k",
            licence="Flickr's terms, photo by photo",
            size=19_336_861_798,
            modelscope=Place("PAI/COCO2017", DATASET),
            web=WebFile(
                "http://images.cocodataset.org/zips/train2017.zip",
                19_336_861_798,
                "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
            ),
            under="coco",
            include=("train2017.zip",),
            unpacking=Unpacking("coco/train2017.zip", "coco", ("train2017",)),
        ),
        Artifact(
            name="video178k-academic",
            purpose="videos up to 30 s and questions about them (LLaVA-Video-178K)",
            licence="Apache 2.0, academic use",
            size=37_800_000_000,
            hub=Place(
                "lmms-lab/LLaVA-Video-178K",
                DATASET,
                "6d8c562dc26d70042a0d9704d1cae58c94b89098",
                folder="0_30_s_academic_v0_1",
            ),
            modelscope=Place("lmms-lab/LLaVA-Video-178K", DATASET, folder="0_30_s_academic_v0_1"),
            include=("*_qa_processed.json", "*_cap_processed.json", "*_videos_*.tar.gz"),
            shards=r"_videos_(\d+)\.tar\.gz$",
            unpacking=Unpacking("*_videos_*.tar.gz", "", ("academic_source",)),
        ),
    )
}

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")


def find_artifact(name: str) -> Artifact:
    """The artifact of a name, of `org/repo`, of `dataset:org/repo`, or of a plain `https://…` address.

    An address may end in `#sha256=HEX`, as pip's do.

    Raises:
        ConfigError: no such artifact. The hint has the nearest names.
    """
    if name in ARTIFACTS:
        return ARTIFACTS[name]
    if name.lower().startswith(("http://", "https://")):
        return _web_artifact(name)
    prefix, colon, repo = name.rpartition(":")
    kind = {"": MODEL, MODEL: MODEL, DATASET: DATASET, "datasets": DATASET}.get(prefix if colon else "")
    if kind and is_repository(repo):
        place = Place(repo, kind)
        return Artifact(name, "named by its repository", "see its page", hub=place, modelscope=place)
    raise ConfigError(f"unknown artifact {name!r}", near_names(name) or "`llavanext fetch --list` shows them all")


def is_repository(text: str) -> bool:
    return bool(_REPO.fullmatch(text)) and ".." not in text


def near_names(name: str, source: str = HUB) -> str:
    """A hint with the artifacts whose name or repository at `source` resembles `name`; empty when none does."""
    known = {}
    for artifact in ARTIFACTS.values():
        place = artifact.place(source)
        spellings = (artifact.name, place.repo, place.repo.partition("/")[2]) if place else (artifact.name,)
        for spelling in spellings:
            known.setdefault(spelling.lower(), artifact.name)
    found = get_close_matches(name.lower(), known, n=3) or [key for key in known if name.lower() in key][:3]
    names = [other for other in dict.fromkeys(known[key] for key in found) if other != name]
    return f"did you mean {' or '.join(names)}?" if names else ""


def public_address(url: str) -> str:
    """An address as it may be shown and written down: without its password and query."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _web_artifact(address: str) -> Artifact:
    url, _, fragment = address.partition("#")
    algorithm, _, digest = fragment.partition("=")
    if fragment and (algorithm != "sha256" or not re.fullmatch(r"[0-9a-fA-F]{64}", digest)):
        raise ConfigError(
            "what follows # in an address must be sha256= and 64 hexadecimal digits",
            "copy the digest that sha256sum prints",
        )
    web = WebFile(url, sha256=digest.lower())
    if not urlsplit(url).hostname or web.name in ("", ".", "..") or "/" in web.name:
        raise ConfigError(
            "an address needs a host and must end in a file's name", "example: https://host/path/file.zip"
        )
    return Artifact(public_address(url), "named by its address", "see its page", web=web)

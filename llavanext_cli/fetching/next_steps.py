"""The commands that come after a fetch, ready to be pasted into a shell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

COMPLETE_MODELS = ("video-7b", "v1.6-vicuna-7b")
TOKENIZER = "video-7b-tokenizer"
PARTS = {"vicuna-7b": "language", "clip-vit-l-336": "vision"}
MEDIA = {"mix665k": "coco-train2017"}
"""Annotations → their images."""
ANNOTATIONS = {"mix665k": "llava_v1_5_mix665k.json", "video178k-academic": "_oe_v0_1_qa_processed.json"}
"""Artifact → the end of the name of the file that a mix reads."""


def next_commands(
    fetched: Mapping[str, Sequence[str]], folder: Path, narrowed: Collection[str] = frozenset()
) -> list[str]:
    """What to run next.

    Args:
        fetched: artifacts that are complete in the folder → the paths of their files.
        narrowed: those of which only a part was wanted: half a model cannot be converted.

    Returns:
        Shell commands, in order; empty when there is nothing to suggest.
    """
    commands: list[str] = []
    for name, paths in fetched.items():
        weights = name not in narrowed and any(path.endswith((".safetensors", ".bin")) for path in paths)
        if name in COMPLETE_MODELS and weights:
            commands.append(f"llavanext convert {_quoted(folder)} {_quoted(_beside(folder, 'mindspore'))}")
        elif name in PARTS and weights:
            commands += _base_model(name, folder)
        elif name in ANNOTATIONS:
            commands += _mix(name, paths, folder)
        elif name == TOKENIZER and not set(fetched) & set(COMPLETE_MODELS):
            data = folder.parent / "images"
            commands.append(f"llavanext fetch mix665k coco-train2017 --to {_quoted(data)}")
            commands += _mix("mix665k", [ANNOTATIONS["mix665k"]], data, f" --tokenizer {_quoted(folder)}")
    for texts, media in MEDIA.items():
        if (texts in fetched) != (media in fetched):
            missing = media if texts in fetched else texts
            commands.insert(0, f"llavanext fetch {missing} --to {_quoted(folder)}")
    return commands


def _base_model(name: str, folder: Path) -> list[str]:
    """The other half of a base model, and both put together."""
    other = next(artifact for artifact in PARTS if artifact != name)
    home = folder.parent / other if folder.name != other else _beside(folder, other)
    folders = {PARTS[name]: folder, PARTS[other]: home}
    return [
        f"llavanext fetch {other} --to {_quoted(home)}",
        f"llavanext convert --vision {_quoted(folders['vision'])} --language {_quoted(folders['language'])} "
        + _quoted(folder.parent / "base-mindspore"),
    ]


def _mix(name: str, paths: Sequence[str], folder: Path, more: str = "") -> list[str]:
    """A mix of all records, written to a file beside the data, and its command."""
    annotations = [path for path in paths if path.endswith(ANNOTATIONS[name])]
    if not annotations:
        return []
    recipe = folder / f"{name}.yaml"
    lines = f"datasets:\n  - {{json_path: {_yaml(folder / annotations[0])}, sampling_strategy: all}}"
    return [
        f"printf '%s\\n' {shlex.quote(lines)} > {_quoted(recipe)}",
        f"llavanext mix {_quoted(recipe)} --out {_quoted(folder / f'{name}.samples.jsonl')}{more}",
    ]


def _beside(folder: Path, ending: str) -> Path:
    return folder.parent / f"{folder.name or 'model'}-{ending}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _yaml(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)  # which is YAML too, whatever the path holds

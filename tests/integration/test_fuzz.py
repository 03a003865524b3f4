"""Damaged files of every kind that a user can hand us are read, or refused with one line; nothing crashes.

Weights, pickles and archives are damaged in their own unit tests. Seeds and numbers of rounds are fixed, so that every
run is the same; other seeds: `python tests/integration/fuzz.py TARGET FILE SEED`.
"""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavanext_cli.config.shipped import preset_files
from tests.integration import fuzz

SEED = 20261124
RECORD = {
    "id": "1",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}],
}
SAMPLE = {
    "id": "1",
    "source": "m",
    "media": [{"kind": "image", "path": "a.png"}],
    "turns": [{"role": "user", "text": "<image>\nwhat?"}, {"role": "assistant", "text": "a cat"}],
}


def image(form: str) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, form)
    return data.getvalue()


def make(target: str, form: str, folder: Path, request: pytest.FixtureRequest) -> Path:
    """A valid file of a target."""
    lines = {"records": RECORD, "training_file": SAMPLE, "questions": {"question": "what?", "image": "a.png"}}
    path = folder / form
    if target == "image":
        path.write_bytes(image(form))
    elif target == "video":
        shutil.copyfile(request.getfixturevalue("media") / "clip.mp4", path)
    elif target in lines:
        (folder / "a.png").write_bytes(image("png"))
        records = [lines[target]] * 3
        header = [{"llavanext_mix": 1, "roots": {"m": str(folder)}, "seed": 0}] if target == "training_file" else []
        path.write_text(
            json.dumps(records) if form.endswith(".json") else "".join(json.dumps(r) + "\n" for r in header + records)
        )
    elif target == "mix_file":
        (folder / "a.json").write_text("[]")
        path.write_text("datasets:\n  - json_path: a.json\n    sampling_strategy: random:10%\n    media_root: .\n")
    elif target == "preset":
        path.write_text(preset_files()["tiny-stage2"].read_text())
    else:
        shutil.copytree(request.getfixturevalue("tiny_checkpoint"), folder, dirs_exist_ok=True)
    return path


CASES = [
    *(("image", form) for form in ("jpeg", "png", "gif", "webp", "tiff", "bmp")),
    ("video", "video.mp4"),
    ("records", "records.json"),
    ("records", "records.jsonl"),
    ("mix_file", "mix.yaml"),
    ("preset", "preset.yaml"),
    ("training_file", "samples.jsonl"),
    ("questions", "questions.jsonl"),
    ("config", "config.json"),
    ("tokenizer", "tokenizer.model"),
    ("tokenizer", "tokenizer_config.json"),
    ("tokenizer", "added_tokens.json"),
    ("checkpoint", "llavanext_manifest.json"),
    ("checkpoint", "param_name_map.json"),
]


def test_every_target_has_a_case():
    assert {target for target, _ in CASES} == set(fuzz.TARGETS)


@pytest.mark.parametrize(("target", "form"), CASES)
def test_it_is_read_or_refused(target, form, tmp_path, request):
    path = make(target, form, tmp_path, request)
    command = [sys.executable, "-W", "ignore", fuzz.__file__, target, str(path), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-3000:]}"

"""Make goldens/: what transformers computes for the tiny model, for machines that have no torch.

    python -m tests.parity.make_goldens [FOLDER]        (from the repository's root; needs torch; takes seconds)

Weights, images and videos are not stored: models.py and cases.py make them from frozen random streams. Stored are the
tokenizer, and of every stage of every case some values at even distances, with the stage's norm and size.
test_goldens.py compares them with our model, and, where torch is installed, with a fresh run of this script.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parent / "goldens"
FILE = "goldens.npz"
SAMPLES = 96
"""Values kept of each stage; of integers all."""
PIECES = 440
"""Of the tokenizer. `<video>` and `<image>` follow."""


def sample_values(values: np.ndarray, count: int = SAMPLES) -> np.ndarray:
    """`float32[<= count]` at even distances, the first and the last among them."""
    flat = np.asarray(values, np.float32).ravel()
    return flat[np.linspace(0, flat.size - 1, min(count, flat.size)).astype(int)] if flat.size else flat


def summarise(stages: Mapping[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    """What is stored of one case's stages."""
    kept: dict[str, np.ndarray] = {}
    for stage, values in stages.items():
        if np.issubdtype(values.dtype, np.integer):
            kept[f"{case}/{stage}"] = values.astype(np.int16)
            continue
        kept[f"{case}/{stage}"] = sample_values(values)
        kept[f"{case}/{stage}/norm"] = np.float64(np.linalg.norm(np.asarray(values, np.float64).ravel()))
        kept[f"{case}/{stage}/size"] = np.int64(values.size)
    return kept


def make_tokenizer() -> bytes:
    from tests.conftest import train_sentencepiece

    return train_sentencepiece(vocab_size=PIECES)


def make_goldens() -> dict[str, np.ndarray]:
    """Run transformers on every case."""
    import torch
    import transformers

    from llavanext_cli.config.model_folder import load_architecture
    from llavanext_cli.processing.processor import Processor
    from llavanext_cli.processing.tokenizer import load_tokenizer
    from tests.parity.cases import FRAMES, build_cases
    from tests.parity.models import tiny_config, write_hf_folder
    from tests.parity.torch_side import Reference

    made: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = write_hf_folder(Path(folder) / "hub", tiny_config())
        reference = Reference(source)
        processor = Processor(load_architecture(source), load_tokenizer(source), frames=FRAMES)
        for case in build_cases(processor):
            made |= summarise(reference.stages(case), case.name)
    provenance = {
        "script": "tests/parity/make_goldens.py",
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
    return made | {"provenance": np.array(json.dumps(provenance))}


def write_goldens(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(make_tokenizer())
    np.savez_compressed(folder / FILE, **make_goldens())
    return folder / FILE


if __name__ == "__main__":
    print(write_goldens(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDENS))

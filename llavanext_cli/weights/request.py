"""What `llavanext convert` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llavanext_cli.weights.checkpoint import SHARD_BYTES


@dataclass(frozen=True)
class ConvertRequest:
    """A conversion.

    Attributes:
        source: a Hugging Face folder, or with `to="hf"` one of ours; None with `vision` and `language`.
        destination: the folder to write.
        part: "vision" or "language" when the source is CLIP or Llama alone.
        vision, language: two parts of which a base model is built.
        base_checkpoint: when the source holds the slices of several ranks, the checkpoint that their run began with.
        seed: of the weights of a base model that no part has.
        weight_format: "ckpt" is one file, for MindSpore's own loaders.
        shard_bytes: greatest size of one file of safetensors.
        force: replace a checkpoint that is at the destination.
        dry_run: plan and check, write nothing.
        verify: read the result back and compare digests; one of our checkpoints is compared with its manifest first.
    """

    source: Path | None
    destination: Path
    to: Literal["mindspore", "hf"] = "mindspore"
    part: Literal["vision", "language"] | None = None
    vision: Path | None = None
    language: Path | None = None
    base_checkpoint: Path | None = None
    seed: int = 0
    weight_format: Literal["safetensors", "ckpt"] = "safetensors"
    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "keep"
    shard_bytes: int = SHARD_BYTES
    force: bool = False
    dry_run: bool = False
    verify: bool = False

    @property
    def sources(self) -> tuple[Path, ...]:
        """The folders of weights: one, or the vision and the language model."""
        return tuple(path for path in (self.source, self.vision, self.language) if path is not None)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Every folder that is read."""
        return (*self.sources, *([self.base_checkpoint] if self.base_checkpoint else []))

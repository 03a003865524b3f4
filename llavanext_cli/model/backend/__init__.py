"""What a CPU lacks of MindFormers' Llama: one small cell for each of its Ascend-only operators."""

from llavanext_cli.model.backend.cpu import use_cpu_cells

__all__ = ["use_cpu_cells"]

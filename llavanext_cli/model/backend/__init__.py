"""The model on a CPU: cells for what MindFormers' Llama lacks there, a decoder with a cache, layers that workers
share, and the training step."""

from llavanext_cli.model.backend.cpu import use_cpu_cells

__all__ = ["use_cpu_cells"]

"""The model on a CPU: cells for operators with no CPU kernel or a slow one, a decoder with a cache, layers shared by
workers, and the training step with its optimizer."""

from llavanext_cli.model.backend.cpu import use_cpu_cells

__all__ = ["use_cpu_cells"]

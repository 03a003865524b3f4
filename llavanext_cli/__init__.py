"""llavanext: fine-tune LLaVA-NeXT-Video and ask it about images and videos, on MindSpore (Ascend or CPU)."""

__version__ = "0.1.0"

INNER_ENV = "LLAVANEXT_INNER"
"""Set by the demo for the commands that it runs: the demo itself says what comes next, and that it was interrupted."""

"""llavanext: fine-tune LLaVA-NeXT-Video and ask it about pictures and clips, on MindSpore (Ascend or CPU)."""

__version__ = "0.1.0"

INNER_ENV = "LLAVANEXT_INNER"
"""Set by the demo for the commands that it runs: what comes next, or that all was interrupted, is the demo's to say."""

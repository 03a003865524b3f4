"""llavanext: fine-tune LLaVA-NeXT-Video and ask it about pictures and clips, on MindSpore (Ascend or CPU)."""

__version__ = "0.1.0"

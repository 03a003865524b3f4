"""Importing this module registers our classes with MindFormers, under their own names."""

from llavanext_cli.model.config import LlavaNextConfig
from llavanext_cli.model.llava_next import LlavaNext

__all__ = ["LlavaNext", "LlavaNextConfig"]

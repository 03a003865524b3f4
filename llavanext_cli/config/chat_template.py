"""Whether a checkpoint was taught the form of conversation that it will be asked and trained in.

The form follows from the language model (`Architecture.conversation`). The chat template that a checkpoint may bring is
not run; it is searched for the words that every template of that form writes.
"""

from __future__ import annotations

import json
from pathlib import Path

from llavanext_cli.config.architecture import load_architecture
from llavanext_cli.config.hf_config import read_config
from llavanext_cli.errors import CheckpointError

MARKS = {"vicuna_v1": "ASSISTANT", "mistral_instruct": "[INST]"}
SOURCES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Files that may hold a template; the first that does counts, as in transformers."""


def check_chat_template(folder: Path) -> str | None:
    """One line for the user where the checkpoint's own template is of another form than ours; else None.

    A folder that is no checkpoint is not judged here: opening it says what is wrong.
    """
    try:
        conversation = load_architecture(folder).conversation
        template = _read_template(folder)
    except (CheckpointError, OSError, ValueError):
        return None
    if template is None or MARKS[conversation] in template:
        return None
    return f"{folder}: was taught another form of conversation than {conversation}, in which questions are written here"


def _read_template(folder: Path) -> str | None:
    for name in SOURCES:
        path = folder / name
        if not path.is_file():
            continue
        template: object
        if path.suffix == ".json":
            template = read_config(folder, name).get("chat_template")
        else:
            template = path.read_text(encoding="utf-8")
        if isinstance(template, list):  # several, by name: [{"name": "default", "template": "..."}]
            template = json.dumps(template)
        if isinstance(template, str):
            return template
    return None

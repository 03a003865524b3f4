"""The form of conversation: what follows from the language model, and when a checkpoint's own template differs."""

import json
from dataclasses import replace

import pytest

from llavanext_cli.config.architecture import Architecture, TextArchitecture, architecture_to_hf
from llavanext_cli.config.chat_template import MARKS, check_chat_template
from llavanext_cli.processing.prompt import CONVERSATIONS

VICUNA = "{{ message['role'].upper() + ': '}}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
MISTRAL = "{{ '[INST] ' }}{{ content['text'] }}{{ ' [/INST]' }}"
CHATML = "{{ '<|im_start|>' + message['role'] }}"


@pytest.fixture
def checkpoint(tmp_path):
    def make(kind: str, **files):
        architecture = replace(Architecture(), text=TextArchitecture(model_type=kind))
        (tmp_path / "config.json").write_text(json.dumps(architecture_to_hf(architecture)))
        for name, content in files.items():
            (tmp_path / name.replace("__", ".")).write_text(content)
        return tmp_path

    return make


def test_the_form_follows_from_the_language_model():
    assert Architecture().conversation == "vicuna_v1"
    assert Architecture(text=TextArchitecture(model_type="mistral")).conversation == "mistral_instruct"
    assert set(MARKS) == set(CONVERSATIONS)


@pytest.mark.parametrize(("kind", "template"), [("llama", VICUNA), ("mistral", MISTRAL)])
def test_a_template_of_the_same_form_is_fine(checkpoint, kind, template):
    assert check_chat_template(checkpoint(kind)) is None
    assert check_chat_template(checkpoint(kind, tokenizer_config__json=json.dumps({"legacy": True}))) is None
    assert check_chat_template(checkpoint(kind, chat_template__json=json.dumps({"chat_template": template}))) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template__jinja", CHATML),
        ("chat_template__json", json.dumps({"chat_template": CHATML})),
        ("tokenizer_config__json", json.dumps({"chat_template": CHATML})),
        ("tokenizer_config__json", json.dumps({"chat_template": [{"name": "default", "template": CHATML}]})),
    ],
)
@pytest.mark.parametrize(("kind", "form"), [("llama", "vicuna_v1"), ("mistral", "mistral_instruct")])
def test_another_form_is_said(checkpoint, kind, form, name, content):
    folder = checkpoint(kind, **{name: content})
    line = f"{folder}: was taught another form of conversation than {form}, in which questions are written here"
    assert check_chat_template(folder) == line


def test_what_is_no_checkpoint_is_left_to_others(tmp_path, checkpoint):
    assert check_chat_template(tmp_path / "none") is None
    assert check_chat_template(checkpoint("llama", chat_template__json="{")) is None

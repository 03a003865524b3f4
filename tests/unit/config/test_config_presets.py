"""Loading presets: extends, --set, --devices, and every message of what can be wrong."""

from __future__ import annotations

import os
import textwrap
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavanext_cli.config.architecture import RopeScaling
from llavanext_cli.config.presets import check_presets, list_presets, load_preset
from llavanext_cli.config.schema import schema_keys
from llavanext_cli.config.shipped import find_preset, preset_files, presets_folder
from llavanext_cli.errors import ConfigError

GOOD = """\
    extends: base/tiny
    task: train
    description: mine
    data: {seq_length: 256, tiles: 5}
    train: {learning_rate: 1e-3}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "mine.yaml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


def fault(name, overrides=(), **options) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_preset(name, overrides, **options)
    assert caught.value.exit_code == 1
    assert "\n" not in caught.value.what
    return caught.value


# --- the file and its base


def test_a_file_on_top_of_its_base(write):
    preset = load_preset(write(GOOD))
    assert (preset.name, preset.task, preset.description) == ("mine", "train", "mine")
    assert preset.train.learning_rate == 1e-3
    assert preset.model.vision.hidden_size == 96
    assert preset.runtime.target == "CPU"
    assert preset.ask is None


def test_a_mapping_is_merged_key_by_key_and_a_list_replaced(write):
    path = write(GOOD + "    model: {text: {num_hidden_layers: 3}, image_grid_pinpoints: [[48, 96]]}\n")
    model = load_preset(path).model
    assert (model.text.num_hidden_layers, model.text.hidden_size) == (3, 128)
    assert model.image_grid_pinpoints == ((48, 96),)


def test_a_base_beside_the_file(write):
    base = (presets_folder() / "base/tiny.yaml").read_text()
    write(base.replace("vocab_size: 512", "vocab_size: 600"), "my-base.yaml")
    assert load_preset(write(GOOD.replace("base/tiny", "my-base"))).model.text.vocab_size == 600


@pytest.mark.parametrize(
    ("name", "base", "what", "hint"),
    [
        (
            "mine",
            "middle",
            "middle is not a base: it extends base/tiny itself",
            "copy {folder}/middle.yaml FILE`",
        ),
        ("mine", "tiny-ask", "tiny-ask is not a base: it extends base/tiny itself", "presets copy tiny-ask FILE"),
        ("tiny-ask", "tiny-ask", "tiny-ask is not a base: it extends base/tiny itself", "presets copy tiny-ask FILE"),
        ("mine", "mine", "unknown base mine", "the bases are base/tiny, base/video-7b; a file is looked up beside"),
        ("mine", "base/tinny", "unknown base base/tinny; did you mean base/tiny?", "the bases are base/tiny, base/vid"),
        ("mine", "7", "expected the name of a base", "the bases are base/tiny, base/video-7b"),
    ],
)
def test_a_base_extends_nothing(write, tmp_path, name, base, what, hint):
    write("extends: base/tiny\n", "middle.yaml")
    path = write(GOOD.replace("base/tiny", base), f"{name}.yaml")
    error = fault(path)
    assert error.what == f"{path}, line 1: extends: {what}"
    assert hint.format(folder=tmp_path) in error.hint


# --- names


def test_find_by_name_and_by_path(write):
    path = write(GOOD, "other.yml")
    assert find_preset(path) == ("other", path)
    name, path = find_preset("tiny-ask")
    assert (name, path.name) == ("tiny-ask", "tiny-ask.yaml")


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("video-7b-stge2", "there is no preset named 'video-7b-stge2'", "did you mean video-7b-stage2"),
        ("base/tiny", "there is no preset named 'base/tiny'", "did you mean tiny-ask or "),
        ("no.yaml", "the preset file no.yaml does not exist", "`llavanext presets list` shows the presets"),
        ("folder.yaml", "folder.yaml is a folder, but a preset is a YAML file or a name", "`llavanext presets list`"),
        ("pipe", "pipe is a device or a pipe, but a preset is a YAML file or a name", "`llavanext presets list`"),
        ("link", "link is a broken link, but a preset is a YAML file or a name", "`llavanext presets list`"),
    ],
)
def test_there_is_no_such_preset(tmp_path, monkeypatch, name, what, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo("pipe")
    os.symlink("nowhere", "link")
    error = fault(name)
    assert error.what == what and error.hint.startswith(hint)


def test_list_says_what_each_is_for():
    infos = {info.name: info for info in list_presets()}
    assert infos.keys() == preset_files().keys()
    assert infos["video-7b-stage2"].devices == 8
    assert infos["video-7b-ask-image"].task == "ask"
    assert infos["tiny-stage3"].target == "CPU"


# --- problems and --set


def test_every_problem_of_a_file_is_reported_with_its_line(write):
    path = write(
        """\
        extends: base/tiny
        task: train
        data:
          seq_length: 256
          tile: 5
          frames: many
        trian:
          epochs: 1
        train:
          learning_rate: 1e-3
          trainable: [vision, lm]
        runtime:
          compute_dtype: bfloat16
          flash_attention: true
        learning_rate: 1
        """
    )
    error = fault(path)
    assert error.what == "preset mine has 8 problems"
    assert error.details == (
        f"{path}, line 7: trian: unknown key; did you mean train?",
        f"{path}, line 15: learning_rate: unknown key; did you mean train.learning_rate?",
        f"{path}: description: missing: one line for `llavanext presets list`",
        f"{path}, line 5: data.tile: unknown key; did you mean data.tiles?",
        f"{path}, line 6: data.frames: expected a whole number, not 'many'",
        f"{path}, line 11: train.trainable: expected one of vision, projector, newline, language, not 'lm'",
        f"{path}, line 13: runtime.compute_dtype: MindSpore cannot multiply bfloat16 matrices on CPU: use float32",
        f"{path}, line 14: runtime.flash_attention: is for Ascend only: set it to false on CPU",
    )


def test_set_changes_one_value_reaches_into_a_mapping_and_replaces_null():
    settings = ["train.learning_rate=2e-4", "train.trainable=[projector, newline]"]
    train, default = (load_preset("tiny-stage2", some).train for some in (settings, []))
    assert train == replace(default, learning_rate=2e-4, trainable=("projector", "newline"))
    preset = load_preset("video-7b-ask-video", ["model.text.rope_scaling.factor=4"])
    assert preset.model.text.rope_scaling == RopeScaling("linear", 4.0)
    assert load_preset("tiny-stage2", ["train.clip_norm="]).train.clip_norm is None


KNOWN = "known here: task, description, model, data, train, ask, parallel, runtime"
WRONG = {
    "train.learning_rte=1": "train.learning_rte: unknown key; did you mean train.learning_rate?",
    "learning_rate=1": "learning_rate: unknown key; did you mean train.learning_rate?",
    "tran.epochs=1": "tran: unknown key; did you mean train?",
    "train.lr=1": "train.lr: unknown key; did you mean train.learning_rate?",
    "lr=1": "lr: unknown key; did you mean train.learning_rate?",
    "train.wd=0": "train.wd: unknown key; did you mean train.weight_decay?",
    "train.acc=2": "train.acc: unknown key; did you mean train.accumulate?",
    "data.len=1": "data.len: unknown key; did you mean data.seq_length?",
    "data.clips=2": "data.clips: unknown key: it is now called data.videos",  # its name in 0.1.0
    "seq_len=1": "seq_len: unknown key; did you mean data.seq_length?",
    "train.lora.rnk=8": "train.lora.rnk: unknown key; did you mean train.lora.rank?",
    "train.learning_rates.tower=1": "train.learning_rates.tower: unknown key; known here: vision, projector, language",
    "model.hidden_size=1": "model.hidden_size: unknown key; did you mean model.text.hidden_size?",
    "parallel.tp=2": "parallel.tp: unknown key; known here: devices, data, tensor, pipeline, optimizer_sharding",
    "xyz=2": f"xyz: unknown key; {KNOWN}",
    "extends=base/tiny": f"extends: unknown key; {KNOWN}",
    "task=sing": "task: expected train or ask, not 'sing'",
    "ask.temp=1": "ask: is not used by the task train: leave it out",
    "train.epochs=two": "train.epochs: expected a whole number, not 'two'",
    "train.epochs.x=1": "train.epochs: expected a whole number, not {'x': 1}",
    "train=5": "train: expected a mapping of keys to values, not 5",
    "train.learning_rate=nan": "train.learning_rate: expected a number, not 'nan'",
    "train.learning_rate=1e999": "train.learning_rate: expected a number, not inf",
    "train.learning_rate=0": "train.learning_rate: must be more than 0, not 0 (peak learning rate)",
    "train.lora.targets=[q_proj]": "train.lora.targets: expected one of wq, wk, wv, wo, w1, w2, w3, not 'q_proj'",
    "train.betas=[0.9, 1]": "train.betas: must be less than 1, not 1 (AdamW's decay rates of the two moments)",
    "data.seq_length=1e3": "data.seq_length: expected a whole number or null, not 1000.0",
    "data.seq_length=null": "data.seq_length: missing: tokens per sample, media included",
}


@pytest.mark.parametrize("setting", WRONG)
def test_an_invalid_setting(setting):
    assert fault("tiny-stage2", [setting]).details == (f"--set {setting}: {WRONG[setting]}",)


@pytest.mark.parametrize("setting", ["train.epochs", "=3", ""])
def test_a_set_without_key_or_value(setting):
    error = fault("tiny-stage2", [setting])
    assert "expected KEY=VALUE" in error.what and "--set data.frames=8" in error.hint


def test_the_hint_names_a_shipped_preset_of_the_same_task(write):
    assert "presets show tiny-ask --full" in fault("tiny-ask", ["train.epochs=2"]).hint
    assert "presets show tiny-stage2 --full" in fault("tiny-stage2", devices=3, overrides=["data.x=1"]).hint
    wrong = write(GOOD + "    extra: 1\n")
    assert "presets show video-7b-stage2 --full" in fault(wrong, ["data.x=1"]).hint
    wrong = write("extends: base/tiny\ntask: ask\ndescription: mine\nask: {cache_tokens: 1}\n")
    assert "presets show video-7b-ask-image --full" in fault(wrong).hint


def test_a_set_that_is_not_yaml():
    assert fault("tiny-stage2", ["train.trainable=[vision"]).what.startswith("--set train.trainable=[vision, line 1")


def test_a_section_of_the_other_task_is_not_read(write):
    error = fault(write(GOOD + "    ask: {cache_tokens: 256}\n"))
    assert error.details[0].endswith("line 6: ask: is not used by the task train: leave it out")
    for setting, key in (("train.epochs=2", "train"), ("data.seq_length=256", "data.seq_length")):
        details = fault("tiny-ask", [setting]).details
        assert details == (f"--set {setting}: {key}: is not used by the task ask: leave it out",)


# --- --devices


@pytest.mark.parametrize(
    ("preset", "settings", "devices", "sharing"),
    [
        ("tiny-stage2", [], 2, (2, 1, 1)),
        ("tiny-stage2", [], 1, (1, 1, 1)),
        ("video-7b-stage2", [], 4, (4, 1, 1)),
        ("video-7b-stage2", ["parallel.tensor=2"], 8, (4, 2, 1)),
        ("video-7b-ask-image", [], 2, (1, 2, 1)),
        ("video-7b-ask-image", ["parallel.tensor=4", "parallel.devices=4"], 2, (1, 2, 1)),
    ],
)
def test_training_devices_share_the_samples_and_asking_devices_each_layer(preset, settings, devices, sharing):
    parallel = load_preset(preset, settings, devices=devices).parallel
    assert parallel.devices == devices
    assert (parallel.data, parallel.tensor, parallel.pipeline) == sharing


def test_devices_that_cannot_share_the_work():
    error = fault("video-7b-stage2", ["parallel.tensor=2"], devices=3)
    assert error.what == "--devices 3 is not a multiple of tensor 2 x pipeline 1"
    assert "use a multiple of 2" in error.hint
    details = fault("video-7b-ask-image", devices=3).details
    assert details[0] == "--devices 3: parallel.tensor: 3 devices cannot share num_attention_heads 32 evenly"


# --- presets check


def test_an_invalid_preset_does_not_stop_the_check(write):
    bad = write(GOOD.replace("1e-3", "fast"))
    reports = check_presets([str(bad), "tiny-ask", "nothing"])
    assert [report.ok for report in reports] == [False, True, False]
    assert "train.learning_rate: expected a number, not 'fast'" in reports[0].problems[0]
    assert reports[2].path is None
    assert reports[2].problems == ("there is no preset named 'nothing'",)
    assert reports[2].hint.endswith("`llavanext presets list` shows the presets")


YAML_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5000),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(["x", "float32", "bfloat16", "CPU", "[]", "[1, 2]", "[[0, 0]]", "{}", "{type: linear, factor: x}"]),
).map(lambda value: "" if value is None else str(value).lower() if isinstance(value, bool) else str(value))


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["tiny-stage2", "tiny-ask", "video-7b-stage3"]),
    changes=st.dictionaries(st.sampled_from(list(schema_keys())), YAML_VALUES, max_size=4),
)
def test_any_setting_is_valid_or_a_config_error(name, changes):
    try:
        preset = load_preset(name, [f"{key}={value}" for key, value in changes.items()])
    except ConfigError as error:
        assert "--set" in str(error)  # only the settings can be invalid
    else:
        assert preset.parallel.data * preset.parallel.tensor * preset.parallel.pipeline == preset.parallel.devices

"""Loading presets: extends, --set, --devices, and every message of what can be wrong."""

from __future__ import annotations

import os
import textwrap

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


def test_a_file_over_its_base(write):
    preset = load_preset(write(GOOD))
    assert (preset.name, preset.task, preset.description) == ("mine", "train", "mine")
    assert preset.train.learning_rate == 1e-3
    assert preset.model.vision.hidden_size == 96
    assert preset.runtime.target == "CPU"
    assert preset.ask is None


def test_a_mapping_is_merged_key_by_key_and_a_list_replaced(write):
    path = write(GOOD + "    model: {text: {num_hidden_layers: 2}, image_grid_pinpoints: [[48, 96]]}\n")
    model = load_preset(path).model
    assert model.text.num_hidden_layers == 2
    assert model.text.hidden_size == 128
    assert model.image_grid_pinpoints == ((48, 96),)


def test_a_base_of_ones_own_is_found_beside_the_file(write):
    base = (presets_folder() / "base/tiny.yaml").read_text()
    write(base.replace("vocab_size: 512", "vocab_size: 600"), "my-base.yaml")
    assert load_preset(write(GOOD.replace("base/tiny", "my-base"))).model.text.vocab_size == 600


def test_one_level_of_extends(write):
    middle = write("extends: base/tiny\n", "middle.yaml")
    error = fault(write(GOOD.replace("base/tiny", "middle")))
    assert "mine.yaml, line 1: extends: middle is not a base: it extends base/tiny itself" in error.what
    assert error.hint == (
        f"Extend base/tiny or base/video-7b, or change a copy: `llavanext presets copy {middle} FILE`."
    )
    assert "`llavanext presets copy tiny-ask FILE`" in fault(write(GOOD.replace("base/tiny", "tiny-ask"))).hint


def test_a_circle_of_bases_is_told_to_extend_something_else(write):
    write("extends: mine.yaml\n", "other.yaml")
    error = fault(write("extends: other.yaml\n"))
    assert "extends: other.yaml is not a base: it extends mine.yaml itself" in error.what
    assert error.hint.startswith("Extend base/tiny or base/video-7b, or")


def test_a_file_named_as_the_base_it_extends_is_not_its_own_base(write):
    error = fault(write(GOOD.replace("base/tiny", "tiny-stage2"), "tiny-stage2.yaml"))
    assert "tiny-stage2 is not a base: it extends base/tiny itself" in error.what
    error = fault(write(GOOD.replace("base/tiny", "mine"), "mine.yaml"))
    assert error.what.endswith("mine.yaml, line 1: extends: there is no mine")
    assert error.hint.startswith("The bases are base/tiny, base/video-7b; ")


@pytest.mark.parametrize("name", ["odd", "odd.yaml"])
def test_what_is_no_file_is_no_preset(tmp_path, name):
    path = tmp_path / name
    path.mkdir()
    assert fault(path).what == f"{path} is a folder, and a preset is a YAML file or a name"
    path.rmdir()
    os.mkfifo(path)
    assert fault(path).what == f"{path} is a device or a pipe, and a preset is a YAML file or a name"
    path.unlink()
    path.symlink_to(path)
    assert fault(path).what == f"{path} is a broken link, and a preset is a YAML file or a name"


def test_a_seq_length_of_the_wrong_type_is_not_missing_too(write):
    error = fault(write(GOOD), ["data.seq_length=1e3"])
    assert len(error.details) == 1
    assert "expected a whole number" in error.details[0]


def test_a_base_that_does_not_exist(write):
    error = fault(write(GOOD.replace("base/tiny", "base/tinny")))
    assert "line 1: extends: there is no base/tinny; did you mean base/tiny?" in error.what
    assert "base/video-7b" in error.hint


def test_no_such_preset_names_the_nearest():
    error = fault("video-7b-stge2")
    assert error.what == "there is no preset named 'video-7b-stge2'"
    assert "video-7b-stage2" in error.hint
    assert "presets list" in error.hint


def test_no_such_file(tmp_path):
    error = fault(tmp_path / "no.yaml")
    assert error.what == f"the preset file {tmp_path / 'no.yaml'} does not exist"


def test_a_base_alone_is_not_offered():
    assert "base/tiny" not in preset_files()
    assert fault("base/tiny").what == "there is no preset named 'base/tiny'"


def test_every_fault_of_a_file_is_reported_with_its_line(write):
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


def test_set_changes_one_value():
    preset = load_preset("tiny-stage2", ["train.learning_rate=2e-4", "train.trainable=[projector, newline]"])
    assert preset.train.learning_rate == 2e-4
    assert preset.train.trainable == ("projector", "newline")
    assert preset.train.epochs == load_preset("tiny-stage2").train.epochs


def test_set_reaches_into_a_mapping_and_replaces_null():
    preset = load_preset("video-7b-ask-video", ["model.text.rope_scaling.factor=4"])
    assert preset.model.text.rope_scaling == RopeScaling("linear", 4.0)
    assert load_preset("tiny-stage2", ["train.clip_norm="]).train.clip_norm is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "train.learning_rte=1",
            "--set train.learning_rte=1: train.learning_rte: unknown key; did you mean train.learning_rate?",
        ),
        ("learning_rate=1", "--set learning_rate=1: learning_rate: unknown key; did you mean train.learning_rate?"),
        ("tran.epochs=1", "--set tran.epochs=1: tran: unknown key; did you mean train?"),
        ("train.lr=1", "--set train.lr=1: train.lr: unknown key; did you mean train.learning_rate?"),
        ("lr=1", "--set lr=1: lr: unknown key; did you mean train.learning_rate?"),
        ("train.rate=1", "unknown key; did you mean train.learning_rate?"),
        ("train.wd=0", "unknown key; did you mean train.weight_decay?"),
        ("train.bs=2", "unknown key; did you mean train.batch_size?"),
        ("train.acc=2", "unknown key; did you mean train.accumulate?"),
        ("ask.temp=1", "--set ask.temp=1: ask: is not used by the task train: leave it out"),
        ("data.len=1", "unknown key; did you mean data.seq_length?"),
        ("data.clips=2", "unknown key: it is called data.videos now"),  # its name in 0.1.0
        ("seq_len=1", "unknown key; did you mean data.seq_length?"),
        ("train.lora_rank=8", "unknown key; did you mean train.lora?"),
        ("train.learning_rates.tower=1", "unknown key; known here: vision, projector, language"),
        ("model.hidden_size=1", "unknown key; did you mean model.text.hidden_size?"),
        ("parallel.tp=2", "unknown key; known here: devices, data, tensor, pipeline, optimizer_sharding"),
        ("xyz=2", "unknown key; known here: task, description, model, data, train, ask, parallel, runtime"),
        ("extends=base/tiny", "--set extends=base/tiny: extends: unknown key"),
        ("train.epochs=two", "--set train.epochs=two: train.epochs: expected a whole number, not 'two'"),
        ("train.epochs.x=1", "train.epochs: expected a whole number, not {'x': 1}"),
        ("train=5", "--set train=5: train: expected a mapping of keys to values, not 5"),
        ("train.learning_rate=nan", "expected a number, not 'nan'"),
        ("train.learning_rate=1e999", "expected a number, not inf"),
        ("model.text.rope_scaling.factor=1e400", "model.text.rope_scaling.factor: expected a number, not inf"),
        ("train.learning_rate=0", "must be more than 0, not 0"),
    ],
)
def test_a_wrong_set(setting, message):
    details = fault("tiny-stage2", [setting]).details
    assert any(message in line for line in details), details


@pytest.mark.parametrize("setting", ["train.epochs", "=3", ""])
def test_a_set_without_key_or_value(setting):
    error = fault("tiny-stage2", [setting])
    assert "expected KEY=VALUE" in error.what and "--set data.frames=8" in error.hint


def test_the_hint_names_a_shipped_preset_of_the_same_task(write):
    assert "presets show tiny-ask --full" in fault("tiny-ask", ["train.epochs=2"]).hint
    assert "presets show tiny-stage2 --full" in fault("tiny-stage2", devices=3, overrides=["data.x=1"]).hint
    wrong = write(GOOD + "    extra: 1\n")
    assert "presets show video-7b-stage2 --full" in fault(wrong, ["data.x=1"]).hint


def test_a_set_that_is_not_yaml():
    assert fault("tiny-stage2", ["train.trainable=[vision"]).what.startswith("--set train.trainable=[vision, line 1")


def test_a_section_of_the_other_task_is_not_read(write):
    error = fault(write(GOOD + "    ask: {cache_tokens: 256}\n"))
    assert error.details[0].endswith("line 6: ask: is not used by the task train: leave it out")
    error = fault("tiny-ask", ["train.epochs=2"])
    assert error.details == ("--set train.epochs=2: train: is not used by the task ask: leave it out",)
    error = fault("tiny-ask", ["data.seq_length=256"])
    assert error.details == ("--set data.seq_length=256: data.seq_length: is not used by the task ask: leave it out",)


@pytest.mark.parametrize(
    ("preset", "devices", "sharing"),
    [("tiny-stage2", 2, (2, 1, 1)), ("video-7b-stage2", 4, (4, 1, 1)), ("tiny-stage2", 1, (1, 1, 1))],
)
def test_devices_are_shared_by_the_samples(preset, devices, sharing):
    parallel = load_preset(preset, devices=devices).parallel
    assert parallel.devices == devices
    assert (parallel.data, parallel.tensor, parallel.pipeline) == sharing


def test_devices_of_an_ask_preset_share_each_layer():
    for overrides in ([], ["parallel.tensor=4", "parallel.devices=4"]):
        parallel = load_preset("video-7b-ask-image", overrides, devices=2).parallel
        assert (parallel.devices, parallel.data, parallel.tensor) == (2, 1, 2)
    details = fault("video-7b-ask-image", devices=3).details
    assert any("3 devices cannot share num_attention_heads 32 evenly" in line for line in details)


def test_devices_beside_tensor_parallelism():
    assert load_preset("video-7b-stage2", ["parallel.tensor=2"], devices=8).parallel.data == 4
    error = fault("video-7b-stage2", ["parallel.tensor=2"], devices=3)
    assert error.what == "--devices 3 is not a multiple of tensor 2 x pipeline 1"
    assert "multiple of 2" in error.hint


def test_check_goes_on_after_a_wrong_one(write):
    bad = write(GOOD.replace("1e-3", "fast"))
    reports = check_presets([str(bad), "tiny-ask", "nothing"])
    assert [report.ok for report in reports] == [False, True, False]
    assert "train.learning_rate: expected a number, not 'fast'" in reports[0].problems[0]
    assert reports[2].path is None
    assert reports[2].problems == ("there is no preset named 'nothing'",)
    assert reports[2].hint.endswith("`llavanext presets list` shows the presets.")


def test_check_reports_a_file_with_a_key_given_twice(write):
    (report,) = check_presets([str(write(GOOD + "    task: ask\n"))])
    assert len(report.problems) == 1
    assert "task is given twice" in report.problems[0]


def test_find_by_name_and_by_path(write):
    path = write(GOOD, "other.yml")
    assert find_preset(path) == ("other", path)
    name, path = find_preset("tiny-ask")
    assert (name, path.name) == ("tiny-ask", "tiny-ask.yaml")


def test_list_says_what_each_is_for():
    infos = {info.name: info for info in list_presets()}
    assert infos["video-7b-stage2"].devices == 8
    assert infos["video-7b-ask-image"].task == "ask"
    assert infos["tiny-stage3"].target == "CPU"


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
def test_any_setting_is_taken_or_is_our_error(name, changes):
    try:
        preset = load_preset(name, [f"{key}={value}" for key, value in changes.items()])
    except ConfigError as error:
        assert "--set" in str(error)  # whatever is wrong was wrong in a setting
    else:
        assert preset.parallel.data * preset.parallel.tensor * preset.parallel.pipeline == preset.parallel.devices

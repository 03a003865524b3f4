"""The mix file: what it means, and that all of its faults come at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavanext_cli.errors import ConfigError
from llavanext_cli.mixing.mixfile import load_mix_file


def write(folder: Path, text: str) -> Path:
    path = folder / "mix.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.json").write_text("[]")
    return folder / "a.json"


def test_defaults(tmp_path, data):
    (found,) = load_mix_file(write(tmp_path, f"datasets:\n  - json_path: {data}\n"))
    assert (found.name, found.json_path, found.media_root) == ("a", data, data.parent)
    assert (found.strategy.kind, found.strategy_text) == ("all", "all")


def test_paths_start_at_the_mix_file_or_else_at_the_working_folder(tmp_path, data, monkeypatch):
    beside = load_mix_file(write(tmp_path, "datasets:\n  - json_path: images/a.json\n    media_root: images\n"))
    assert (beside[0].json_path, beside[0].media_root) == (data, data.parent)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    below = load_mix_file(write(tmp_path / "recipes", "datasets:\n  - json_path: images/a.json\n"))
    assert below[0].json_path == data


def test_the_same_file_twice_gets_two_names(tmp_path, data):
    entry = f"  - json_path: {data}\n"
    found = load_mix_file(write(tmp_path, "datasets:\n" + entry * 3))
    assert [data_set.name for data_set in found] == ["a", "a-2", "a-3"]


def test_every_fault_is_reported_at_once(tmp_path, data):
    path = write(
        tmp_path,
        f"""
datasets:
  - json_path: {data}
    sampling_stratgy: all
  - json_path: {data}
    sampling_strategy: last:5
  - json_path: {tmp_path}/none.json
    sampling_strategy: first:200%
  - sampling_strategy: all
  - json_path: {data}
    media_root: {tmp_path}/nowhere
    name: twice
  - json_path: {data}
    name: twice
  - just text
  - json_path: {tmp_path}/a.parquet
dataset: 3
""",
    )
    with pytest.raises(ConfigError) as error:
        load_mix_file(path)
    details = "\n".join(error.value.details)
    for says in (
        "unknown key 'dataset'; known: datasets",
        "datasets[1]: unknown key 'sampling_stratgy'; did you mean 'sampling_strategy'?",
        "datasets[2]: sampling_strategy: unknown strategy 'last:5'",
        "datasets[3]: json_path: " + str(tmp_path / "none.json") + " does not exist",
        "datasets[3]: sampling_strategy: 'first:200%' is more than 100 %",
        "datasets[4]: json_path is missing",
        "datasets[5]: media_root: " + str(tmp_path / "nowhere") + " is no folder",
        "datasets[7]: a data set is a mapping",
        "datasets[8]: json_path: a.parquet is neither .json nor .jsonl",
    ):
        assert says in details, says
    assert len(error.value.details) == 10 and "10 faults" in error.value.what


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "mix.yaml is empty"),
        ("datasets: []", "the key 'datasets' must hold a list"),
        ("datasets:\n  - [a\n", "line 3, column 1: "),
        ("datasets: []\ndatasets: []\n", "mix.yaml: invalid YAML"),
        ("datasets: \0", "mix.yaml: invalid YAML: unacceptable character"),
        ("- a\n- b\n", "expected a mapping of keys to values, not"),
        ("datasets: []\n" + "#" * 1_000_000, "it is a data file"),
    ],
)
def test_no_mix_file_at_all(tmp_path, text, says):
    with pytest.raises(ConfigError) as error:
        load_mix_file(write(tmp_path, text))
    assert says in error.value.what


def test_what_is_hard_to_see_in_a_mix_file_has_a_hint(tmp_path, data):
    def hint(text: str) -> str:
        with pytest.raises(ConfigError) as error:
            load_mix_file(write(tmp_path, text))
        return error.value.hint

    assert "remove the space" in hint(f"datasets:\n- json_path: {data}\n  sampling_strategy: random: 10%\n")
    assert "each key once" in hint("datasets: []\ndatasets: []\n")
    assert "under datasets" in hint("[" + "1, " * 400_000 + "1]")
    (tmp_path / "mix.yaml").write_bytes(b"datasets: \xff")
    with pytest.raises(ConfigError) as error:
        load_mix_file(tmp_path / "mix.yaml")
    assert error.value.hint == "save it as UTF-8"
    with pytest.raises(ConfigError, match="data file"):
        load_mix_file(Path("/dev/zero"))


def test_a_name_that_json_cannot_hold(tmp_path, data):
    with pytest.raises(ConfigError) as error:
        load_mix_file(write(tmp_path, f'datasets:\n- {{json_path: {data}, name: "\\udcff"}}\n'))
    assert "name is a word" in error.value.details[0]


def test_roots_are_written_without_steps_back(tmp_path, data):
    (tmp_path / "t").mkdir()
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    (found,) = load_mix_file(write(tmp_path, f"datasets:\n- {{json_path: {data}, media_root: t/../far}}\n"))
    assert found.media_root == tmp_path / "far"
    (found,) = load_mix_file(write(tmp_path, f"datasets:\n- {{json_path: {data}, media_root: link/../away}}\n"))
    assert found.media_root == tmp_path / "far" / "away"


def test_a_name_that_stands_twice(tmp_path, data):
    with pytest.raises(ConfigError) as error:
        load_mix_file(
            write(tmp_path, f"datasets:\n- {{json_path: {data}, name: x}}\n- {{json_path: {data}, name: x}}\n")
        )
    assert error.value.details[0].endswith("name: 'x' stands twice")


def test_a_missing_mix_file(tmp_path):
    with pytest.raises(ConfigError, match="no such mix file"):
        load_mix_file(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_mix_file(tmp_path)

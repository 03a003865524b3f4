"""`llavanext presets` as a user runs it."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from llavanext_cli.app import app
from llavanext_cli.config.shipped import preset_files


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["presets", *arguments])


def test_list(run):
    result = run("list")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["name", "runs", "on", "tokens", "what", "for"]
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:]] == sorted(preset_files())
    presets = json.loads(run("list", "--json").stdout)["presets"]
    (stage3,) = [preset for preset in presets if preset["name"] == "video-7b-stage3"]
    assert (stage3["devices"], stage3["tokens"], stage3["memory"]) == (8, 4096, "57GB")


def test_show_prints_the_file(run):
    result = run("show", "tiny-ask")
    assert result.stdout == preset_files()["tiny-ask"].read_text()
    assert result.stderr == ""


def test_show_full_prints_every_key_with_its_meaning(run):
    text = run("show", "tiny-stage2", "--full", "--set", "train.epochs=7").stdout
    assert "  epochs: 7  # passes over the data\n" in text
    assert yaml.safe_load(text)["model"]["text"]["num_hidden_layers"] == 2


def test_show_resolved_prints_what_mindformers_reads(run):
    text = run("show", "video-7b-stage2", "--resolved").stdout
    resolved = yaml.safe_load(text)
    assert resolved["run_mode"] == "train"
    assert resolved["parallel_config"]["data_parallel"] == 8
    assert json.loads(run("show", "video-7b-stage2", "--resolved", "--json").stdout) == resolved


def test_show_json(run):
    shown = json.loads(run("show", "video-7b-stage2", "--json", "--set", "train.betas=[0.8, 0.9]").stdout)
    assert shown["train"]["learning_rate"] == 2e-6
    assert shown["train"]["betas"] == [0.8, 0.9]
    assert "ask" not in shown


def test_show_of_nothing(run):
    result = run("show", "tiny-asc")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == "Error: there is no preset named 'tiny-asc'"
    assert "tiny-ask" in result.stderr.splitlines()[1]
    assert result.stdout == ""


def test_show_full_and_resolved_is_a_usage_error(run):
    assert run("show", "tiny-ask", "--full", "--resolved").exit_code == 2


def test_copy_then_change_then_check(run, tmp_path):
    copied = run("copy", "tiny-stage2", "mine.yaml")
    assert (copied.exit_code, copied.stdout) == (0, "")
    assert copied.stderr == "Wrote mine.yaml.\nNext: llavanext presets check mine.yaml\n"
    assert run("check", "mine.yaml").stdout == "mine.yaml: ok\n"
    assert run("copy", "tiny-stage2", "mine.yaml").exit_code == 1
    path = tmp_path / "mine.yaml"
    path.write_text(path.read_text().replace("epochs: 4", "epohcs: 4\n  batch_sise: 2"))
    result = run("check", "mine.yaml", "tiny-ask")
    assert result.exit_code == 1
    assert result.stdout == "mine.yaml: invalid\ntiny-ask: ok\n"
    assert result.stderr.splitlines()[:3] == [
        "Error: 1 of 2 presets is invalid",
        "  mine.yaml, line 13: train.epohcs: unknown key; did you mean train.epochs?",
        "  mine.yaml, line 14: train.batch_sise: unknown key; did you mean train.batch_size?",
    ]
    assert result.stderr.splitlines()[3].endswith(
        "presets show video-7b-stage2 --full` lists every key with its meaning"
    )
    (report,) = json.loads(run("check", "mine.yaml", "--json").stdout)["presets"]
    assert len(report["problems"]) == 2 and "presets show" in report["hint"]


@pytest.mark.parametrize(
    ("data", "what", "hint"),
    [
        (b"", "my.yaml is empty", "`llavanext presets copy NAME FILE` makes a preset to start from."),
        (b"\x93\xff", "my.yaml cannot be read: it is not UTF-8 text", "save it as UTF-8"),
        (None, "the preset file my.yaml does not exist", "`llavanext presets list` shows the presets"),
    ],
)
def test_check_of_what_is_no_preset_has_the_hint_that_helps(run, tmp_path, data, what, hint):
    if data is not None:
        (tmp_path / "my.yaml").write_bytes(data)
    assert run("check", "my.yaml").stderr == f"Error: 1 of 1 presets is invalid\n  {what}\nHint: {hint}\n"


def test_check_of_presets_with_different_faults_says_where_each_has_its_hint(run, tmp_path):
    (tmp_path / "my.yaml").write_text("")
    lines = run("check", "my.yaml", "no.yaml").stderr.splitlines()
    assert lines[1:3] == ["  my.yaml is empty", "  the preset file no.yaml does not exist"]
    assert lines[3:] == ["Hint: check them one by one for a hint about each"]


def test_compiling_a_preset_in_a_file_says_what_became_of_it(run):
    run("copy", "tiny-ask", "mine.yaml")
    result = run("check", "mine.yaml", "--compile")
    assert result.stdout == "mine.yaml: ok: it answers on a CPU, so there is nothing to compile for NPUs\n"


def test_check_without_names_checks_all(run):
    result = run("check")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"{name}: ok" for name in sorted(preset_files())]


def test_diff(run):
    differences = json.loads(run("diff", "video-7b-stage2", "video-7b-stage3", "--json").stdout)
    assert differences["data.frames"] == {"one": 0, "other": 16}
    assert "model.vision.hidden_size" not in differences
    table = run("diff", "video-7b-stage2", "video-7b-stage3").stdout.splitlines()
    assert table[0].split() == ["key", "video-7b-stage2", "video-7b-stage3"]
    assert [line.split()[0] for line in table[1:]] == list(differences)


def test_diff_of_two_tasks_has_the_keys_of_both(run):
    differences = json.loads(run("diff", "tiny-stage2", "tiny-ask", "--json").stdout)
    assert differences["train.epochs"]["other"] is None and differences["task"] == {"one": "train", "other": "ask"}


def test_diff_of_a_preset_with_itself_and_with_nothing(run):
    same = run("diff", "tiny-ask", "tiny-ask")
    assert (same.exit_code, same.stdout, same.stderr) == (0, "", "The presets are the same.\n")
    assert run("diff", "tiny-ask", "tiny-aks").exit_code == 1

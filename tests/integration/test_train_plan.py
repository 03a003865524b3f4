"""`train --plan` and `--check`: what is said before anything runs, and what is not started."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from llavanext_cli.app import app
from llavanext_cli.errors import DataError, TrainingError
from llavanext_cli.training.job import TrainRequest
from llavanext_cli.training.ready_run import check_training

SMALL = ("--set", "data.seq_length=256", "--set", "data.frames=4", "--set", "train.batch_size=2")
AGAIN = "Counting 48 samples again: the mix was counted with another tokenizer, architecture"
ASCEND = ("video-7b-stage2", "--set", "data.frames=4", "--set", "train.recompute=1", "--set", "data.seq_length=512")


def words(preset: tuple[str, ...], data, checkpoint, *more) -> tuple:
    name, *settings = preset
    return ("train", name, "--data", data, "--checkpoint", checkpoint, "--out", "run", *settings, *more)


def test_plan_says_what_a_run_takes_and_writes_nothing(run_llavanext, data, tiny_checkpoint):
    done = run_llavanext(*words(ASCEND, data, tiny_checkpoint, "--plan", "--json"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    plan, memory = report["plan"], report["plan"]["memory"]
    assert report["fits"]
    assert plan["global_batch"] == 8
    assert plan["tokens_per_step"] == 8 * 512
    assert plan["tokens_per_epoch"] == plan["steps_per_epoch"] * 8 * 512
    weights = sum(file.stat().st_size for file in tiny_checkpoint.glob("*.safetensors"))
    assert plan["model_bytes"] == pytest.approx(weights, rel=0.05)
    assert plan["checkpoint_bytes"] == 3 * plan["model_bytes"]
    assert plan["disk_bytes"] == (3 + 2) * plan["checkpoint_bytes"], "train.keep, the next one, and its slices"
    assert plan["model_bytes"] / 8 < memory["weights"] == memory["gradients"] == memory["optimizer"] / 2
    assert memory["pool"] == 57 << 30
    assert not list(run_llavanext.folder.iterdir())

    shown = run_llavanext(*words(ASCEND, data, tiny_checkpoint, "--plan"))
    assert "optimizer" in shown.stdout
    assert "57 GB" in shown.stdout


def counted(path: Path, data: Path, checkpoint: Path, frames: int, **size: int) -> Path:
    """A copy of `data` as `mix --tokenizer` writes it: each sample with its size, the header with what counted them.
    `size` replaces what was counted."""
    from llavanext_cli.config.model_folder import load_architecture
    from llavanext_cli.mixing.samples import read_samples
    from llavanext_cli.processing.processor import Processor
    from llavanext_cli.processing.tokenizer import load_tokenizer

    processor = Processor(load_architecture(checkpoint), load_tokenizer(checkpoint), frames=frames)
    file = read_samples(data)
    rows = [replace(sample, **processor.measure(sample, file.roots)._asdict() | size) for sample in file]
    head = file.header | {"counted_by": processor.fingerprint}
    path.write_bytes(msgspec.json.Encoder().encode_lines([head, *rows]))
    return path


@pytest.mark.parametrize(
    ("frames", "size", "said", "fault"),
    [
        (4, {}, [], None),
        (4, {"tokens": 1234}, [], "48 of 48 samples have too many tokens: 's0' has 1234, and 256 fit"),
        (
            8,
            {"tokens": 1234},
            [AGAIN],
            None,
        ),
    ],
    ids=["recorded", "nothing is counted again", "other frames"],
)
def test_sizes_that_mix_recorded_are_used_if_the_run_would_count_the_same(
    data, tiny_checkpoint, tmp_path, monkeypatch, frames, size, said, fault
):
    from llavanext_cli.processing.tokenizer import Tokenizer

    file = counted(tmp_path / "mix.jsonl", data, tiny_checkpoint, frames, **size)
    encoded, lines = [], []
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, first=False: encoded.append(text) or [1])
    request = TrainRequest("tiny-stage2", file, tiny_checkpoint, tmp_path / "run", overrides=SMALL[1::2])
    checked = partial(check_training, request, say=lines.append)
    if fault:
        with pytest.raises(DataError, match=fault):
            checked()
    else:
        assert checked().plan.samples == 48
    assert bool(encoded) == bool(said)
    assert [line.partition(" or number")[0] for line in lines] == said


def test_a_mix_for_an_image_preset_is_not_counted_again(media, tiny_checkpoint, tmp_path):
    """tiny-stage2 takes no frames, so mix must count without frames too; a sample with a video does not fit."""
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    records = [{"id": str(number), "image": f"{number % 6}.png", "conversations": talk} for number in range(16)]
    records.append({"id": "film", "video": "clip.mp4", "conversations": talk})
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "mix.yaml").write_text(f"datasets:\n  - json_path: records.json\n    media_root: {media}\n")
    out = tmp_path / "mix.jsonl"
    counting = ["--tokenizer", tiny_checkpoint, "--preset", "tiny-stage2", "--rejects", tmp_path / "rejects.jsonl"]
    done = CliRunner().invoke(app, [*map(str, ["mix", tmp_path / "mix.yaml", "--out", out, *counting])])
    assert done.exit_code == 0, done.stderr
    rejected = json.loads((tmp_path / "rejects.jsonl").read_text())
    assert (rejected["id"], rejected["reason"]) == ("film", "too_many_frames")
    lines = []
    request = TrainRequest("tiny-stage2", out, tiny_checkpoint, tmp_path / "run")
    assert check_training(request, say=lines.append).plan.samples == 16
    assert not lines


def test_media_are_looked_for_even_if_all_samples_are_counted(data, tiny_checkpoint, tmp_path):
    file = counted(tmp_path / "mix.jsonl", data, tiny_checkpoint, 4)
    file.write_text(file.read_text().replace("5.png", "gone.png"))
    request = TrainRequest("tiny-stage2", file, tiny_checkpoint, tmp_path / "run", overrides=SMALL[1::2])
    with pytest.raises(DataError, match=r"\d+ of 48 samples name an image or video that does not exist") as error:
        check_training(request)
    assert "gone.png" in error.value.details[0]
    run = check_training(dataclasses.replace(request, on_bad="skip"))
    assert 0 < run.unreadable < 48


def test_numbers_that_the_checkpoints_model_does_not_divide_by_are_refused(run_llavanext, data, tiny_checkpoint):
    split = ("--set", "parallel.tensor=8", "--set", "parallel.data=1")  # the preset's own model has 32 heads
    done = run_llavanext(*words(ASCEND, data, tiny_checkpoint, *split, "--plan"))
    assert done.returncode == 1
    assert "heads" in done.stderr
    assert not done.stdout


def test_a_disk_that_is_too_small_is_said_before_the_first_step(run_llavanext, data, tiny_checkpoint, monkeypatch):
    from llavanext_cli.training import preview

    settings = ("data.seq_length=256", "data.frames=4", "train.batch_size=2", "train.save_every=5")
    out = run_llavanext.folder / "run"
    run = check_training(TrainRequest("tiny-stage2", data, tiny_checkpoint, out, overrides=settings))
    preview.check_resources(run)
    monkeypatch.setattr(preview.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(TrainingError, match=r"will take up to .*, but only 1 kB are free on its disk"):
        preview.check_resources(run)
    assert not list(run_llavanext.folder.iterdir())


def test_a_run_that_cannot_fit_is_not_started(run_llavanext, data, tiny_checkpoint):
    small = (*ASCEND, "--set", "runtime.memory=0.001GB")
    done = run_llavanext(*words(small, data, tiny_checkpoint))
    assert done.returncode == 1
    assert "each device would need" in done.stderr
    assert "activations" in done.stderr
    assert "--force" in done.stderr
    assert not list(run_llavanext.folder.iterdir())
    planned = run_llavanext(*words(small, data, tiny_checkpoint, "--plan"))
    assert planned.returncode == 0
    assert "does not fit" in planned.stderr


@pytest.mark.full
def test_check_compiles_the_checkpoints_own_model(run_llavanext, data, tiny_checkpoint):
    small = ("tiny-stage2", *SMALL)
    done = run_llavanext(*words(small, data, tiny_checkpoint, "--check", "--json"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["compiled"]
    assert report["target"] == "CPU"
    held = report["bytes"]
    weights = sum(file.stat().st_size for file in tiny_checkpoint.glob("*.safetensors"))
    assert held["weights"] == pytest.approx(weights, rel=0.05)
    assert held["optimizer"] == 2 * held["weights"]
    assert not list(run_llavanext.folder.iterdir())

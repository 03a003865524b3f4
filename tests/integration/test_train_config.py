"""The printed configurations are files that MindFormers' own entry takes: it reads, checks and builds from them.

The steps are those of `run_mindformer.py`, which is in MindFormers' repository and not in its wheel.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from llavanext_cli.app import app
from llavanext_cli.config.presets import list_presets
from tests.integration.test_train import COMMON


class BuiltError(Exception):
    """Everything is built; only the steps are left."""


def printed(file: Path, *words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.stderr
    file.write_text(done.stdout)
    return str(file)


@pytest.mark.parametrize("name", [preset.name for preset in list_presets()])
def test_every_resolved_preset_passes_mindformers_templates_and_validators(name, mindspore_cpu, tmp_path):
    """Its templates refuse a key that a section does not know."""
    from mindformers import MindFormerConfig
    from mindformers.core.context.validators import execute_validator

    file = printed(tmp_path / "resolved.yaml", "presets", "show", name, "--resolved")
    config = MindFormerConfig(file)
    execute_validator(config)
    assert config.model.arch.type == "LlavaNext"

    wrong = yaml.safe_load(Path(file).read_text())
    wrong["parallel_config"]["data_paralel"] = 2
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(KeyError, match="data_paralel"):
        MindFormerConfig(str(tmp_path / "wrong.yaml"))


def test_mindformers_builds_the_run_that_a_dry_run_prints(mindspore_cpu, data, tiny_checkpoint, tmp_path):
    """Network, optimizer, schedule and training cell, from the file alone."""
    from mindformers import MindFormerConfig, Trainer
    from mindformers.core.context import build_context
    from mindspore import Callback
    from mindspore.dataset import NumpySlicesDataset

    built = {}

    class Stop(Callback):
        def on_train_begin(self, run_context):
            built["cell"] = run_context.original_args().train_network
            raise BuiltError

    words = ["train", "tiny-stage2", "--data", data, "--checkpoint", tiny_checkpoint, "--out", tmp_path / "run"]
    words += [*COMMON, "--set", "train.batch_size=4", "--set", "train.trainable=[projector,newline,language]"]
    file = printed(tmp_path / "dry.yaml", *words, "--set", "train.learning_rates.projector=3e-4", "--dry-run")
    config = MindFormerConfig(file)
    build_context(config)
    with pytest.raises(BuiltError):
        Trainer(config, train_dataset=NumpySlicesDataset([0] * 12).batch(4), callbacks=[Stop()]).train()
    cell = built["cell"]
    assert type(cell).__name__ == "CPUTrainOneStepCell"
    assert type(cell.optimizer).__name__ == "CPUAdamW"
    assert {p.name.split(".")[0] for p in cell.network.get_parameters()} == {
        "vision_tower", "projector", "image_newline", "language_model",
    }  # fmt: skip
    rates = {float(rate(1)) for rate in cell.optimizer.learning_rate}
    assert len(rates) == 2 and min(rates) > 0

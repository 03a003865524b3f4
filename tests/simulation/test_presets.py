"""Every shipped preset compiles for its devices, and what is wrong does not: MindSpore's own front end says so."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from llavanext_cli.config.presets import load_preset
from llavanext_cli.config.shipped import preset_files
from llavanext_cli.errors import ConfigError
from llavanext_cli.simulation.simulate import SUMS, SimulationReport, is_weight
from llavanext_cli.training.memory import plan_memory, slice_of, trained_parameters
from llavanext_cli.weights.adapter import is_adapter
from llavanext_cli.weights.ranks import read_strategy
from tests.simulation.conftest import Compile

SPLIT = {
    "dp 8": (),
    "dp 4 x mp 2": ("parallel.data=4", "parallel.tensor=2"),
    "mp 8": ("parallel.data=1", "parallel.tensor=8"),
}
STAGE2 = "video-7b-stage2"


DEFAULT = (STAGE2, "video-7b-ask-video")
"""Presets that are compiled without `-m full`."""


def pick(names, default) -> list:
    return [pytest.param(name, marks=() if name in default else pytest.mark.full) for name in sorted(names)]


def assert_plan_is_exact(report: SimulationReport) -> None:
    """What `train --plan` calls exact equals what MindSpore's planner made: every slice, and their sums."""
    assert report.fault == ""
    preset = report.preset
    expected = {name: slice_of(name, shape, preset) for name, shape in trained_parameters(preset, preset.model).items()}
    assert {name: part.shape for name, part in report.slices.items() if is_weight(name)} == expected
    plan, held = plan_memory(preset), report.bytes
    assert (plan.weights, plan.gradients, plan.optimizer) == (held["weights"], held["gradients"], held["optimizer"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", pick(preset_files(), DEFAULT))
def test_every_shipped_preset_compiles(name: str, compiled: Compile):
    report = compiled(name)
    preset = load_preset(name)
    assert report.fault == ""
    assert report.preset.parallel == preset.parallel
    if preset.ask and preset.runtime.target == "CPU":
        assert report.slices == {}  # tests/integration/test_ask.py answers with it
        return
    assert report.preset.model.text.num_hidden_layers == 2
    assert report.seconds.keys() == ({"training step"} if preset.train else {"prefill", "increment"})
    assert report.bytes["weights"] > 0
    assert bool(report.bytes["optimizer"]) == (preset.task == "train")
    assert bool(report.bytes["cache"]) == (preset.task == "ask")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("split", pick(SPLIT, ("dp 8",)))
def test_the_plan_knows_every_slice(split: str, compiled: Compile):
    assert_plan_is_exact(compiled(STAGE2, *SPLIT[split]))


@pytest.mark.full
@pytest.mark.timeout(600)
def test_frozen_parts_have_neither_gradients_nor_moments(compiled: Compile):
    report = compiled(STAGE2, "train.trainable=[projector,newline]")
    assert_plan_is_exact(report)
    held = report.bytes
    assert 0 < held["gradients"] < held["weights"]
    assert held["optimizer"] == 2 * held["gradients"]


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("split", "batches"), [("dp 8", 2), ("dp 4 x mp 2", 1)])
def test_lora_is_sliced_as_the_weights_beside_it(split: str, batches: int, compiled: Compile):
    """So are the sums of gradients when several batches make a step."""
    settings = ("train.method=lora", "train.lora.dropout=0.05", f"train.accumulate={batches}")
    report = compiled(STAGE2, *SPLIT[split], *settings)
    assert_plan_is_exact(report)
    assert any(name.startswith(SUMS) for name in report.slices) == (batches > 1)
    whole = trained_parameters(report.preset, report.preset.model)
    assert sum(is_adapter(name) for name in whole) == 2 * 2 * 7
    layouts = read_strategy(report.strategy)  # by which the slices of a checkpoint are joined
    for name, shape in whole.items():  # frozen weights are sliced, too
        assert tuple(high - low for low, high in layouts[name].box(shape, 0)) == report.slices[name].shape, name


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_batch_of_answers_on_two_devices(compiled: Compile):
    """`ask --devices 2 --batch-size 4`: heads and cache are shared, and every worker gets the logits of all words."""
    report = compiled("video-7b-ask-video", devices=2, batch=4)
    assert report.fault == ""
    assert report.preset.parallel.tensor == 2
    layer = "language_model.model.layers.0.attention."
    assert report.slices[f"{layer}wq.weight"].shape == (2048, 4096)
    assert report.slices[f"{layer}wo.weight"].shape == (4096, 2048)
    assert report.slices[f"{layer}infer_attention.paged_attention_mgr.key_cache"].shape == (4 * 512, 16, 16, 128)
    assert logits_of(report.log.parent) == {(1, 32064), (4, 32064)}  # prefill, increment


def logits_of(folder: Path) -> set[tuple[int, int]]:
    """Shapes of what the compiled graphs return."""
    found = set()
    for graph in folder.rglob("*validate*.ir"):
        ends = re.findall(r"Return\(.*\n.*: \(<Tensor\[Float32\], \((\d+), (\d+)\)", graph.read_text(errors="replace"))
        found |= {(int(rows), int(words)) for rows, words in ends}
    return found


@pytest.mark.timeout(600)
def test_no_activation_is_gathered_by_accident(compiled: Compile):
    """With data parallelism alone, whole tensors travel only as weights and gradients; a loss a token may."""
    moved = collectives(compiled(STAGE2))
    assert sum(kind == "AllGather" and is_parameter for kind, is_parameter, _ in moved) > 20
    activations = [size for kind, is_parameter, size in moved if kind == "AllGather" and not is_parameter]
    assert all(size <= 8 * 4096 for size in activations), activations


def collectives(report: SimulationReport) -> list[tuple[str, bool, int]]:
    """(kind, whether a parameter is its input, values that come out) of the collectives in the planned graph."""
    graph = next(report.log.parent.rglob("*validate*.ir"))
    found = []
    lines = graph.read_text(errors="replace").splitlines()
    for line, types in itertools.pairwise(lines):
        if match := re.search(r"= (?:PrimFunc_)?(AllGather|AllReduce|ReduceScatter)\(", line):
            inputs, _, output = types.partition(") -> (")
            shape = re.search(r"\(([\d, ]*)\)", output)
            size = 1
            for extent in filter(None, (shape[1] if shape else "").split(", ")):
                size *= int(extent.strip(","))
            found.append((match[1], "is_parameter" in inputs or "ref_key" in inputs, size))
    return found


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_wrong_shard_is_named(compiled: Compile):
    report = compiled(STAGE2, worker=Path(__file__).with_name("wrong_shard.py"))
    assert "operator Gather init failed" in report.fault
    assert "strategy of the batch dims of param and indices must be equal" in report.fault
    assert "\n" not in report.fault
    assert report.log.is_file()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("parallel.data=1", "parallel.tensor=3", "parallel.devices=3"), "cannot share num_attention_heads 32 evenly"),
        (("parallel.data=4", "parallel.tensor=2", "model.text.vocab_size=32063"), "cannot share vocab_size 32063"),
        (("parallel.data=4", "parallel.tensor=4"), "8 devices, but data 4 x tensor 4 x pipeline 1 = 16"),
    ],
)
def test_numbers_that_do_not_divide_are_refused_before_compiling(settings, words, compiled: Compile):
    with pytest.raises(ConfigError) as caught:
        compiled(STAGE2, *settings)
    assert words in "\n".join(caught.value.details)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["video-7b-stage2", "video-7b-stage3"])
def test_the_whole_7b(name: str, compiled: Compile, capsys):
    """32 and 23 layers, 8 devices: the preset as it is shipped."""
    report = compiled(name, layers=None)
    assert_plan_is_exact(report)
    assert (report.preset.model.text.num_hidden_layers, report.preset.parallel.devices) == (32, 8)
    with capsys.disabled():
        print(f"\n{name}: {report.describe()}; {report.peak_memory / 1e9:.1f} GB of host memory")

"""Every shipped preset compiles for its devices, and what is wrong does not: MindSpore's own front end says so."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from llavanext_cli.config.presets import load_preset
from llavanext_cli.config.shipped import preset_files
from llavanext_cli.errors import ConfigError
from llavanext_cli.simulation.simulate import SUMS, SimulationReport, is_weight, shortened
from llavanext_cli.training.memory import plan_memory, slice_of, trained_parameters
from llavanext_cli.weights.adapter import is_adapter
from llavanext_cli.weights.keymap import expected_parameters
from llavanext_cli.weights.ranks import read_strategy
from tests.simulation.conftest import Compile

SPLIT = {
    "dp 8": (),
    "dp 4 x mp 2": ("parallel.data=4", "parallel.tensor=2"),
    "mp 8": ("parallel.data=1", "parallel.tensor=8"),
}
STAGE2 = "video-7b-stage2"


def compiled_by_default(names, defaults) -> list:
    """Parameters, of which the suite compiles the default ones, and `-m full` the others."""
    return [name if name in defaults else pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", compiled_by_default(sorted(preset_files()), {STAGE2, "video-7b-ask-video"}))
def test_every_shipped_preset_compiles(name: str, compiled: Compile):
    report = compiled(name)
    preset = load_preset(name)
    assert report.fault == ""
    assert (report.devices, report.layers) == (preset.parallel.devices, 2)
    if preset.ask and preset.runtime.target == "CPU":
        assert report.ranks == ()  # tests/integration/test_ask.py answers with it
        return
    (rank,) = report.ranks
    graphs = {"training step"} if preset.train else {"prefill", "increment"}
    assert rank.seconds.keys() == graphs
    assert rank.parameter_bytes > 0
    assert bool(rank.optimizer_bytes) == (preset.task == "train")
    assert bool(rank.cache_bytes) == (preset.task == "ask")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("split", compiled_by_default(SPLIT, {"dp 8"}))
def test_the_plan_knows_every_slice(split: str, compiled: Compile):
    """What `train --plan` calls exact equals the slices that MindSpore's planner made."""
    report = compiled(STAGE2, *SPLIT[split])
    assert report.fault == ""
    (rank,) = report.ranks
    preset = load_preset(STAGE2, SPLIT[split])
    preset = load_preset(STAGE2, [*SPLIT[split], *shortened(preset, 2)])
    expected = {name: slice_of(name, shape, preset) for name, shape in expected_parameters(preset.model).items()}
    assert {name: part.shape for name, part in rank.slices.items() if is_weight(name)} == expected
    plan = plan_memory(preset)
    assert (plan.weights, plan.gradients, plan.optimizer) == (
        rank.parameter_bytes,
        rank.gradient_bytes,
        rank.optimizer_bytes,
    )


@pytest.mark.full
@pytest.mark.timeout(600)
def test_frozen_parts_have_neither_gradients_nor_moments(compiled: Compile):
    settings = ("train.trainable=[projector,newline]",)
    report = compiled(STAGE2, *settings)
    assert report.fault == ""
    preset = load_preset(STAGE2, settings)
    plan = plan_memory(load_preset(STAGE2, [*settings, *shortened(preset, 2)]))
    (rank,) = report.ranks
    assert 0 < rank.gradient_bytes == plan.gradients < rank.parameter_bytes
    assert rank.optimizer_bytes == plan.optimizer == 2 * rank.gradient_bytes


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("split", "batches"), [("dp 8", 2), ("dp 4 x mp 2", 1)])
def test_lora_is_cut_as_the_weights_beside_it_are(split: str, batches: int, compiled: Compile):
    """So are the sums of gradients when several batches make a step."""
    settings = (*SPLIT[split], "train.method=lora", "train.lora.dropout=0.05", f"train.accumulate={batches}")
    report = compiled(STAGE2, *settings)
    assert report.fault == ""
    preset = load_preset(STAGE2, settings)
    preset = load_preset(STAGE2, [*settings, *shortened(preset, 2)])
    (rank,) = report.ranks
    whole = trained_parameters(preset, preset.model)
    assert sum(is_adapter(name) for name in whole) == 2 * 2 * 7
    expected = {name: slice_of(name, shape, preset) for name, shape in whole.items()}
    assert {name: part.shape for name, part in rank.slices.items() if is_weight(name)} == expected
    assert any(name.startswith(SUMS) for name in rank.slices) == (batches > 1)
    layouts = read_strategy(rank.strategy)  # by which the slices of a checkpoint are put together
    for name, shape in whole.items():  # frozen weights are cut, too
        box = layouts[name].box(shape, 0)
        assert tuple(high - low for low, high in box) == expected[name], name
    plan = plan_memory(preset)
    assert (plan.weights, plan.gradients, plan.optimizer) == (
        rank.parameter_bytes,
        rank.gradient_bytes,
        rank.optimizer_bytes,
    )


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_batch_of_answers_on_two_devices(compiled: Compile, tmp_path_factory: pytest.TempPathFactory):
    """`ask --devices 2 --batch-size 4`: heads and cache are shared, and every worker gets the logits of all words."""
    report = compiled("video-7b-ask-video", devices=2, batch=4)
    assert report.fault == ""
    assert (report.devices, report.tensor) == (2, 2)
    slices = report.ranks[0].slices
    layer = "language_model.model.layers.0.attention."
    assert slices[f"{layer}wq.weight"].shape == (2048, 4096)
    assert slices[f"{layer}wo.weight"].shape == (4096, 2048)
    assert slices[f"{layer}infer_attention.paged_attention_mgr.key_cache"].shape == (4 * 512, 16, 16, 128)
    newest = max(tmp_path_factory.getbasetemp().glob("compile*"), key=lambda folder: folder.stat().st_mtime)
    assert logits_of(newest) == {(1, 32064), (4, 32064)}  # prefill, increment


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
    folder = compile_folder(report)
    (graph,) = [path for path in folder.rglob("*validate*.ir")][:1]
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


def compile_folder(report: SimulationReport) -> Path:
    return report.ranks[0].strategy.parents[2]


@pytest.mark.timeout(600)
def test_a_wrong_shard_is_named(compiled: Compile):
    report = compiled(STAGE2, worker=Path(__file__).with_name("wrong_shard.py"))
    assert not report.ok
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
    assert report.fault == ""
    assert (report.layers, report.devices) == (32, 8)
    (rank,) = report.ranks
    plan = plan_memory(load_preset(name))
    assert (plan.weights, plan.gradients, plan.optimizer) == (
        rank.parameter_bytes,
        rank.gradient_bytes,
        rank.optimizer_bytes,
    )
    with capsys.disabled():
        print(f"\n{name}: {report.describe()}; {rank.peak_memory / 1e9:.1f} GB of host memory")

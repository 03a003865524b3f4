"""The suite notices: faults that are easily made are made on purpose, and the stage that names each is checked.

Each replaces one function or table of ours, computes the same cases with the same compiled network, and must make the
comparison with transformers fail at the stage where the fault is.
"""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from llavanext_cli.processing import processor, sample_layout
from llavanext_cli.records import IGNORE_INDEX
from llavanext_cli.weights import keymap
from llavanext_cli.weights.convert import run_convert
from llavanext_cli.weights.request import ConvertRequest
from tests.loading import load_parameters
from tests.parity import cases as case_module
from tests.parity import stages
from tests.parity.cases import build_cases
from tests.parity.models import tiny_config, write_hf_folder
from tests.parity.stages import check_stages
from tests.parity.variants import SMALLER

NAME = "57x113"


def stages_of(model, forward, name=NAME):
    """Encoded anew, so that what was replaced is used."""
    return forward.stages(build_cases(model.processor, (name,)))[0]


@contextmanager
def first_difference(stage):
    """The comparison inside fails, and names `stage`."""
    with pytest.raises(AssertionError, match=f"{stage}( [0-9]+)? is the first stage that differs"):
        yield


@pytest.fixture(autouse=True)
def table_of_faults(monkeypatch):
    """Errors that are made on purpose stay out of the table that is printed."""
    monkeypatch.setattr(stages, "TABLE", stages.Table())


@pytest.fixture(scope="module")
def theirs(model, reference):
    return reference.stages(next(case for case in model.cases if case.name == NAME))


def test_without_a_fault_all_is_equal(model, forward, theirs):
    check_stages(NAME, stages_of(model, forward), theirs)


def test_height_and_width_swapped(model, forward, theirs, monkeypatch):
    plan_tiles = case_module.plan_tiles
    monkeypatch.setattr(case_module, "plan_tiles", lambda size, arch: replace(plan_tiles(size[::-1], arch), size=size))
    ours = stages_of(model, forward)
    with first_difference("pixels"):
        check_stages(NAME, ours, theirs)


def test_height_and_width_swapped_in_the_index_only(model, forward, theirs, monkeypatch):
    """The pixels are right, and as many tokens; the patches are taken column by column."""
    index_grid = sample_layout._index_grid

    def turned(plan, arch):
        grid = index_grid(plan, arch)
        return np.sort(grid.T.reshape(grid.shape), axis=1)

    monkeypatch.setattr(sample_layout, "_index_grid", turned)
    ours = stages_of(model, forward)
    with first_difference("fused"):
        check_stages(NAME, ours, theirs)


def test_one_newline_dropped(model, forward, theirs, monkeypatch):
    """The last row's, with its token."""
    lay_out = processor.lay_out

    def shorter(*args):
        layout = lay_out(*args)
        last = np.flatnonzero(layout.input_ids == model.arch.image_token_index)[-1]
        return sample_layout.SampleLayout(*[np.delete(values, last) for values in vars(layout).values()])

    monkeypatch.setattr(processor, "lay_out", shorter)
    ours = stages_of(model, forward)
    with first_difference("ids"):
        check_stages(NAME, ours, theirs)


def test_one_newline_replaced_by_text(model, forward, theirs, monkeypatch):
    """As many tokens as there should be, but the last row's newline keeps the embedding of its id."""
    index_media = sample_layout.index_media

    def without(plans, arch):
        rows = index_media(plans, arch)
        rows[-1][-1] += 1
        return rows

    monkeypatch.setattr(sample_layout, "index_media", without)
    ours = stages_of(model, forward)
    with first_difference("fused"):
        check_stages(NAME, ours, theirs)


def test_one_token_more_masked(model, forward, learning, theirs, monkeypatch):
    """The first of the answer. Without the labels' own stage, the loss would tell too."""
    lay_out = processor.lay_out

    def masked(*args):
        layout = lay_out(*args)
        labels = layout.labels.copy()
        labels[np.flatnonzero(labels != IGNORE_INDEX)[0]] = IGNORE_INDEX
        return replace(layout, labels=labels)

    monkeypatch.setattr(processor, "lay_out", masked)
    ours = stages_of(model, forward)
    with first_difference("labels"):
        check_stages(NAME, ours, theirs)
    loss, _ = learning([case.encoded for case in build_cases(model.processor, (NAME,))])
    with first_difference("loss"):
        check_stages(NAME, {"loss": np.array(loss)}, theirs)


@contextmanager
def weights_of(forward, folder):
    """The compiled network with another checkpoint's weights, for a while."""
    from mindspore import Tensor

    parameters = forward.network.parameters_dict()
    try:
        for name, values in load_parameters(folder).items():
            parameters[name].set_data(Tensor(values))
        yield
    finally:
        for name, values in load_parameters(forward.model.checkpoint).items():
            parameters[name].set_data(Tensor(values))


def swapped(rules, first, second):
    """The rules with two sources exchanged."""
    new = {first: second, second: first}
    turn = lambda source: next((source.replace(a, b) for a, b in new.items() if a in source), source)  # noqa: E731
    return tuple(replace(rule, sources=tuple(turn(source) for source in rule.sources)) for rule in rules)


@pytest.mark.parametrize(("table", "stage"), [("VISION_LAYER_RULES", "tower"), ("TEXT_LAYER_RULES", "layer")])
def test_queries_and_keys_swapped_in_the_converter(table, stage, model, forward, source, theirs, monkeypatch, tmp_path):
    monkeypatch.setattr(keymap, table, swapped(getattr(keymap, table), "q_proj", "k_proj"))
    run_convert(ConvertRequest(source, tmp_path / "swapped"))
    with weights_of(forward, tmp_path / "swapped"):
        ours = stages_of(model, forward)
    with first_difference(stage):
        check_stages(NAME, ours, theirs)
    check_stages(NAME, stages_of(model, forward), theirs)  # and the right weights are back


def test_pooled_after_projecting(mindspore_cpu, tmp_path):
    """In a model of its own, since this is another graph."""
    from tests.parity.mindspore_side import Forward, Model
    from tests.parity.torch_side import Reference

    changes = SMALLER | {"pool_before_projector": False}
    source = write_hf_folder(tmp_path / "hub", tiny_config(changes))
    model = Model(source, tmp_path / "converted", ("video",))
    theirs = Reference(source).stages(model.cases[0])
    ours = Forward(model).stages(model.cases)[0]
    del theirs["pooled"]  # has another width already
    with first_difference("projected"):
        check_stages("video", ours, theirs)

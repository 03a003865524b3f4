"""The tiny model that most of the suite shares, on both sides; and the table of errors at the end."""

import mindspore  # noqa: F401  -- before transformers' protobuf, whose descriptors MindSpore's own would clash with
import pytest

from tests.parity.stages import TABLE


def pytest_terminal_summary(terminalreporter, config):
    """`pytest tests/parity -n 0 -s` prints how far every stage of every case was off."""
    if config.option.capture == "no" and TABLE.errors:
        terminalreporter.section("relative error: case x stage")
        for line in TABLE.lines():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The tiny model as it would come from the hub."""
    from tests.parity.models import tiny_config, write_hf_folder

    return write_hf_folder(tmp_path_factory.mktemp("plain") / "hub", tiny_config())


@pytest.fixture(scope="session")
def model(mindspore_cpu, source):
    """The same, through the shipped converter."""
    from tests.parity.mindspore_side import Model

    return Model(source, source.parent / "converted")


@pytest.fixture(scope="session")
def forward(model):
    from tests.parity.mindspore_side import Forward

    return Forward(model)


@pytest.fixture(scope="session")
def learning(model):
    from tests.parity.mindspore_side import Learning

    return Learning(model)


@pytest.fixture(scope="session")
def ours(model, forward):
    """Case name → our stages, each from a padded batch of four different cases."""
    return dict(zip([case.name for case in model.cases], forward.stages(model.cases), strict=True))


@pytest.fixture(scope="session")
def reference(source):
    """transformers' model of the same folder."""
    pytest.importorskip("torch")
    from tests.parity.torch_side import Reference

    return Reference(source)

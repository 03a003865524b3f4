"""What `train` may begin in, and what it leaves alone."""

import pytest

from llavanext_cli.errors import ConfigError, LlavaNextError
from llavanext_cli.training.folder import make_out
from llavanext_cli.training.job import Job
from llavanext_cli.training.nodes import Nodes, parse_master


@pytest.fixture
def job(tmp_path):
    return Job("tiny-stage2", (), None, tmp_path / "data", tmp_path / "base", tmp_path / "run")


def test_what_another_node_put_there_first_is_kept(job):
    job.libraries_folder.mkdir(parents=True)
    job.save(1)
    with pytest.raises(LlavaNextError, match="holds something that is no training run"):
        make_out(job, force=False)
    make_out(job, force=False, nodes=2)
    assert job.file_of(1).is_file()
    assert job.checkpoints_folder.is_dir()


def test_a_run_is_replaced_by_force_only(job):
    make_out(job, force=False)
    job.save()
    with pytest.raises(LlavaNextError, match="already holds a run") as fault:
        make_out(job, force=False)
    assert "--resume" in fault.value.hint
    make_out(job, force=True)
    assert not job.file.exists()


@pytest.mark.parametrize("text", ["here", "10.0.0.1", "10.0.0.1:", ":8118", "10.0.0.1:port", "10.0.0.1:70000"])
def test_a_master_that_is_no_address(text):
    with pytest.raises(ConfigError, match="ADDRESS:PORT"):
        parse_master(text)


def test_nodes_that_do_not_fit():
    assert parse_master("10.0.0.1:8118") == ("10.0.0.1", 8118)
    with pytest.raises(ConfigError, match="node 2 of 2 does not exist"):
        Nodes(2, 2, ("10.0.0.1", 8118))
    with pytest.raises(ConfigError, match="a place to meet"):
        Nodes(count=2)

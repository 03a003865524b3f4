"""What `train` may begin in, and what it leaves alone."""

import pytest

from llavanext_cli.config.presets import load_preset
from llavanext_cli.errors import ConfigError, LlavaNextError
from llavanext_cli.training import folder
from llavanext_cli.training.folder import make_out, resume_run
from llavanext_cli.training.job import Job
from llavanext_cli.training.nodes import Nodes, parse_master, worker_command


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


def test_force_on_the_first_node_leaves_what_another_node_has_begun(job):
    make_out(job, force=False)
    job.save()
    (job.model_folder).mkdir()
    job.save(1)
    make_out(job, force=True, nodes=2)
    assert job.file_of(1).is_file()
    assert not job.file.exists()
    assert not job.model_folder.exists()


def test_a_damaged_checkpoint_makes_room_for_the_steps_new_one(job, monkeypatch):
    monkeypatch.setattr(folder, "find_run_state", lambda place: (None, {place / "step-00000008": "w is damaged"}))
    make_out(job, force=False)
    (job.checkpoints_folder / "step-00000008").mkdir()
    (job.out / ".model.parts").mkdir()
    said = []
    assert resume_run(job, None, None, said.append) == job
    assert [path.name for path in job.checkpoints_folder.iterdir()] == ["damaged-step-00000008"]
    assert "step-00000008 is passed over" in said[0] and "w is damaged" in said[0]
    assert not (job.out / ".model.parts").exists(), "slices of another attempt"


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


def test_one_device_is_not_trained_twice_by_two_nodes(job):
    with pytest.raises(ConfigError, match="1 devices cannot be shared by 2 nodes"):
        worker_command(load_preset("tiny-stage2"), job, Nodes(2, 0, ("10.0.0.1", 8118)))

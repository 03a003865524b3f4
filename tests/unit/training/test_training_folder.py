"""What `train` may begin in, and what it leaves alone."""

import json
from dataclasses import replace

import pytest

from llavanext_cli.config.presets import load_preset
from llavanext_cli.errors import ConfigError, DataError, LlavaNextError
from llavanext_cli.launching.msrun import ONE_NODE, Nodes, parse_master
from llavanext_cli.training import folder
from llavanext_cli.training.failures import explain_failure, record_failure
from llavanext_cli.training.folder import claim, make_out, resume_run
from llavanext_cli.training.job import Job
from llavanext_cli.training.launch import worker_command


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
    with pytest.raises(ConfigError, match="1 devices cannot be shared evenly by 2 nodes"):
        worker_command(load_preset("tiny-stage2"), job, Nodes(2, 0, ("10.0.0.1", 8118)))


def test_force_removes_neither_what_is_no_runs_nor_what_it_is_to_begin_with(job):
    make_out(job, force=False)
    job.save()
    (job.out / "thesis.txt").write_text("mine")
    with pytest.raises(LlavaNextError, match=r"holds thesis.txt beside a run"):
        make_out(job, force=True)
    (job.out / "thesis.txt").unlink()
    job.model_folder.mkdir()
    with pytest.raises(LlavaNextError, match="lies in the run that --force would remove"):
        make_out(replace(job, checkpoint=job.model_folder), force=True)
    assert job.model_folder.is_dir()
    job.file.write_text("{}")
    with pytest.raises(LlavaNextError, match="holds something that is no training run"):
        make_out(job, force=True)


def test_two_commands_do_not_share_a_folder(job):
    with claim(job.out, 0):
        with pytest.raises(LlavaNextError, match="is in use by another"), claim(job.out, 0):
            pass
        with claim(job.out, 1):  # another node of the same run
            make_out(job, force=False, nodes=2)
    assert not [path for path in job.out.iterdir() if path.name.startswith(".")]
    with claim(job.out.with_name("other"), 0):
        pass
    assert not job.out.with_name("other").exists(), "nothing was written"


def test_the_first_fault_of_a_worker_counts(tmp_path):
    record_failure(tmp_path, 3, DataError("sample a: cut.png ends early", "mend it"))
    record_failure(tmp_path, 3, RuntimeError("Exception thrown from user defined Python function in dataset."))
    record = json.loads((tmp_path / "failure_3.json").read_text())
    assert (record["what"], record["hint"]) == ("sample a: cut.png ends early", "mend it")


def test_a_reader_that_was_killed_is_named(job):
    make_out(job, force=False)
    job.save()
    log = "[CRITICAL] Dataset worker process 22261 was killed by signal: Killed. Main process will be terminated."
    (job.logs_folder / "worker_0.log").write_text(log)
    fault = explain_failure(job, ONE_NODE, 1, 143, None)
    assert fault.what == "a data reader of worker 0 was ended: Killed"
    assert "data.workers" in fault.hint

"""The folder of a run: what `train` may replace, what it leaves alone, and what it says about a failed worker."""

from dataclasses import replace

import pytest

from llavanext_cli.config.presets import load_preset
from llavanext_cli.errors import ConfigError, DataError, LlavaNextError, TrainingError
from llavanext_cli.launching.msrun import ONE_NODE, Nodes
from llavanext_cli.training import run_folder
from llavanext_cli.training.failures import explain_failure, record_failure
from llavanext_cli.training.job import TrainJob, TrainRequest
from llavanext_cli.training.ready_run import worker_command
from llavanext_cli.training.run_folder import claim_out, make_out, resume_run

MASTER = ("10.0.0.1", 8118)


@pytest.fixture
def request_(tmp_path):
    for name in ("data.jsonl", "base"):
        (tmp_path / name).mkdir()
    return TrainRequest("tiny-stage2", tmp_path / "data.jsonl", tmp_path / "base", tmp_path / "run")


@pytest.fixture
def job(request_):
    """Of a run that has begun."""
    job = TrainJob.of(request_)
    make_out(request_, job)
    job.save()
    return job


def test_a_run_is_replaced_with_force_only(request_, job):
    job.model_folder.mkdir()
    with pytest.raises(LlavaNextError, match="already holds a training run") as fault:
        make_out(request_, job)
    assert "--resume" in fault.value.hint and "--force" in fault.value.hint
    make_out(replace(request_, force=True), job)
    assert sorted(path.name for path in job.out.iterdir()) == ["checkpoints", "logs"]


def test_force_replaces_nothing_but_a_run(request_, job):
    forced = replace(request_, force=True)
    (job.out / "thesis.txt").write_text("mine")
    with pytest.raises(LlavaNextError, match=r"holds thesis\.txt beside a training run"):
        make_out(forced, job)
    (job.out / "thesis.txt").unlink()
    job.file.write_text("{}")
    with pytest.raises(LlavaNextError, match="exists and is not a training run"):
        make_out(forced, job)
    assert job.file.read_text() == "{}"


@pytest.mark.parametrize("name", ["checkpoint", "data", "preset"])
def test_what_a_run_reads_survives_force(name, request_, job):
    job.model_folder.mkdir()
    inside = job.model_folder / "file"
    inside.touch()
    forced = replace(request_, force=True, **{name: str(inside) if name == "preset" else inside})
    with pytest.raises(LlavaNextError, match=f"would damage the input {inside}"):
        make_out(forced, job)
    assert inside.exists()


def test_what_another_node_has_written_first_stays(request_):
    both = replace(request_, nodes=Nodes(2, 0, MASTER))
    job = TrainJob.of(both)
    job.libraries_folder.mkdir(parents=True)
    job.save(1)
    with pytest.raises(LlavaNextError, match="exists and is not a training run"):
        make_out(request_, job)
    make_out(both, job)
    assert job.file_of(1).is_file() and job.checkpoints_folder.is_dir()
    job.save()
    make_out(replace(both, force=True), job)
    assert job.file_of(1).is_file() and not job.file.exists()


def test_nodes_that_were_started_with_other_options(job):
    replace(job, resume=job.out / "step-00000004").save()
    assert job.join_first_node().resume == job.out / "step-00000004", "node 0 decides where to continue"
    with pytest.raises(TrainingError, match="node 0 was started with other options") as fault:
        replace(job, devices=2).join_first_node()
    assert fault.value.details == ("devices: 2 here, None on node 0",)
    job.file.unlink()
    with pytest.raises(TrainingError, match=r"job\.json of node 0 is missing"):
        job.join_first_node()


def test_devices_that_the_nodes_cannot_share(request_, job):
    nodes = Nodes(2, 0, MASTER)
    with pytest.raises(ConfigError, match="2 nodes cannot share 1 devices evenly"):
        worker_command(replace(request_, nodes=nodes), load_preset("tiny-stage2"), job)


def test_two_commands_do_not_share_a_folder(request_):
    with claim_out(request_):
        with pytest.raises(LlavaNextError, match="is in use by another"), claim_out(request_):
            pass
        with claim_out(replace(request_, nodes=Nodes(2, 1, MASTER))):
            pass
    assert not request_.out.exists(), "nothing was written"
    assert not list(request_.out.parent.glob(".*"))


def test_a_damaged_checkpoint_makes_room_for_the_steps_new_one(job, monkeypatch):
    monkeypatch.setattr(run_folder, "find_run_state", lambda place: (None, {place / "step-00000008": "w is damaged"}))
    (job.checkpoints_folder / "step-00000008").mkdir()
    (job.out / ".model.parts").mkdir()
    said = []
    assert resume_run(job, None, None, said.append) == job
    assert [path.name for path in job.checkpoints_folder.iterdir()] == ["damaged-step-00000008"]
    assert said[0] == "step-00000008 is skipped, and renamed to damaged-step-00000008: w is damaged"
    assert not (job.out / ".model.parts").exists(), "slices of another attempt"


def test_the_earliest_failure_of_any_worker_is_reported(job):
    record_failure(job.logs_folder, 3, DataError("sample a: cut.png ends early", "repair it"))
    record_failure(job.logs_folder, 3, RuntimeError("Exception thrown from user defined Python function in dataset."))
    record_failure(job.logs_folder, 1, RuntimeError("lost its partner"))
    fault = explain_failure(job, ONE_NODE, 4, 1, None)
    assert (fault.what, fault.hint) == ("worker 3 failed: sample a: cut.png ends early", "repair it")


def test_a_data_reader_that_was_killed_is_named(job):
    log = "[CRITICAL] Dataset worker process 22261 was killed by signal: Killed. Main process will be terminated."
    (job.logs_folder / "worker_0.log").write_text(log)
    fault = explain_failure(job, ONE_NODE, 1, 143, None)
    assert fault.what == "a data reader of worker 0 was killed: Killed"
    assert "data.workers" in fault.hint

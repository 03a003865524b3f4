"""One worker of a training run: `python worker.py JOB.json`, started by launch.py.

It builds the network, fills every weight from the checkpoint, and hands network, data and callback to MindFormers'
`Trainer`. What goes wrong is left as `failure_RANK.json` beside its log, where the launcher finds the earliest.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path

from llavanext_cli.config.presets import load_preset
from llavanext_cli.errors import CheckpointError
from llavanext_cli.launching.processes import end_with_parent
from llavanext_cli.model.runtime import load_libraries
from llavanext_cli.training.failures import record_failure
from llavanext_cli.training.job import Job
from llavanext_cli.training.stopping import GracefulStop
from llavanext_cli.weights.checkpoint import open_checkpoint


def main() -> None:
    end_with_parent()
    job = Job.load(Path(sys.argv[1]))
    stop = GracefulStop(job.stop_file, _rank(), _ranks())
    if os.environ.get("MS_ROLE") == "MS_SCHED":  # msrun starts its scheduler by this file too
        run_worker(job, stop)
        return
    (job.logs_folder / f"worker_{_rank()}.pid").write_text(str(os.getpid()), encoding="ascii")
    signal.signal(signal.SIGTERM, lambda *_: stop.told.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher, which ends the workers in order
    try:
        run_worker(job, stop)
    except Exception as fault:
        record_failure(job.logs_folder, _rank(), fault)
        raise


def run_worker(job: Job, stop: GracefulStop) -> None:
    """Train as the job says; the first worker writes metrics and checkpoints. `stop` may end the run after a step."""
    checkpoint = open_checkpoint(job.checkpoint)
    preset = load_preset(job.preset, job.overrides, job.devices, checkpoint.architecture)
    threads = int(os.environ["OMP_NUM_THREADS"]) if preset.runtime.target == "CPU" else None  # the launcher's share
    load_libraries(job.libraries_folder, preset.runtime.target, threads=threads, verbose=True)

    from mindformers import Trainer
    from mindspore.communication import get_rank

    from llavanext_cli.mixing.samples import read_samples
    from llavanext_cli.model.network import build_preset_network
    from llavanext_cli.training.dataset import EncodedSamples, build_dataset
    from llavanext_cli.training.freeze import freeze
    from llavanext_cli.training.inputs import build_processor
    from llavanext_cli.training.metrics import TrainingMonitor
    from llavanext_cli.training.plan import RankOrder, SampleOrder, digest_file, plan_run, run_settings
    from llavanext_cli.training.session import TrainingSession
    from llavanext_cli.training.state import open_run_state
    from llavanext_cli.weights.adapter import adapted_weights
    from llavanext_cli.weights.checkpoint import load_into

    train = preset.train
    assert train is not None, "launch.py starts train presets only"
    state = open_run_state(job.resume, compare=False) if job.resume else None  # the launcher has compared it
    file = read_samples(job.data)
    plan = plan_run(preset, len(file))
    config, network = build_preset_network(
        preset, architecture=checkpoint.architecture, folder=job.libraries_folder, steps=plan.steps
    )
    rank = get_rank() if preset.parallel.devices > 1 else 0
    job.check_same(job.file)
    lora = train.lora if train.method == "lora" else None
    load_into(network, state.model if state else checkpoint)
    if state and lora:  # the state's own are merged already
        load_into(network, checkpoint, only=adapted_weights(checkpoint.architecture, lora))
    freeze(network, train)

    first = state.step if state else 0
    order = SampleOrder(plan.samples, shuffle=preset.data.shuffle, seed=train.seed)
    group_size = preset.parallel.tensor * preset.parallel.pipeline
    per_worker = train.batch_size * train.accumulate
    mine = RankOrder(
        order,
        first=first * plan.global_batch,
        steps=plan.steps - first,
        batch=per_worker,
        rank=rank // group_size,
        ranks=preset.parallel.data,
    )
    skipped = job.skipped_file if job.on_bad == "skip" else None
    report = partial(record_failure, job.logs_folder, rank)
    samples = EncodedSamples(file, mine, build_processor(checkpoint, preset), preset, skipped, report)

    def warn(line: str) -> None:
        if rank == 0:
            with job.warnings_file.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")

    session = TrainingSession(
        network,
        checkpoint,
        settings=run_settings(preset, plan, digest_file(job.data), checkpoint.digest),
        note={"preset": preset.name, "steps": plan.steps},
        rank=rank,
        parallel=preset.parallel,
        state=state,
        lora=lora,
    )
    monitor = TrainingMonitor(
        job.metrics_file if rank == 0 else None,
        steps=plan.steps,
        global_batch=plan.global_batch,
        log_every=train.log_every,
        save_every=train.save_every,
        save=session.save,
        checkpoints=job.checkpoints_folder,
        keep=train.keep,
        first=first,
        begin=session.begin,
        batch=lambda step: [file[order[(step - 1) * plan.global_batch + n]].id for n in range(plan.global_batch)],
        warn=warn,
        should_stop=stop.reached,
    )
    data = build_dataset(samples, batch_size=per_worker, workers=preset.data.workers)
    Trainer(args=config, model=network, train_dataset=data, callbacks=[monitor]).train()
    try:
        session.save(job.model_folder, plan.steps, final=True)
    except CheckpointError as fault:
        saved = any(job.checkpoints_folder.glob("step-*"))
        goes_on = " The same command with --resume goes on from the newest checkpoint." if saved else ""
        hint = f"{fault.hint}{goes_on}".strip()
        raise CheckpointError(fault.what, hint, fault.details) from fault


def _rank() -> int:
    """The rank that msrun gave this process; 0 when it was started directly."""
    return int(os.environ.get("RANK_ID", "0"))


def _ranks() -> int:
    """How many workers msrun started, on all machines."""
    return int(os.environ.get("MS_WORKER_NUM", "1"))


if __name__ == "__main__":
    main()

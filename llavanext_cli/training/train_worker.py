"""One worker of a training run: `python train_worker.py JOB.json`, started by launch.py.

It builds the network, fills every weight from the checkpoint, and hands network, data and callback to MindFormers'
`Trainer`. A failure is written to `failure_RANK.json` beside its log, where the launcher finds the earliest.
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
from llavanext_cli.training.failures import RESUME, record_failure
from llavanext_cli.training.job import TrainJob
from llavanext_cli.training.stopping import GracefulStop
from llavanext_cli.weights.checkpoint import open_checkpoint

RANK = int(os.environ.get("RANK_ID", "0"))
"""Of this worker, from msrun; 0 when it was started directly."""
RANKS = int(os.environ.get("MS_WORKER_NUM", "1"))
"""Workers of the run, on all machines."""


def main() -> None:
    end_with_parent()
    job = TrainJob.load(Path(sys.argv[1]))
    stop = GracefulStop(job.stop_file, RANK, RANKS)
    if os.environ.get("MS_ROLE") == "MS_SCHED":  # msrun starts its scheduler by this file too
        run_worker(job, stop)
        return
    (job.logs_folder / f"worker_{RANK}.pid").write_text(str(os.getpid()), encoding="ascii")
    signal.signal(signal.SIGTERM, lambda *_: stop.requested.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's, which ends the workers in order
    try:
        run_worker(job, stop)
    except Exception as fault:
        record_failure(job.logs_folder, RANK, fault)
        raise


def run_worker(job: TrainJob, stop: GracefulStop) -> None:
    """Train. The first worker writes metrics and checkpoints; `stop` may end the run after a step."""
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
    from llavanext_cli.training.run_checkpoints import open_run_state
    from llavanext_cli.training.session import TrainingSession
    from llavanext_cli.weights.adapter import adapted_weights
    from llavanext_cli.weights.checkpoint import load_into

    train = preset.train
    assert train is not None, "launch.py starts train presets only"
    file = read_samples(job.data)
    plan = plan_run(preset, len(file))
    config, network = build_preset_network(
        preset, architecture=checkpoint.architecture, folder=job.libraries_folder, steps=plan.steps
    )
    rank = get_rank() if preset.parallel.devices > 1 else 0
    job = job.join_first_node()
    state = open_run_state(job.resume, compare=False) if job.resume else None  # the launcher has compared it
    lora = train.lora if train.method == "lora" else None
    load_into(network, state.model if state else checkpoint)
    if state and lora:  # in the state's own weights the matrices are merged already
        load_into(network, checkpoint, only=adapted_weights(checkpoint.architecture, lora))
    freeze(network, train)

    first = state.step if state else 0
    order = SampleOrder(plan.samples, shuffle=preset.data.shuffle, seed=train.seed)
    per_worker = train.batch_size * train.accumulate
    mine = RankOrder(
        order,
        first=first * plan.global_batch,
        steps=plan.steps - first,
        batch=per_worker,
        rank=rank // (preset.parallel.tensor * preset.parallel.pipeline),
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
        checkpoint,
        rank=rank,
        parallel=preset.parallel,
        settings=run_settings(preset, plan, digest_file(job.data), checkpoint.digest),
        note={"preset": preset.name, "steps": plan.steps},
        state=state,
        lora=lora,
    )
    monitor = TrainingMonitor(
        job.metrics_file if rank == 0 else None,
        job.checkpoints_folder,
        plan,
        train,
        first=first,
        begin=session.begin,
        save=session.save,
        batch=lambda step: [file[order[(step - 1) * plan.global_batch + n]].id for n in range(plan.global_batch)],
        warn=warn,
        should_stop=stop.reached,
    )
    data = build_dataset(samples, batch_size=per_worker, workers=preset.data.workers)
    Trainer(args=config, model=network, train_dataset=data, callbacks=[monitor]).train()
    try:
        session.save(job.model_folder, plan.steps, final=True)
    except CheckpointError as fault:
        resume = RESUME if any(job.checkpoints_folder.glob("step-*")) else ""
        raise CheckpointError(fault.what, "; ".join(filter(None, (fault.hint, resume))), fault.details) from fault


if __name__ == "__main__":
    main()

"""One worker of a training run: `python worker.py JOB.json`, started by launch.py.

It builds the network, fills every weight from the checkpoint, and hands network, data and callback to MindFormers'
`Trainer`. What goes wrong is left as `failure_RANK.json` beside its log, where the launcher finds the earliest.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

from llavanext_cli.config.presets import load_preset
from llavanext_cli.errors import LlavaNextError
from llavanext_cli.model.runtime import load_libraries, share_threads
from llavanext_cli.training.job import Job


def main() -> None:
    job = Job.load(Path(sys.argv[1]))
    try:
        run_worker(job)
    except BaseException as fault:
        _record_failure(job, fault)
        raise


def run_worker(job: Job) -> None:
    """Train as the job says; the first worker writes metrics and checkpoints."""
    preset = load_preset(job.preset, job.overrides, job.devices)
    threads = share_threads(preset.runtime.threads, preset.parallel.devices)
    load_libraries(job.libraries_folder, preset.runtime.target, threads=threads, verbose=True)

    from mindformers import Trainer
    from mindspore.communication import get_rank

    from llavanext_cli.mixing.samples import read_samples
    from llavanext_cli.model.network import build_preset_network
    from llavanext_cli.training.dataset import EncodedSamples, build_dataset
    from llavanext_cli.training.freeze import freeze
    from llavanext_cli.training.inputs import build_processor
    from llavanext_cli.training.metrics import TrainingMonitor
    from llavanext_cli.training.plan import plan_run, rank_order, sample_order
    from llavanext_cli.weights.checkpoint import load_into, open_checkpoint, save_checkpoint_folder

    train = preset.train
    assert train is not None, "launch.py starts train presets only"
    checkpoint = open_checkpoint(job.checkpoint)
    file = read_samples(job.data)
    plan = plan_run(preset, len(file))
    config, network = build_preset_network(
        preset, architecture=checkpoint.architecture, folder=job.libraries_folder, steps=plan.steps
    )
    rank = get_rank() if preset.parallel.devices > 1 else 0
    load_into(network, checkpoint)
    freeze(network, train.trainable)

    order = sample_order(plan.samples, plan.steps * plan.global_batch, shuffle=preset.data.shuffle, seed=train.seed)
    group_size = preset.parallel.tensor * preset.parallel.pipeline
    mine = rank_order(
        order, batch=train.batch_size * train.accumulate, rank=rank // group_size, ranks=preset.parallel.data
    )
    processor = build_processor(checkpoint, preset)
    samples = EncodedSamples(file, mine, processor, preset)

    def save(folder: Path, step: int) -> None:
        weights = {name: parameter.asnumpy() for name, parameter in network.parameters_dict().items()}
        note = {"preset": preset.name, "step": step, "steps": plan.steps}
        save_checkpoint_folder(folder, weights, like=checkpoint, extra=note)

    monitor = TrainingMonitor(
        job.metrics_file if rank == 0 else None,
        steps=plan.steps,
        global_batch=plan.global_batch,
        log_every=train.log_every,
        save_every=train.save_every,
        save=save,
        checkpoints=job.checkpoints_folder,
        keep=train.keep,
    )
    data = build_dataset(samples, batch_size=train.batch_size * train.accumulate, workers=preset.data.workers)
    Trainer(args=config, model=network, train_dataset=data, callbacks=[monitor]).train()
    if rank == 0:
        save(job.model_folder, plan.steps)


def _record_failure(job: Job, fault: BaseException) -> None:
    rank = os.environ.get("RANK_ID", "0")
    known = isinstance(fault, LlavaNextError)
    record = {
        "rank": int(rank),
        "time": time.time(),
        "what": str(fault) if known else f"{type(fault).__name__}: {fault}",
        "hint": fault.hint if isinstance(fault, LlavaNextError) else "",
        "known": known,
        "traceback": traceback.format_exc(),
    }
    (job.logs_folder / f"failure_{rank}.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()

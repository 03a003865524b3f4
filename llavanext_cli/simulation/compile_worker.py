"""One compile of `simulate`: `python compile_worker.py REQUEST.json`, in a process of its own.

It builds what a worker of the preset builds for its rank, hands it to the same MindFormers trainer, and compiles where
that would begin to train. Nothing runs. The result is written to result.json beside the request.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from llavanext_cli.config.schema import Preset
from llavanext_cli.launching.processes import end_with_parent
from llavanext_cli.model.network import build_preset_network
from llavanext_cli.model.runtime import load_libraries
from llavanext_cli.simulation.simulate import CompileRequest

Result = dict[str, Any]


def main() -> None:
    end_with_parent()
    file = Path(sys.argv[1])
    fields = json.loads(file.read_text(encoding="utf-8"))
    checkpoint = fields["checkpoint"] and Path(fields["checkpoint"])
    request = CompileRequest(**fields | {"checkpoint": checkpoint})
    preset, libraries = request.load_preset(), file.parent / "libraries"
    result: Result = {}
    try:
        os.environ["RUN_MODE"] = "train" if preset.train else "predict"  # MindFormers' Llama asks for it
        load_libraries(libraries, preset.runtime.target, verbose=True)
        if preset.train:
            compile_training(preset, libraries, result)
        else:
            compile_ask(preset, request.batch, libraries, result)
    except Exception as fault:
        result["fault"] = f"{type(fault).__name__}: {fault}"
        raise
    finally:
        result["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (file.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")


def compile_training(preset: Preset, libraries: Path, result: Result) -> None:
    """The step that MindFormers' trainer makes of the network, its optimizer and the preset's wrapper."""
    from mindformers import Trainer
    from mindformers.trainer import base_trainer

    from llavanext_cli.training.freeze import freeze

    config, network = build_preset_network(preset, architecture=preset.model, folder=libraries, steps=1000)
    freeze(network, preset.train)

    def compile_only(model, epochs, dataset, **options):
        step = model._train_network.set_train()
        inputs = next(dataset.create_tuple_iterator(num_epochs=1))
        compile_graph(step, inputs, "training step", result)

    base_trainer.Model.train = compile_only  # up to here everything is as in a worker
    Trainer(args=config, model=network, train_dataset=example_dataset(preset, network.side)).train()


def compile_ask(preset: Preset, rows: int, libraries: Path, result: Result) -> None:
    """The two graphs of an answer: the longest prompt with all of its media, then one token."""
    import numpy as np

    from llavanext_cli.inference.ascend import AscendEngine
    from llavanext_cli.records import Batch

    _, network = build_preset_network(preset, architecture=preset.model, folder=libraries, batch=rows)
    network.set_train(False)
    ask, data, side = preset.ask, preset.data, network.side
    engine = AscendEngine(network, network.config.architecture, rows, ask.cache_tokens, ask.block_size)
    length = ask.cache_tokens - ask.max_new_tokens
    ids, lengths = np.zeros((1, length), np.int32), np.array([length], np.int32)
    tiles = np.zeros((1, data.tiles + data.frame_budget, 3, side, side), np.float32)
    batch = Batch(input_ids=ids, labels=ids, tiles=tiles, feature_index=ids, lengths=lengths)
    compile_graph(network, engine.prefill_inputs(batch, data.frame_budget, rows - 1), "prefill", result)
    compile_graph(network, engine.decode_inputs(np.zeros(rows, np.int32), lengths.repeat(rows)), "increment", result)


def compile_graph(cell, inputs, name: str, result: Result) -> None:
    """Compile, and note the time it took and what every parameter is on this rank afterwards."""
    started = time.monotonic()
    cell.compile(*inputs)
    result.setdefault("seconds", {})[name] = time.monotonic() - started
    result["slices"] = {
        parameter.name: [list(parameter.shape), str(parameter.dtype).lower(), parameter.requires_grad]
        for parameter in cell.get_parameters()
    }


def example_dataset(preset: Preset, side: int):
    """One batch of zeros of the shapes that training/dataset.py makes."""
    import mindspore.dataset as ds
    import numpy as np

    from llavanext_cli.config.mindformers import COLUMNS

    length = preset.data.seq_length
    ids = np.zeros(length, np.int32)
    tiles = np.zeros((preset.data.tiles + preset.data.frame_budget, 3, side, side), np.float32)
    row = (ids, tiles, ids, ids)
    batch = preset.train.batch_size * preset.train.accumulate
    data = ds.GeneratorDataset([row] * batch, list(COLUMNS), shuffle=False)
    return data.batch(batch, drop_remainder=True)


if __name__ == "__main__":
    main()

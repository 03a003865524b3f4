"""LoRA's low-rank matrices: nothing at first; and after they are merged, on our side and transformers', the same."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from llavanext_cli.config.presets import load_preset
from llavanext_cli.training.session import TrainingSession
from llavanext_cli.weights.adapter import adapter_parameters
from llavanext_cli.weights.checkpoint import load_into, open_checkpoint
from llavanext_cli.weights.convert import run_convert
from llavanext_cli.weights.request import ConvertRequest
from tests.parity.models import tiny_config, write_hf_folder
from tests.parity.stages import relative_error, tolerance
from tests.parity.variants import SMALLER

NAMES = ("40x60", "text only", "20x200", "57x113")


def test_merged_weights_answer_as_the_matrices_did(mindspore_cpu, tmp_path):
    import mindspore as ms

    from tests.parity.mindspore_side import Model
    from tests.parity.torch_side import Reference

    hub = write_hf_folder(tmp_path / "hub", tiny_config(SMALLER))
    model = Model(hub, tmp_path / "converted", NAMES)
    lora = load_preset("tiny-stage2", ["train.method=lora", "train.lora={rank: 4, alpha: 6, dropout: 0.5}"]).train.lora
    plain = model.build()
    adapted = model.build(lora={"rank": 4, "alpha": 6.0, "dropout": 0.5, "targets": list(lora.targets), "seed": 0})
    batch = model.collate([case.encoded for case in model.cases])

    def logits(network):
        inputs = (batch.input_ids, batch.tiles, batch.feature_index)
        return network(*[ms.Tensor(value) for value in inputs]).asnumpy().reshape(*batch.input_ids.shape, -1)

    first = logits(plain).copy()
    assert relative_error(logits(adapted), first) < 1e-6, "B is zero, and answering drops nothing"

    random = np.random.default_rng(0)
    matrices = {name: p for name, p in adapted.parameters_dict().items() if name.endswith((".lora_a", ".lora_b"))}
    assert {name: p.shape for name, p in matrices.items()} == adapter_parameters(model.arch, lora)
    for name, matrix in matrices.items():
        if name.endswith(".lora_b"):
            matrix.set_data(ms.Tensor(random.normal(0, 0.1, matrix.shape).astype(np.float32)))
    changed = logits(adapted).copy()
    assert relative_error(changed, first) > 0.1

    session = TrainingSession(model.checkpoint, lora=lora)
    session.begin(adapted)
    session.save(tmp_path / "merged", 1, final=True)
    merged = open_checkpoint(tmp_path / "merged")
    load_into(plain, merged)
    assert relative_error(logits(plain), changed) < tolerance("logits")

    run_convert(ConvertRequest(tmp_path / "merged", tmp_path / "back", to="hf"))
    reference = Reference(tmp_path / "back")
    for row, case in enumerate(model.cases):
        theirs = reference.model(**reference.inputs(case, labels=False)).logits[0].detach().numpy()
        assert relative_error(changed[row, : case.encoded.length], theirs) < tolerance("logits"), case.name

"""Training against a torch loop: the same weights, the same batches, 20 steps of AdamW, clipped, warmed up, cosine.

Ours is what `llavanext train` runs in a worker: the preset expanded to MindFormers' configuration, its `Trainer`, and
our callback, whose metrics.jsonl is what is compared. The other side is transformers' model and torch's own optimizer.
"""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from llavanext_cli.training.freeze import is_trainable, part_of
from llavanext_cli.weights.adapter import is_adapter
from llavanext_cli.weights.keymap import build_targets
from tests.parity.models import tiny_config, write_hf_folder
from tests.parity.stages import TABLE
from tests.parity.variants import SMALLER

STEPS, BATCH = 20, 4
LOSS, CHANGE = 1e-3, 0.05
"""Greatest relative difference of any step's loss, and of what the steps made of a weight."""
IMAGES = ("40x60", "text only", "20x200", "two images", "57x113", "64x48")
VIDEOS = ("video", "text only", "40x60", "image and video", "57x113", "two images")
EVERYTHING = ("vision", "projector", "newline", "language")

PLANS = {
    "stage 2, all": (IMAGES, EVERYTHING, ["train.weight_decay=0.1"]),
    "stage 2, LoRA": (
        IMAGES,
        ("projector", "newline", "language"),
        ["train.method=lora", "train.lora={rank: 4, alpha: 6}", "train.learning_rates.language=1e-2"],
    ),
    "stage 3, vision": (VIDEOS, ("vision",), ["train.clip_norm=null", "train.schedule=constant"]),
    "stage 3, all, accumulated, a rate for each part": (
        VIDEOS,
        EVERYTHING,
        ["train.batch_size=2", "train.accumulate=2", "train.learning_rates={vision: 1e-3, projector: 6e-3}"],
    ),
}
MORE_PLANS = {
    "stage 2, projector": (IMAGES, ("projector",), []),
    "stage 3, all": (VIDEOS, EVERYTHING, []),
    "stage 3, language": (VIDEOS, ("language",), []),
    "stage 3, all, accumulated": (VIDEOS, EVERYTHING, ["train.batch_size=2", "train.accumulate=2"]),
    "stage 3, a rate for each part": (VIDEOS, EVERYTHING, ["train.learning_rates={vision: 1e-3, projector: 6e-3}"]),
}
"""name: (cases, parts that learn, changes to the preset)."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("training") / "hub", tiny_config(SMALLER))


def cases_of(model, names):
    """The cases in the order of `names`, round and round, for every step."""
    named = {case.name: case for case in model.cases}
    return [[named[names[(step * BATCH + row) % len(names)]] for row in range(BATCH)] for step in range(STEPS)]


class Encoded:
    """Replaces data file and processor: the samples are already encoded."""

    roots: dict = {}  # noqa: RUF012

    def __init__(self, samples, arch):
        self.samples, self.arch = samples, arch

    def __getitem__(self, index):
        return self.samples[index]

    def encode(self, sample, roots):
        return sample


def train_ours(model, names, preset, folder):
    """The lines of metrics.jsonl, the weights before, and those after."""
    from mindformers import Trainer

    from llavanext_cli.model.network import build_preset_network
    from llavanext_cli.training.dataset import EncodedSamples, build_dataset
    from llavanext_cli.training.freeze import freeze
    from llavanext_cli.training.metrics import TrainingMonitor
    from llavanext_cli.training.plan import RunPlan
    from llavanext_cli.weights.checkpoint import load_into
    from tests.parity.mindspore_side import keep_alive

    config, network = build_preset_network(preset, architecture=model.arch, folder=folder, steps=STEPS)
    keep_alive(network)
    load_into(network, model.checkpoint)
    freeze(network, preset.train)
    weights = lambda: {name: value.asnumpy().copy() for name, value in network.parameters_dict().items()}  # noqa: E731
    before = weights()
    samples = [case.encoded for batch in cases_of(model, names) for case in batch]
    source = Encoded(samples, model.arch)
    data = EncodedSamples(source, range(len(samples)), source, preset)
    metrics = folder / "metrics.jsonl"
    monitor = TrainingMonitor(metrics, folder / "checkpoints", RunPlan(len(samples), BATCH, STEPS, 1.0), preset.train)
    batches = build_dataset(data, batch_size=BATCH, workers=1)
    Trainer(args=config, model=network, train_dataset=batches, callbacks=[monitor]).train()
    return [json.loads(line) for line in metrics.read_text().splitlines()], before, weights()


def add_torch_lora(reference, model, before, lora):
    """The same low-rank matrices on torch's side, as hooks: name → parameter."""
    import torch

    from tests.parity.torch_side import hub_name

    modules = {hub_name(f"{name}.weight"): module for name, module in reference.model.named_modules() if name}
    source = {target.name: target.sources[0] for target in build_targets(model.arch)}
    scale, added = lora.alpha / lora.rank, {}

    def hook(a, b):
        return lambda module, inputs, output: output + scale * inputs[0] @ a.T @ b.T

    for name in [name for name in before if name.endswith(".lora_a")]:
        cell = name.removesuffix(".lora_a")
        a, b = (torch.nn.Parameter(torch.tensor(before[cell + end])) for end in (".lora_a", ".lora_b"))
        assert a.abs().max() > 0
        assert b.abs().max() == 0, "the first step must see the model as it was"
        modules[source[f"{cell}.weight"]].register_forward_hook(hook(a, b))
        added |= {f"{cell}.lora_a": a, f"{cell}.lora_b": b}
    return added


def train_theirs(reference, model, names, preset, before):
    """Losses, learning rates, norms of the gradients, and the weights after, by our names."""
    import torch
    import transformers

    from tests.parity.torch_side import hub_name

    train = preset.train
    targets = build_targets(model.arch)
    ours = {source: target.name for target in targets for source in target.sources}
    learning = {}
    for name, weight in reference.model.named_parameters():
        name = ours.get(hub_name(name))
        weight.requires_grad = name is not None and is_trainable(name, train)
        if weight.requires_grad:
            learning.setdefault(name, []).append(weight)
    added = add_torch_lora(reference, model, before, train.lora)
    assert bool(added) == (train.method == "lora")
    learning |= {name: [matrix] for name, matrix in added.items()}
    groups = [
        {
            "params": [weight],
            "lr": train.part_rates[part_of(name)],
            "weight_decay": train.weight_decay if weight.ndim > 1 else 0.0,
        }
        for name, weights in learning.items()
        for weight in weights
    ]
    optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, eps=train.epsilon)
    warmup = int(STEPS * train.warmup_ratio)
    if train.schedule == "cosine":
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, STEPS)
    else:
        schedule = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    lines = []
    for cases in cases_of(model, names):
        optimizer.zero_grad()
        loss = reference.loss(cases)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([group["params"][0] for group in groups], train.clip_norm or float("inf"))
        rate = train.learning_rate * schedule.get_last_lr()[0] / optimizer.param_groups[0]["initial_lr"]
        lines.append({"loss": float(loss.detach()), "learning_rate": rate, "gradient_norm": float(norm)})
        optimizer.step()
        schedule.step()
    hub = {hub_name(name): weight.detach().numpy() for name, weight in reference.model.named_parameters()}
    after = {target.name: np.concatenate([hub[source] for source in target.sources]) for target in targets}
    return lines, after | {name: matrix.detach().numpy() for name, matrix in added.items()}


@pytest.mark.parametrize("plan", [*PLANS, *[pytest.param(name, marks=pytest.mark.full) for name in MORE_PLANS]])
def test_same_losses_and_weights(plan, mindspore_cpu, hub, tmp_path, monkeypatch):
    from mindformers.utils.parameter_register import parameter_register

    from llavanext_cli.config.presets import load_preset
    from tests.parity.mindspore_side import Model
    from tests.parity.torch_side import Reference

    monkeypatch.setattr(parameter_register, "_params", {})  # MindFormers reckons with one training a process
    names, trainable, changes = (PLANS | MORE_PLANS)[plan]
    model = Model(hub, tmp_path / "converted", names)
    preset = load_preset(
        "tiny-stage3",
        [
            f"data.seq_length={model.length}",
            f"data.tiles={model.tiles}",
            f"data.frames={model.frames}",
            f"train.batch_size={BATCH}",
            f"train.trainable=[{', '.join(trainable)}]",
            "train.learning_rate=3e-3",
            "train.log_every=1",
            "train.warmup_ratio=0.2",
            "train.clip_norm=1.0",
            *changes,
        ],
    )
    ours, before, after = train_ours(model, names, preset, tmp_path)
    theirs, their_after = train_theirs(Reference(hub), model, names, preset, before)

    losses = np.array([[line["loss"] for line in lines] for lines in (ours, theirs)])
    assert losses.shape == (2, STEPS)
    assert losses[1, -5:].mean() < 0.97 * losses[1, :5].mean(), "it did not learn, so nothing was compared"
    TABLE.add(plan, "loss", float(np.abs(losses[0] / losses[1] - 1).max()))
    np.testing.assert_allclose(losses[0], losses[1], rtol=LOSS)
    for key, close in (("learning_rate", 1e-5), ("gradient_norm", 1e-2)):
        if key in ours[0] and ours[0][key] is not None:
            np.testing.assert_allclose([o[key] for o in ours], [t[key] for t in theirs], rtol=close, atol=1e-9)
    if preset.train.clip_norm:
        assert max(line["gradient_norm"] for line in theirs) > preset.train.clip_norm, "nothing was clipped"

    assert any(is_adapter(name) for name in after) == (preset.train.method == "lora")
    for name in after:
        if not is_trainable(name, preset.train):
            assert np.array_equal(before[name], after[name]), f"{name} is frozen, and changed"
            continue
        if "qkv.bias" in name:
            continue  # a key's bias has a gradient of rounding errors, which Adam makes steps of; nothing depends on it
        moved = np.linalg.norm(their_after[name] - before[name])
        assert moved > 0, f"{name} did not learn"
        assert np.linalg.norm(after[name] - their_after[name]) <= CHANGE * moved, name

"""Steps, the order of samples, and which worker sees which."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from llavanext_cli.config.presets import load_preset
from llavanext_cli.errors import DataError
from llavanext_cli.records import SampleSize
from llavanext_cli.training.freeze import part_of
from llavanext_cli.training.inputs import check_sizes, room_of
from llavanext_cli.training.plan import RankOrder, SampleOrder, plan_run

TINY = SampleSize(tokens=10, tiles=0, frames=0)


@pytest.fixture
def preset():
    return load_preset("tiny-stage2", ["train.batch_size=4", "train.epochs=3", "data.seq_length=256"])


def test_steps_come_from_epochs_and_what_is_left_over_is_not_trained(preset):
    plan = plan_run(preset, samples=10)
    assert (plan.global_batch, plan.steps) == (4, 7)
    assert plan.epochs == pytest.approx(2.8)


def test_steps_of_the_preset_win(preset):
    preset = dataclasses.replace(preset, train=dataclasses.replace(preset.train, steps=100))
    assert plan_run(preset, samples=10).steps == 100


def test_fewer_samples_than_a_step_takes(preset):
    preset = dataclasses.replace(preset, train=dataclasses.replace(preset.train, epochs=1))
    with pytest.raises(DataError, match="3 samples are fewer than one step takes"):
        plan_run(preset, samples=3)


def walk(samples: int, count: int, *, seed: int, shuffle: bool = True) -> list[int]:
    order = SampleOrder(samples, shuffle=shuffle, seed=seed)
    return [order[place] for place in range(count)]


def test_every_epoch_sees_every_sample_once_in_an_order_of_its_own():
    order = walk(50, 100, seed=1)
    first, second = order[:50], order[50:]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != list(range(50))
    assert order == walk(50, 100, seed=1)
    assert order != walk(50, 100, seed=2)
    far = SampleOrder(50, shuffle=True, seed=1)
    assert [far[place] for place in (99, 3, 10**15, 99)] == [order[99], order[3], far[10**15], order[99]]


def test_the_order_is_the_same_on_every_machine():
    assert walk(8, 8, seed=0) == [0, 2, 1, 4, 6, 7, 3, 5]


def test_without_shuffling_the_file_is_walked_through():
    assert walk(3, 7, seed=0, shuffle=False) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_workers_share_each_global_batch(ranks):
    order, batch, first = SampleOrder(24, shuffle=True, seed=0), 8 // ranks, 16
    whole = walk(24, 80, seed=0)
    shares = [RankOrder(order, first=first, steps=8, batch=batch, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {8 * batch}
    for step in range(8):
        seen = [share[step * batch + n] for share in shares for n in range(batch)]
        assert seen == whole[first + step * 8 : first + (step + 1) * 8]


def check(preset, **sizes: SampleSize) -> None:
    """`check_sizes` of samples with these ids and sizes."""
    check_sizes(np.array([*sizes.values()]), [SimpleNamespace(id=name) for name in sizes], preset)


def test_lengths_that_do_not_fit_are_counted_and_the_worst_is_named(preset):
    with pytest.raises(DataError) as fault:
        check(preset, a=TINY, b=TINY._replace(tokens=300), c=TINY._replace(tokens=1001))
    assert fault.value.what == "2 of 3 samples have too many tokens: 'c' has 1001, and 256 fit"
    assert "data.seq_length=1008" in fault.value.hint
    assert not fault.value.details


def test_tiles_and_frames_that_do_not_fit_are_found_as_well(preset):
    room = room_of(preset)
    with pytest.raises(DataError) as fault:
        check(preset, a=TINY, b=SampleSize(10, room.tiles + 1, 0), c=SampleSize(10, 0, room.frames + 1))
    said = [fault.value.what, *fault.value.details]
    assert said == [
        f"1 of 3 samples have too many image tiles: 'b' has {room.tiles + 1}, and {room.tiles} fit",
        f"1 of 3 samples have too many frames: 'c' has {room.frames + 1}, and {room.frames} fit",
    ]
    assert f"--set data.tiles={room.tiles + 1} --set data.videos=" in fault.value.hint


def test_sizes_that_just_fit(preset):
    assert check(preset, a=room_of(preset)) is None


def test_every_parameter_of_the_model_belongs_to_a_part():
    from llavanext_cli.config.architecture import Architecture
    from llavanext_cli.weights.keymap import expected_parameters

    parts = {part_of(name) for name in expected_parameters(Architecture())}
    assert parts == {"vision", "projector", "newline", "language"}
    assert part_of("pooler.conv.weight") == "projector"
    with pytest.raises(ValueError, match="belongs to no part"):
        part_of("head.weight")


def test_freeze_leaves_only_the_named_parts_learning():
    from llavanext_cli.training.freeze import freeze

    names = ["vision_tower.a", "projector.b", "image_newline", "language_model.c"]
    parameters = [SimpleNamespace(name=name, requires_grad=True, size=10) for name in names]
    train = SimpleNamespace(trainable=("projector", "newline"), method="full")
    counts = freeze(SimpleNamespace(get_parameters=lambda: parameters), train)
    assert counts == {"projector": 10, "newline": 10}
    assert [p.requires_grad for p in parameters] == [False, True, True, False]

from __future__ import annotations

import itertools
import math

import pytest
from bench import settings_of
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.training.batches import batches, micro_batches_per_epoch, steps_per_round

quick = settings(deadline=None, max_examples=60)


def rounds_of(examples, config, rounds, seed=0, client="k"):
    return [
        list(batches(examples, config, round_index=index, seed=seed, client=client))
        for index in range(rounds)
    ]


@quick
@given(
    examples=st.integers(1, 40),
    size=st.integers(1, 9),
    steps=st.integers(1, 7),
    accumulation=st.integers(1, 3),
    shuffle=st.booleans(),
)
def test_each_epoch_covers_every_example_once_across_rounds(
    examples, size, steps, accumulation, shuffle
):
    config = settings_of(
        batch_size=size, local_steps=steps, gradient_accumulation=accumulation, shuffle=shuffle
    )
    per_epoch = micro_batches_per_epoch(examples, config)
    assert per_epoch == math.ceil(examples / size)
    rounds = math.ceil(2 * per_epoch / (steps * accumulation))
    given_out = rounds_of(examples, config, rounds)
    assert all(len(one) == steps * accumulation for one in given_out)
    order = list(itertools.chain(*given_out))
    for epoch in range(2):
        part = order[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(itertools.chain(*part)) == list(range(examples))
        assert all(len(batch) == size for batch in part[:-1])


def test_orders_differ_between_epochs_clients_and_seeds():
    config = settings_of(local_steps=0, batch_size=4, local_epochs=1)
    first, second = rounds_of(16, config, 2)
    others = [rounds_of(16, config, 1, seed=1)[0], rounds_of(16, config, 1, client="other")[0]]
    for one, other in itertools.combinations([first, second, *others], 2):
        assert one != other


@pytest.mark.parametrize(
    "examples, epochs, accumulation, steps",
    [
        (16, 1, 1, 4),
        (17, 1, 1, 5),
        (16, 2.5, 1, 10),
        (16, 0.5, 1, 2),
        (16, 1, 2, 2),
        (17, 1, 2, 3),  # the last step has one batch
        (3, 1, 4, 1),
        (3, 0.1, 4, 1),
    ],
)
def test_local_epochs_give_the_number_of_steps(examples, epochs, accumulation, steps):
    config = settings_of(
        local_steps=0, batch_size=4, local_epochs=epochs, gradient_accumulation=accumulation
    )
    assert steps_per_round(examples, config) == steps
    (order,) = rounds_of(examples, config, 1)
    if epochs >= 1:
        assert len(list(itertools.chain(*order))) == pytest.approx(examples * epochs)

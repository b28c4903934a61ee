"""Which rank a client has in which round, where the server decides it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelort.federation.allocation import Allocation, ByLoss

LOSSES = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 5.0, "e": 4.0}


# By loss


@pytest.mark.parametrize(
    "share, raised",
    [(0.2, {"b"}), (0.4, {"b", "c"}), (0.6, {"b", "c", "a"}), (1.0, set(LOSSES))],
)
def test_those_with_the_lowest_loss_are_raised(share: float, raised: set[str]) -> None:
    assert ByLoss(16, share).raised(LOSSES, 5) == dict.fromkeys(raised, 16)


@pytest.mark.parametrize(
    "share, clients, count",
    [(0.1, 100, 10), (0.1, 16, 2), (0.1, 14, 1), (0.1, 4, 1), (0.01, 5, 1), (0.5, 7, 4)],
)
def test_the_share_is_of_all_clients_rounded_and_at_least_one(
    share: float, clients: int, count: int
) -> None:
    losses = {f"site-{number:03d}": float(number) for number in range(clients)}
    assert len(ByLoss(8, share).raised(losses, clients)) == count


def test_the_share_counts_those_too_whose_round_failed() -> None:
    """Half of ten is five, though only six of them have answered."""
    losses = {f"site-{number}": float(number) for number in range(6)}
    assert set(ByLoss(8, 0.5).raised(losses, 10)) == {f"site-{number}" for number in range(5)}


def test_equal_losses_are_told_apart_by_name_whatever_their_order() -> None:
    losses = {"c": 1.0, "a": 1.0, "d": 0.5, "b": 1.0}
    for order in (sorted(losses), sorted(losses, reverse=True)):
        found = ByLoss(8, 0.75).raised({name: losses[name] for name in order}, 4)
        assert set(found) == {"d", "a", "b"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_never_the_best(value: float) -> None:
    """Not the smallest, as an infinity may be, and not in the way of a sort, as a NaN is."""
    assert ByLoss(8, 0.4).raised(LOSSES | {"0": value}, 5).keys() == {"b", "c"}
    assert ByLoss(8, 1.0).raised(LOSSES | {"0": value}, 6).keys() == LOSSES.keys()


@pytest.mark.parametrize("losses", [{}, {"a": math.nan}])
def test_nobody_is_raised_where_nobody_has_a_loss(losses: dict[str, float]) -> None:
    assert ByLoss(8, 0.5).raised(losses, 4) == {}


@given(
    st.dictionaries(st.text(max_size=3), st.floats(), max_size=12),
    st.floats(0.01, 1.0),
    st.integers(0, 5),
)
def test_nobody_left_out_is_better_than_one_raised(
    losses: dict[str, float], share: float, silent: int
) -> None:
    clients = len(losses) + silent
    raised = ByLoss(8, share).raised(losses, clients)
    finite = {name for name, loss in losses.items() if math.isfinite(loss)}
    assert set(raised) <= finite
    assert len(raised) == min(len(finite), max(1, round(share * clients)))
    worst = max((losses[name] for name in raised), default=-math.inf)
    assert all(losses[name] >= worst for name in finite - set(raised))


# Over the rounds

SCHEDULE = {3: {"a": 4, "b": 8}, 5: {"a": 2, "b": 2}}


def test_without_a_plan_nothing_changes() -> None:
    plan = Allocation()
    assert plan.levels() == set()
    for number in range(1, 9):
        assert plan.after(number, LOSSES, 5) == {}
        assert not plan.asks_everyone(number)


def test_a_schedule_changes_ranks_before_the_round_that_it_names() -> None:
    plan = Allocation(SCHEDULE)
    found = {number: plan.after(number, {}, 2) for number in range(1, 8)}
    assert found == {1: {}, 2: {"a": 4, "b": 8}, 3: {}, 4: {"a": 2, "b": 2}, 5: {}, 6: {}, 7: {}}
    assert not any(plan.asks_everyone(number) for number in range(1, 8))


def test_by_loss_asks_everyone_in_the_first_round_and_ranks_after_it_only() -> None:
    plan = Allocation(by_loss=ByLoss(16, 0.4))
    assert [plan.asks_everyone(number) for number in (1, 2, 3)] == [True, False, False]
    assert plan.after(1, LOSSES, 5) == {"b": 16, "c": 16}
    assert plan.after(2, LOSSES, 5) == plan.after(3, LOSSES, 5) == {}


def test_who_is_raised_by_loss_is_raised_above_the_schedule() -> None:
    plan = Allocation({2: {"a": 4, "b": 4}}, ByLoss(16, 0.2))
    assert plan.after(1, LOSSES, 5) == {"a": 4, "b": 16}


def test_the_levels_are_all_ranks_that_it_may_give() -> None:
    assert Allocation(SCHEDULE).levels() == {2, 4, 8}
    assert Allocation(by_loss=ByLoss(16, 0.1)).levels() == {16}
    assert Allocation(SCHEDULE, ByLoss(16, 0.1)).levels() == {2, 4, 8, 16}

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelort.config import cohort_size, count_of
from prelort.errors import ConfigError
from prelort.federation.sampling import check_numbers, sample

NAMES = [f"site-{i}" for i in range(20)]


@given(st.integers(1, 30), st.integers(0, 2**40), st.integers(0, 500))
def test_sample_is_distinct_and_in_the_clients_order(wanted: int, seed: int, index: int) -> None:
    chosen = sample(NAMES, wanted, seed=seed, round_index=index)

    assert len(set(chosen)) == len(chosen) == min(wanted, len(NAMES))
    assert chosen == [name for name in NAMES if name in chosen]
    assert chosen == sample(NAMES, wanted, seed=seed, round_index=index)


def test_rounds_and_seeds_draw_differently() -> None:
    drawn = [tuple(sample(NAMES, 5, seed=s, round_index=r)) for s in range(5) for r in range(5)]
    assert len(set(drawn)) > 20


@pytest.mark.parametrize(
    "wanted, available, count",
    [(3, 10, 3), (3, 2, 3), (0.5, 10, 5), (0.5, 3, 2), (0.01, 10, 1), (1.0, 7, 7), (0.3, 10, 3)],
)
def test_count_is_a_number_or_a_share_rounded_up(
    wanted: int | float, available: int, count: int
) -> None:
    assert count_of(wanted, available) == count


def test_no_number_of_clients_is_too_few_for_the_default() -> None:
    assert [cohort_size(None, clients) for clients in (1, 4, 60)] == [1, 4, 6]
    check_numbers(1, None, 0.5)


@pytest.mark.parametrize(
    "clients, per_round, quorum, said",
    [
        (4, 9, 1, "clients_per_round = 9, but there are 4 clients"),
        (6, 3, 4, "quorum = 4 needs 4 replies, but a round trains 3 of 6 clients"),
        (6, 0.5, 4, "quorum = 4 needs 4 replies, but a round trains 3 of 6 clients"),
        (2, 2, 5, "quorum = 5 needs 5 replies, but a round trains 2 of 2 clients"),
    ],
)
def test_numbers_that_cannot_work_out_are_refused(
    clients: int, per_round: int | float, quorum: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_numbers(clients, per_round, quorum)

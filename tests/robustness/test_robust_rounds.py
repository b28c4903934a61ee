"""A robust rule in a federation: what it needs is checked first, and rounds go through it."""

from __future__ import annotations

from typing import Any

import pytest

from prelort.adapters import LoraAdapter
from prelort.config import Config, check
from prelort.errors import ConfigError
from prelort.events import RanksUncovered
from prelort.federation.messages import TrainRequest
from prelort.report.incidents import lines
from small_federation import Trained, add_noise, clients_of, make_run, make_state, small_client_app

CLIENTS = clients_of([2, 2, 4, 4, 4, 8, 8])


def config(rule: str, **more: Any) -> Config:
    federation = {"rounds": 2, "clients_per_round": 1.0}
    return check({"federation": federation, "robustness": {"rule": rule, "attackers": 2, **more}})


def poisoned(index: int) -> Trained:
    """The last two clients send huge values."""

    def trained(received: LoraAdapter, request: TrainRequest) -> LoraAdapter:
        tensors = {name: tensor + 1e3 for name, tensor in received.tensors().items()}
        return LoraAdapter.from_tensors(tensors, received.scale)

    return trained if index >= 5 else add_noise(index)


def largest(adapter: LoraAdapter) -> float:
    return max(float(tensor.abs().max()) for tensor in adapter.tensors().values())


def test_attackers_are_kept_out_of_rounds_and_uncovered_ranks_are_reported() -> None:
    app = small_client_app(CLIENTS, poisoned)
    assert largest(make_run(app, config("none"), clients=7).train().adapter) > 100
    run = make_run(app, config("median"), clients=7)
    after, before = run.train().adapter, make_state().adapter
    assert largest(after) < 10
    name = "model.q_proj"
    assert not after.layers[name].A[:4].equal(before.layers[name].A[:4])
    assert after.layers[name].A[4:].equal(before.layers[name].A[4:])
    (event,) = run.of(RanksUncovered)
    assert (event.low, event.high, event.holders, event.needed) == (4, 8, 2, 5)
    (line,) = lines(event)
    assert line == (
        "round 0: ranks 5 to 8 not protected: 2 clients of a round hold them, robustness.rule "
        "needs 5: rounds with fewer freeze them"
    )


def test_a_rule_that_protects_nothing_is_refused_before_training() -> None:
    run = make_run(small_client_app(CLIENTS), config("krum", attackers=3), clients=7)
    with pytest.raises(ConfigError, match=r"'krum' needs 9 clients in a round of which 3 may be"):
        run.train()
    assert run.events == []


def test_privacy_cannot_be_had_with_a_rule() -> None:
    with pytest.raises(ConfigError, match=r"with robustness\.rule"):
        check({"privacy": {"epsilon": 3.0}, "robustness": {"rule": "median"}})


def test_a_method_whose_changes_cannot_be_compared_is_refused_before_training() -> None:
    run = make_run(small_client_app(CLIENTS), config("clip"), clients=7, method="fed-plora")
    with pytest.raises(ConfigError, match="not possible with method 'fed-plora'"):
        run.train()

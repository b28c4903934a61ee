"""Planned ranks of the clients, and runs in which ranks change."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import concatenate_datasets

import prelort
from prelort import evaluate
from prelort.config import Config
from prelort.data import federated
from prelort.errors import ConfigError
from prelort.events import RankChanged
from prelort.experiment import checkpoint
from prelort.experiment.assemble import Assembly, assemble, planned_ranks
from prelort.experiment.folder import RunFolder
from prelort.federation.allocation import Allocation
from prelort.tasks.interface import Example
from random_adapters import same_bits

Make = Callable[..., Config]
SIX = [f"site-{number}" for number in range(6)]
TUNING = {"validation_fraction": 0.2}


def planned(config: Config) -> tuple[list[int], list[int], Allocation]:
    return planned_ranks(config, federated.load(config))


def encoded(assembly: Assembly, rows: Any) -> list[Example]:
    task = assembly.runtime.task
    return task.encode(rows, assembly.tokenizer, assembly.config.data, assembly.rows.labels)


def rank_changes(path: Path) -> set[tuple[int, str, int, int]]:
    """(round, client, old rank, new rank)."""
    return {
        (event.round, event.client, event.old_rank, event.new_rank)
        for event in RunFolder(path).events.read()
        if isinstance(event, RankChanged)
    }


# The plan


def test_a_schedule_is_assigned_as_the_mix_is(make_config: Make) -> None:
    schedule = {"3": "8, 2, 4, 4, 2, 8", "5": "2*1"}
    ranks = {"mix": "2, 2, 4, 4, 8, 8", "assign": "in-order", "schedule": schedule}
    offered, max_rank, allocation = planned(make_config(ranks=ranks))
    assert offered == [2, 2, 4, 4, 8, 8]
    assert max_rank == [8, 2, 4, 4, 8, 8]
    assert allocation.schedule == {
        3: dict(zip(SIX, [8, 2, 4, 4, 2, 8], strict=True)),
        5: dict.fromkeys(SIX, 2),
    }
    assert allocation.by_loss is None


def test_a_reference_that_ignores_ranks_may_use_the_highest_everywhere(make_config: Make) -> None:
    method = {"name": "homogeneous-max"}
    offered, max_rank, _ = planned(make_config(method=method))
    assert offered == [2, 2, 4, 4, 8, 8]
    assert max_rank == [8] * 6
    schedule = {"schedule": {"2": "2*0.5, 16*0.5"}}
    assert planned(make_config(method=method, ranks=schedule))[1] == [16] * 6


@pytest.mark.parametrize(
    "mix, reason",
    [
        ("2, 4", "the list has 2 ranks for 6 clients"),
        ("2*0.5", "the shares sum to 0.5"),
        ("", "'' is not a rank"),
    ],
)
def test_a_mix_that_does_not_fit_is_named_by_its_round(
    make_config: Make, mix: str, reason: str
) -> None:
    ranks = {"mix": "2*1", "schedule": {"2": "4*1", "3": mix}}
    with pytest.raises(ConfigError, match=f"ranks.schedule.3 = '{re.escape(mix)}' .*{reason}"):
        planned(make_config(ranks=ranks))


# What is made of it


@pytest.mark.parametrize("by_loss", [True, False])
def test_a_site_gets_the_rows_that_its_part_in_the_run_needs(
    make_config: Make, tmp_path: Path, by_loss: bool
) -> None:
    ranks = {"mix": "2*0.5, 8*0.5", "allocation": "by-loss" if by_loss else "fixed"}
    at_clients = {"at_clients": not by_loss}
    config = make_config(ranks=ranks, data=TUNING, evaluation=at_clients)
    assembly = assemble(config, tmp_path)
    for site, rows in zip(assembly.clients, assembly.rows.clients, strict=True):
        assert [*site.examples] == encoded(assembly, rows.train)
        assert [*site.test] == ([] if by_loss else encoded(assembly, rows.test))
        assert site.personal is not None
        assert site.personal.folder == tmp_path / "personal"
        assert bool(site.validation) == by_loss
    assert all(site.personal is None for site in assemble(config).clients)


def test_clients_are_allocated_ranks_by_their_loss_on_rows_that_all_share(
    make_config: Make,
) -> None:
    data = TUNING | {"max_test_examples": 7}
    ranks = {"mix": "2*0.5, 8*0.5", "allocation": "by-loss"}
    assembly = assemble(make_config(ranks=ranks, data=data))
    (shared, *others) = [site.validation for site in assembly.clients]
    assert all(other == shared for other in others)
    everyone = [client.validation for client in assembly.rows.clients]
    pool = encoded(assembly, concatenate_datasets(everyone))
    assert len(shared) == 7 < len(pool)
    assert all(example in pool for example in shared)


def test_measuring_at_clients_without_rows_of_their_own_is_refused(
    make_config: Make, text_file: Path, tmp_path: Path
) -> None:
    given = make_config(data={"test": str(text_file)}, evaluation={"at_clients": True})
    assert all(site.test for site in assemble(given).clients)  # its rows say whose they are
    nameless = tmp_path / "test.txt"
    nameless.write_text("\n".join(["a sentence of nobody"] * 4))
    config = make_config(data={"test": str(nameless)}, evaluation={"at_clients": True})
    with pytest.raises(ConfigError, match="no client has test rows of its own to measure on"):
        assemble(config)


@pytest.mark.parametrize("name", ["test", "validation"])
def test_it_is_evaluated_on_the_configured_rows(make_config: Make, name: str) -> None:
    assembly = assemble(make_config(data=TUNING, evaluation={"on": name}))
    clients = assembly.rows.clients
    rows = {
        "test": assembly.rows.test,
        "validation": concatenate_datasets([client.validation for client in clients]),
    }
    asked, other = (
        {tuple(example.input_ids) for example in encoded(assembly, part)}
        for part in (rows.pop(name), *rows.values())
    )
    assert {tuple(example.input_ids) for example in assembly.test} == asked
    assert asked.isdisjoint(other)


# Whole runs


def test_a_run_with_a_schedule(make_config: Make, tmp_path: Path) -> None:
    schedule = {"2": "4, 4, 4, 4, 8, 2"}
    ranks = {"mix": "2, 2, 4, 4, 8, 8", "assign": "in-order", "schedule": schedule}
    everyone = {"rounds": 3, "clients_per_round": 6}
    out = tmp_path / "run"
    result = prelort.run(make_config(ranks=ranks, federation=everyone), out)

    assert rank_changes(out) == {(1, "site-0", 2, 4), (1, "site-1", 2, 4), (1, "site-5", 8, 2)}
    ranks_by_round = {
        number: [reply.rank for reply in record.replies.values()]
        for number, record in result.history.rounds.items()
    }
    assert ranks_by_round == {1: [2, 2, 4, 4, 8, 8], 2: [4, 4, 4, 4, 8, 2], 3: [4, 4, 4, 4, 8, 2]}
    assert result.levels == (2, 4, 8)
    state = checkpoint.load(out / "checkpoints" / "00003").state
    assert state.ranks == {"site-0": 4, "site-1": 4, "site-5": 2}
    assert evaluate(out).prefixes.keys() == {2, 4, 8}


def test_a_run_by_loss_raises_those_with_the_best_validation_loss(
    make_config: Make, tmp_path: Path
) -> None:
    ranks = {"mix": "2*0.5, 8*0.5", "allocation": "by-loss", "high_share": 0.34}
    out = tmp_path / "run"
    result = prelort.run(make_config(ranks=ranks, data=TUNING), out)

    rounds = result.history.rounds
    first = rounds[1].replies
    assert sorted(first) == SIX
    assert {reply.rank for reply in first.values()} == {2}
    best = sorted(first, key=lambda name: (first[name].validation_loss, name))[:2]
    assert rank_changes(out) == {(1, name, 2, 8) for name in best}
    later = [reply for number in rounds if number > 1 for reply in rounds[number].replies.values()]
    assert all(reply.rank == (8 if reply.client in best else 2) for reply in later)
    assert all(reply.validation_loss is None for reply in later)
    assert result.levels == (2, 8)


def test_measuring_at_clients_does_not_change_the_run(make_config: Make, tmp_path: Path) -> None:
    results = []
    for at_clients in (False, True):
        config = make_config(evaluation={"at_clients": at_clients, "every": 1})
        results.append(prelort.run(config, tmp_path / str(at_clients)))
    assert same_bits(results[0].global_adapter, results[1].global_adapter)
    assert results[0].metrics == results[1].metrics

"""Rows held out of the training rows, to choose settings by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from prelort import config
from prelort.data.federated import ClientRows, FederatedRows, load


def rows_of(sizes: dict[str, int]) -> list[dict[str, Any]]:
    names = [name for name, size in sizes.items() for _ in range(size)]
    return [{"text": f"t{i}", "client": name, "id": i} for i, name in enumerate(names)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    written = rows_of({"a": 40, "b": 25, "c": 10})
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return path


def loaded(source: Path, share: float, *, seed: int = 0, **data: Any) -> FederatedRows:
    values = {"source": str(source), "validation_fraction": share, **data}
    return load(config.check({"seed": seed, "data": values, "ranks": {"mix": "2*0.5, 8*0.5"}}))


@pytest.fixture
def test_file(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"text": "t", "client": "a", "id": 999}) + "\n")
    return path


def ids(rows: Dataset | None) -> list[int]:
    return [] if rows is None else list(rows["id"][:])


def parts(client: ClientRows) -> tuple[list[int], list[int], list[int]]:
    return ids(client.train), ids(client.validation), ids(client.test)


def test_by_default_nothing_is_held_out(source: Path) -> None:
    assert all(client.validation is None for client in loaded(source, 0.0).clients)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_it_is_a_share_of_what_would_be_trained_on(source: Path, share: float) -> None:
    before, after = loaded(source, 0.0), loaded(source, share)
    for old, new in zip(before.clients, after.clients, strict=True):
        train, validation, test = parts(new)
        assert test == ids(old.test)  # the test rows are those that they are without it
        assert sorted(train + validation) == ids(old.train)
        assert not set(train) & set(validation)
        assert not set(validation) & set(test)
        size = min(max(round(share * len(old.train)), 1), len(old.train) - 1)
        assert len(validation) == size
        assert train == [row for row in ids(old.train) if row in train]  # in the order they had
        assert new.rank == old.rank
    assert ids(after.test) == ids(before.test)


def test_the_seed_decides_which(source: Path, test_file: Path) -> None:
    """With a given test set, so that nothing else is drawn."""
    found = [loaded(source, 0.3, seed=seed, test=str(test_file)).clients for seed in (0, 0, 1)]
    first, again, other = ([parts(client) for client in clients] for clients in found)
    assert first == again
    for one, two in zip(first, other, strict=True):
        assert sorted(one[0] + one[1]) == sorted(two[0] + two[1])
        assert one[1] != two[1]


def test_they_are_not_the_first_nor_the_last_rows(source: Path) -> None:
    """A file may be in an order that means something."""
    (client, *_) = loaded(source, 0.3).clients
    train, validation, _ = parts(client)
    together = sorted(train + validation)
    assert validation not in (together[: len(validation)], together[-len(validation) :])


def test_they_do_not_depend_on_the_other_clients(tmp_path: Path) -> None:
    held = []
    for name, others in (("one", 40), ("two", 20)):
        path = tmp_path / f"{name}.jsonl"
        written = rows_of({"a": 30, "b": others})
        path.write_text("".join(json.dumps(row) + "\n" for row in written))
        (client,) = [c for c in loaded(path, 0.2).clients if c.name == "a"]
        held.append(parts(client))
    assert held[0] == held[1]


def test_the_draw_is_another_than_that_of_the_test_rows(source: Path, test_file: Path) -> None:
    """Of the same rows and with the same share, both would be the same otherwise."""
    tests = loaded(source, 0.0, test_fraction=0.3)
    validations = loaded(source, 0.3, test=str(test_file))
    for one, two in zip(tests.clients, validations.clients, strict=True):
        assert len(ids(one.test)) == len(ids(two.validation))
        assert ids(one.test) != ids(two.validation)


def test_beside_a_given_test_set_only_they_are_held_out(source: Path, test_file: Path) -> None:
    found = loaded(source, 0.2, test=str(test_file))
    assert ids(found.test) == [999]
    assert [(len(c.train), len(ids(c.validation))) for c in found.clients] == [
        (32, 8),
        (20, 5),
        (8, 2),
    ]


@pytest.mark.parametrize("share, least", [(0.0, 2), (0.01, 3), (0.99, 3)])
def test_each_part_has_a_row_or_the_client_is_left_out(
    tmp_path: Path, share: float, least: int
) -> None:
    path = tmp_path / "train.jsonl"
    written = rows_of({"a": 4, "b": 3, "c": 2, "d": 1})
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    found = loaded(path, share)
    assert [c.name for c in found.clients] == [
        n for n, s in zip("abcd", (4, 3, 2, 1), strict=True) if s >= least
    ]
    assert {d.name for d in found.dropped} == set("abcd") - {c.name for c in found.clients}
    for client in found.clients:
        assert len(client.train) >= 1
        assert client.test is not None
        assert (client.validation is None) == (share == 0)
        assert share == 0 or len(ids(client.validation)) >= 1


def test_the_embedded_text_has_them_too() -> None:
    before = {client.name: client for client in load(config.load()).clients}
    after = load(config.load(None, ["data.validation_fraction=0.1"]))
    # Who has one row cannot hold one out.
    left_out = before.keys() - {client.name for client in after.clients}
    assert all(len(before[name].train) == 1 for name in left_out)
    for new in after.clients:
        assert new.validation is not None
        kept, held = list(new.train["text"][:]), list(new.validation["text"][:])
        assert held
        assert sorted(kept + held) == sorted(before[new.name].train["text"][:])

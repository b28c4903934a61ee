"""Clients of one process side by side: in threads (the same bits) or in one batch (rounding)."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import prelort
from prelort.adapters import algebra
from prelort.config import Config
from prelort.experiment.assemble import Assembly, assemble
from prelort.experiment.measure import measure
from prelort.experiment.run import RunResult
from prelort.experiment.stage import InProcess, clients_together
from prelort.experiment.workers import default_threads, replica
from prelort.federation import batched
from prelort.federation import client as client_module
from prelort.methods import REGISTRY, trait
from prelort.models.lora import install
from prelort.training.local import draws

Make = Callable[..., Config]


def run(config: Config, path: Path, threads: int = 1) -> RunResult:
    return prelort.run(config, path, stage_of=InProcess(threads))


def events(result: RunResult, kind: str) -> list[dict[str, object]]:
    lines = (result.path / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def without_times(found: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{k: v for k, v in event.items() if k != "seconds"} for event in found]


def distance(x: RunResult, y: RunResult) -> float:
    theirs = y.adapter.tensors()
    return max(float((t - theirs[n]).abs().max()) for n, t in x.adapter.tensors().items())


METHODS = ["prelort", "fed-plora", "fedsa-lora", "hetlora", "flora", "rolora"]


@pytest.mark.parametrize("method", METHODS)
def test_threads_do_not_change_a_bit(method: str, make_config: Make, tmp_path: Path) -> None:
    """Adapters, metrics and events: a prefix, a fold, factors of one's own, pruning, one factor."""
    config = make_config(method={"name": method}, federation={"clients_per_round": 5})
    one, three = run(config, tmp_path / "one"), run(config, tmp_path / "three", threads=3)
    assert distance(one, three) == 0
    assert one.metrics == three.metrics
    for kind in ("client_finished", "aggregated", "evaluated"):
        assert without_times(events(one, kind)) == without_times(events(three, kind))


@pytest.mark.parametrize("method", [name for name in REGISTRY if name != "fedit"])
def test_in_one_batch_the_results_are_the_same_but_for_rounding(
    method: str, make_config: Make, tmp_path: Path
) -> None:
    changes = {"method": {"name": method}, "training": {"optimizer": "sgd", "learning_rate": 0.5}}
    alone = run(make_config(**changes), tmp_path / "alone")
    found = run(make_config(**changes, federation={"together": 2}), tmp_path / "together")
    if not trait(REGISTRY[method], "personal"):
        # As products: what an SVD makes of nearly nothing may turn its sign.
        first, second = (replace(r.adapter, modules_to_save={}) for r in (alone, found))
        start = replace(assemble(make_config(**changes)).initial, modules_to_save={})
        assert algebra.distance(second, first) < 1e-4 * algebra.distance(first, start)
    for mine, theirs in zip(
        events(found, "client_finished"), events(alone, "client_finished"), strict=True
    ):
        assert mine["client"] == theirs["client"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.parametrize("together", [1, 2])
def test_all_truncations_of_a_batch_in_one_pass(
    make_config: Make, tmp_path: Path, together: int
) -> None:
    changes = {"method": {"objective": "mean"}, "federation": {"together": together}}
    training = {"optimizer": "sgd", "learning_rate": 0.5}
    slow = run(make_config(**changes, training=training), tmp_path / "slow")
    at_once = {**training, "batch_truncations": True}
    fast = run(make_config(**changes, training=at_once), tmp_path / "fast")
    assert 0 < distance(slow, fast) < 1e-4


def test_clients_really_train_together_unless_something_is_folded(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = batched.train_batched

    def counting(model, truncation, task, members, pad_id, **more):  # type: ignore[no-untyped-def]
        sizes.append(len(members))
        return real(model, truncation, task, members, pad_id, **more)

    monkeypatch.setattr(together, "train_together", counting)
    run(make_config(federation={"together": 2}), tmp_path / "prelort")
    assert sizes == [2, 2, 2]  # of three clients a round; who is left over trains alone
    sizes.clear()
    folds = make_config(federation={"together": 3}, method={"name": "fed-plora"})
    run(folds, tmp_path / "folds")
    # Clients of the highest rank have nothing folded: two of them may meet.
    assert all(size == 2 for size in sizes)


def test_where_memory_does_not_suffice_the_group_is_halved(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = batched.train_batched, []

    def small(model, truncation, task, members, pad_id, **more):  # type: ignore[no-untyped-def]
        sizes.append(len(members))
        if len(members) > 2:
            raise torch.OutOfMemoryError("full")
        return real(model, truncation, task, members, pad_id, **more)

    monkeypatch.setattr(together, "train_together", small)
    changes = {"clients_per_round": 5, "rounds": 1}
    found = run(make_config(federation={"together": 5, **changes}), tmp_path / "halved")
    assert sizes == [5, 2, 3, 1, 2]
    alone = run(make_config(federation=changes), tmp_path / "alone")
    assert distance(alone, found) < 1e-4


def test_what_breaks_together_is_done_one_by_one(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_, **__):  # type: ignore[no-untyped-def]
        raise RuntimeError("no")

    monkeypatch.setattr(together, "train_together", broken)
    found = run(make_config(federation={"together": 3}), tmp_path / "broken")
    assert distance(run(make_config(), tmp_path / "alone"), found) == 0
    assert "could not be trained together" in (found.path / "log.txt").read_text()


def test_a_client_that_fails_in_a_thread_is_left_out(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = client_module.train

    def failing(model, truncation, task, examples, config, work, pad_id):  # type: ignore[no-untyped-def]
        if work.client == "site-1":
            raise ValueError("broken disk")
        return real(model, truncation, task, examples, config, work, pad_id)

    monkeypatch.setattr(client_module, "train", failing)
    config = make_config(federation={"clients_per_round": 6, "rounds": 1})
    found = run(config, tmp_path / "run", threads=2)
    (failed,) = events(found, "client_failed")
    assert failed["client"] == "site-1"
    assert "broken disk" in str(failed["reason"])


def test_an_interruption_ends_the_training_under_way(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads do not hear of Ctrl-C: they are told, and none is left behind."""
    config = make_config(training={"local_steps": 100_000})
    entered = threading.Event()
    real = client_module.train

    def noticed(*arguments, **more):  # type: ignore[no-untyped-def]
        entered.set()
        return real(*arguments, **more)

    monkeypatch.setattr(client_module, "train", noticed)
    # A shell's background job ignores SIGINT, and Python then leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(event: dict[str, object]) -> None:
        if event["event"] == "round_started":
            threading.Thread(target=press, daemon=True).start()

    def press() -> None:
        entered.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            prelort.run(config, tmp_path / "run", stage_of=InProcess(2), listeners=[interrupt])
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 60
    assert not [t for t in threading.enumerate() if t.name.startswith("client")]


@pytest.fixture(scope="module")
def assembly(make_config: Make) -> Assembly:
    return assemble(make_config())


def test_a_replica_shares_the_bases_weights_and_nothing_else(assembly: Assembly) -> None:
    work = assembly.runtime
    other = replica(work)
    install(work.model, assembly.initial)
    install(other.model, assembly.initial.prefix(2))
    mine, theirs = dict(work.model.named_parameters()), dict(other.model.named_parameters())
    for name, parameter in mine.items():
        assert (parameter is theirs[name]) == ("lora" not in name), name
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        whole = other.model(input_ids=ids).logits
        with work.truncation.at(0):  # of the first model alone
            assert torch.equal(other.model(input_ids=ids).logits, whole)
    hooks = [
        len(m._forward_hooks) for n, m in other.model.named_modules() if n.endswith("A.default")
    ]
    assert set(hooks) == {1}


def test_default_threads(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    model = assemble(make_config()).runtime.model
    assert default_threads(make_config(threads=1), model) == 1  # 4 x 32 tokens of 32 numbers
    large = {"training": {"batch_size": 32}}
    make_config = partial(make_config, **large)
    assert default_threads(make_config(threads=None), model) == 1  # torch itself uses all cores
    assert default_threads(make_config(threads=1), model) == 8
    assert default_threads(make_config(threads=3), model) == 2
    assert default_threads(make_config(threads=16), model) == 1
    assert not draws(model)
    model.config.attention_dropout = 0.1
    try:
        assert draws(model)
        assert default_threads(make_config(threads=1), model) == 1
    finally:
        model.config.attention_dropout = 0.0
    dropping = assemble(make_config(lora={"dropout": 0.1})).runtime.model
    assert default_threads(make_config(threads=1), dropping) == 1


def test_how_many_train_together_by_default(make_config: Make) -> None:
    assert clients_together(make_config(), torch.device("cpu"), 9) == 1
    assert clients_together(make_config(), torch.device("cuda"), 9) == 9
    four = make_config(federation={"together": 4})
    assert clients_together(four, torch.device("cpu"), 9) == 4


@pytest.mark.parametrize("metrics", [("perplexity",), ("perplexity", "rouge_l")])
def test_all_ranks_in_one_pass_measure_what_each_does_alone(
    make_config: Make, metrics: tuple[str, ...]
) -> None:
    config = make_config(
        task="instruction",
        data={"prompt_template": "{text}", "completion_column": "label"},
        evaluation={"metrics": metrics, "max_new_tokens": 6, "batch_size": 5},
    )
    made = assemble(config)
    generator = torch.Generator().manual_seed(3)
    for factors in made.initial.layers.values():
        factors.B.copy_(0.2 * torch.randn(factors.B.shape, generator=generator))
    adapters = {rank: made.initial.prefix(max(rank, 1)) for rank in (0, 2, 4, 8)}
    alone = measure(config, [made.runtime], made.test, adapters, at_once=1)
    told: list[tuple[int, int]] = []
    for at_once in (2, 3, 8):
        found = measure(
            config, [made.runtime], made.test, adapters,
            lambda done, total: told.append((done, total)), at_once=at_once,
        )  # fmt: skip
        for rank in adapters:
            assert found[rank] == pytest.approx(alone[rank], rel=1e-5)
        assert told[-1][0] == told[-1][1]
    assert len({round(values["loss"], 6) for values in alone.values()}) == 4
    beside = [made.runtime, replica(made.runtime), replica(made.runtime)]
    assert measure(config, beside, made.test, adapters, at_once=1) == alone

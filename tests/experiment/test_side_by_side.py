"""Clients of one process side by side: in threads (the same bits) or in one batch (rounding)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import prelort
from backends import local_app
from equality import equal
from prelort.adapters import algebra
from prelort.config import Config
from prelort.events import ClientFinished, Event, RoundStarted
from prelort.experiment.assemble import assemble
from prelort.experiment.backend import Backend, InProcess, clients_per_batch, with_all_data
from prelort.experiment.measure import measure
from prelort.experiment.result import RunResult
from prelort.experiment.workers import replica
from prelort.federation.batched import answer_batched
from prelort.federation.in_process import InProcessGrid
from prelort.federation.transport import Transport
from prelort.methods import REGISTRY, trait
from prelort.tasks.causal_lm import CausalLM
from run_files import events_of

Make = Callable[..., Config]


def run(config: Config, path: Path, threads: int = 1) -> RunResult:
    return prelort.run(config, path, backend=InProcess(threads))


def replies(result: RunResult) -> list[ClientFinished]:
    return [reply for record in result.history.rounds.values() for reply in record.replies.values()]


def distance(x: RunResult, y: RunResult) -> float:
    theirs = y.global_adapter.tensors()
    return max(float((t - theirs[n]).abs().max()) for n, t in x.global_adapter.tensors().items())


METHODS = ["prelort", "fed-plora", "fedsa-lora", "hetlora", "flora", "rolora"]


@pytest.mark.parametrize("method", METHODS)
def test_threads_do_not_change_a_bit(method: str, make_config: Make, tmp_path: Path) -> None:
    """Adapters, metrics and events: a prefix, a fold, factors of one's own, pruning, one factor."""
    config = make_config(method={"name": method}, federation={"clients_per_round": 5})
    one, three = run(config, tmp_path / "one"), run(config, tmp_path / "three", threads=3)
    assert distance(one, three) == 0
    assert one.metrics == three.metrics
    assert equal(events_of(one.path), events_of(three.path))


@pytest.mark.parametrize("method", [name for name in REGISTRY if name != "fedit"])
def test_in_one_batch_the_results_are_the_same_but_for_rounding(
    method: str, make_config: Make, tmp_path: Path
) -> None:
    changes = {"method": {"name": method}, "training": {"optimizer": "sgd", "learning_rate": 0.5}}
    alone = run(make_config(**changes), tmp_path / "alone")
    found = run(make_config(**changes, federation={"clients_per_batch": 2}), tmp_path / "batched")
    if not trait(REGISTRY[method], "personal"):
        # As products: what an SVD makes of nearly nothing may turn its sign.
        first, second = (replace(r.global_adapter, modules_to_save={}) for r in (alone, found))
        start = replace(assemble(make_config(**changes)).initial, modules_to_save={})
        assert algebra.distance(second, first) < 1e-4 * algebra.distance(first, start)
    for mine, theirs in zip(replies(found), replies(alone), strict=True):
        assert mine.client == theirs.client
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)


@pytest.mark.parametrize("lora", [{"dropout": 0.2}, {}], ids=["llama", "bert"])
def test_with_dropout_threads_do_not_change_a_bit_either(
    make_config: Make, tiny_bert: Path, tmp_path: Path, lora: dict[str, float]
) -> None:
    """BERT has dropout of its own, in its attention too."""
    changes: dict[str, object] = {"federation": {"clients_per_round": 5}, "lora": lora}
    if not lora:
        changes |= {"task": "classification", "model": {"name": str(tiny_bert)}}
    config = make_config(**changes)
    one, *others = (
        run(config, tmp_path / str(number), threads) for number, threads in enumerate((1, 2, 2))
    )
    for other in others:
        assert distance(one, other) == 0
        assert one.metrics == other.metrics


class SmallMemory(CausalLM):
    """Eight rows fit into its memory; a batch of one client has four."""

    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        if model.training and len(batch["labels"]) > 8:
            raise torch.OutOfMemoryError("full")
        return super().losses(model, batch)


@contextmanager
def with_small_memory(config: Config, folder: Path) -> Iterator[Backend]:
    assembly = assemble(config, folder)
    runtime = replace(assembly.runtime, task=SmallMemory())
    clients = [replace(client, runtime=runtime) for client in assembly.clients]
    grid = InProcessGrid(
        local_app(clients),
        [{"partition-id": index} for index in range(len(clients))],
        answer_batched=answer_batched(lambda context: clients[context.node_config["partition-id"]]),
        clients_per_batch=len(clients),
    )
    yield with_all_data(assembly, Transport(grid, len(clients)))


@pytest.mark.parametrize(
    "training, expected", [({}, 5), ({"packing": True}, 1), ({"optimizer": "adamw-8bit"}, 1)]
)
def test_which_clients_of_a_gpu_share_a_batch(
    make_config: Make, training: dict[str, object], expected: int
) -> None:
    config = make_config(training=training, federation={"clients_per_batch": "auto"})
    assert clients_per_batch(config, torch.device("cuda"), 5) == expected
    assert clients_per_batch(config, torch.device("cpu"), 5) == 1


def test_where_memory_does_not_suffice_the_batch_is_halved(
    make_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(federation={"clients_per_round": 5, "rounds": 1})
    alone = run(config, tmp_path / "alone")
    found = prelort.run(config, tmp_path / "halved", backend=with_small_memory)
    assert caplog.text.count("training in halves") == 2
    assert "one by one" not in caplog.text
    assert distance(alone, found) < 1e-4


def test_an_interruption_ends_the_training_under_way(make_config: Make, tmp_path: Path) -> None:
    """Threads do not hear of Ctrl-C: they are stopped, and none is left behind."""
    config = make_config(training={"local_steps": 100_000})
    # A shell's background job ignores SIGINT, and Python then leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(event: Event) -> None:
        if isinstance(event, RoundStarted):
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            prelort.run(config, tmp_path / "run", backend=InProcess(2), listeners=[interrupt])
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 60
    assert not [t for t in threading.enumerate() if t.name.startswith("client")]


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

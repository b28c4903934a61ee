"""A client with a real model: what it takes in, what it completes by itself, what it answers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from backends import local_app
from prelort import tasks
from prelort.adapters import AdapterSchema, Factors, LoraAdapter, ScaleRule
from prelort.adapters.initial import fresh
from prelort.config import LoraSettings, ModelConfig, check
from prelort.federation import messages, wire
from prelort.federation.client import ClientRuntime, LocalClient
from prelort.federation.client_app import REFUSED
from prelort.federation.client_manager import AdapterSpec
from prelort.federation.flower import Message, MessageType
from prelort.federation.personal import PersonalStore
from prelort.federation.requests import evaluate_request, train_request
from prelort.methods import Broadcast, Client, ServerState
from prelort.methods.objective import Objective, TailPenalty, plain
from prelort.metrics.evaluate import EvaluationSettings, evaluate
from prelort.models.base import load_tokenizer
from prelort.models.lora import attach, extract, install
from prelort.privacy.example import ExampleLedger, ExamplePrivacy
from prelort.tasks.interface import Example
from prelort.training.local import train
from prelort.training.settings import LocalTraining
from prelort.training.steps import Assignment
from prelort.training.tail import pairs, tail_norm
from prelort.training.truncation import Truncation
from small_federation import blob_of, in_process, with_header
from tiny_models import base_model, kind_of, trained_adapter

RULE = ScaleRule("rslora", 1.3)
GLOBAL = 8
CONFIG = check(
    {
        "seed": 11,
        "training": {
            "local_steps": 2,
            "batch_size": 4,
            "learning_rate": 0.05,
            "optimizer": "sgd",
        },
        "federation": {"rounds": 3},
        "evaluation": {"batch_size": 3, "max_new_tokens": 1, "max_generated": 1},
    }
)


def examples_of(folder: Path, seed: int, count: int = 8) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(2, 256, (count, 6), generator=generator).tolist()
    label = kind_of(folder) == "classification"
    return [Example(ids, index % 3 if label else ids) for index, ids in enumerate(rows)]


class Bench:
    """A workspace, the server's adapter, and one client that is asked through its `ClientApp`."""

    def __init__(self, folder: Path, *, pattern: dict[str, int] | None = None) -> None:
        self.folder = folder
        self.tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
        task = tasks.get("classification" if kind_of(folder) == "classification" else "causal-lm")
        settings = LoraSettings(rank_pattern=pattern or {})
        model = attach(base_model(folder), settings, GLOBAL, task.kind).eval()
        self.initial = fresh(extract(model, RULE), 5)
        self.trained = trained_adapter(model, RULE)
        spec = AdapterSpec("base-0", AdapterSchema.of(self.initial), RULE)
        self.runtime = ClientRuntime(
            model,
            Truncation(model, RULE),
            task,
            0,
            self.tokenizer,
            spec=spec,
            modules_to_save=self.initial.modules_to_save,
        )
        self.client = LocalClient("site-0", 4, examples_of(folder, 0), self.runtime)

    def ask(self, content: Any, kind: str) -> Message:
        grid = in_process(local_app([self.client]), 1)
        (node,) = grid.get_node_ids()
        message = Message(content, dst_node_id=node, message_type=kind)
        (reply,) = grid.send_and_receive([message])
        return reply

    def properties(self) -> messages.ClientProperties:
        content = wire.pack(self.runtime.spec.header(1))
        return wire.header(self.ask(content, MessageType.QUERY).content, messages.ClientProperties)

    def request(self, sent: Broadcast, objective: Objective | None = None, **changes: Any) -> Any:
        """The server's message to train what a method broadcasts, with another header."""
        goal = objective or plain(sent.trainable.rank)
        method: Any = SimpleNamespace(
            broadcast=lambda state, client: sent, objective=lambda state, client: goal
        )
        state, client = ServerState(self.trained), Client("site-0", 4, 8)
        content = train_request(
            CONFIG, self.runtime.spec, method, state, client, with_validation=False
        )
        return with_header(content, **changes)

    def train(
        self, sent: Broadcast, objective: Objective | None = None, **changes: Any
    ) -> tuple[messages.TrainReply, dict[str, torch.Tensor]]:
        """The reply's header, and the tensors that came with it."""
        reply = self.ask(self.request(sent, objective, **changes), MessageType.TRAIN)
        assert not reply.has_error(), reply.error.reason
        tensors = safetensors.torch.load(blob_of(reply.content))
        return wire.header(reply.content, messages.TrainReply), tensors

    def refusal(self, sent: Broadcast, **changes: Any) -> str:
        """The reason for which a request is refused."""
        reply = self.ask(self.request(sent, **changes), MessageType.TRAIN)
        assert reply.has_error()
        assert reply.error.code == REFUSED
        return str(reply.error.reason)

    def measure(self, sent: Broadcast, **changes: Any) -> Message:
        content = evaluate_request(CONFIG, self.runtime.spec, sent, 1)
        return self.ask(with_header(content, **changes), MessageType.EVALUATE)

    def install(self, sent: Broadcast) -> None:
        install(
            self.runtime.model,
            sent.trainable,
            frozen=sent.frozen,
            trains=sent.trains,
            scale_multiplier=sent.scale_multiplier,
        )

    def by_hand(
        self, sent: Broadcast, objective: Objective | None = None, round_index: int = 0
    ) -> LoraAdapter:
        """What the client's training makes of the whole adapter, without any message."""
        self.install(sent)
        goal = objective or plain(sent.trainable.rank)
        work = Assignment("site-0", round_index, 3, 11, goal)
        train(self.runtime, self.client.examples, LocalTraining.of(CONFIG.training), work)
        return extract(self.runtime.model, RULE)

    def loss(self, sent: Broadcast, examples: list[Example]) -> dict[str, float]:
        self.install(sent)
        settings = EvaluationSettings(metrics=self.runtime.task.metrics)
        found = evaluate(self.runtime, examples, (1,), lambda *ranks: nullcontext(), settings)
        return found[1]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def bench(tiny_llama: Path) -> Bench:
    return Bench(tiny_llama)


@pytest.fixture
def bert(tiny_bert: Path) -> Bench:
    """With a head, which is an extra."""
    return Bench(tiny_bert)


def fold_of(adapter: LoraAdapter, rank: int, seed: int = 3) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: Factors(
            0.2 * torch.randn(rank, f.A.shape[1], generator=generator),
            0.2 * torch.randn(f.B.shape[0], rank, generator=generator),
        )
        for name, f in adapter.layers.items()
    }
    return LoraAdapter(layers, RULE)


# Who it says it is


@pytest.mark.parametrize("max_rank, said", [(0, 4), (2, 4), (4, 4), (8, 8)])
def test_its_properties_have_its_rank_and_the_largest_it_may_get(
    bench: Bench, max_rank: int, said: int
) -> None:
    bench.client = replace(bench.client, max_rank=max_rank)
    own = bench.properties()
    assert (own.client, own.rank, own.max_rank, own.examples) == ("site-0", 4, said, 8)


# What it trains


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"trains": "A"},
        {"trains": "B", "scale_multiplier": 0.5},
    ],
)
@pytest.mark.parametrize("folded", [0, 3])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_its_reply_is_the_trained_part_of_what_it_received(
    request: pytest.FixtureRequest, kind: str, how: dict[str, Any], folded: int
) -> None:
    bench: Bench = request.getfixturevalue("bench" if kind == "llama" else "bert")
    frozen = fold_of(bench.trained, folded) if folded else None
    sent = Broadcast(bench.trained.prefix(4), frozen=frozen, **how)

    head, found = bench.train(sent)

    expected = bench.by_hand(sent).tensors()
    stays = {"A": "lora_B", "B": "lora_A"}.get(sent.trains, "none")
    assert_same(found, {name: t for name, t in expected.items() if stays not in name})
    assert (head.client, head.examples, head.steps, head.rank) == ("site-0", 8, 2, 4)
    assert head.next_rank is None
    assert head.validation_loss is None
    before = bench.trained.prefix(4).tensors()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in found.items())


# What it is not sent


@pytest.mark.parametrize("seeded, trains", [("A", "B"), ("A", "AB"), ("A and B", "AB")])
@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("pattern", [None, {"q_proj": 3}], ids=["one rank", "rank_pattern"])
def test_what_it_draws_is_what_the_server_would_have_sent(
    tiny_llama: Path, seeded: Any, trains: Any, rank: int, pattern: dict[str, int] | None
) -> None:
    bench = Bench(tiny_llama, pattern=pattern)
    start = fresh(bench.initial, 77)
    if seeded == "A":  # B has been trained since
        learnt = {n: Factors(f.A, bench.trained.layers[n].B) for n, f in start.layers.items()}
        start = replace(start, layers=learnt)
    whole = Broadcast(start.prefix(rank), trains=trains)

    _, expected = bench.train(whole)
    _, found = bench.train(replace(whole, seeded_factors=seeded, factor_seed=77))
    _, other = bench.train(replace(whole, seeded_factors=seeded, factor_seed=78))

    assert_same(found, expected)
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in other.items())


# What it refuses


@pytest.mark.parametrize("max_rank, allowed", [(0, 4), (4, 4), (6, 6), (2, 4)])
def test_a_rank_above_what_it_affords_is_refused(bench: Bench, max_rank: int, allowed: int) -> None:
    bench.client = replace(bench.client, max_rank=max_rank)
    bench.train(Broadcast(bench.trained.prefix(allowed)))
    for asked in (allowed + 1, 8):
        said = bench.refusal(Broadcast(bench.trained.prefix(asked)))
        assert said == f"affords rank {allowed} at most, requested was {asked}"


def test_a_rank_above_what_it_affords_can_be_measured(bench: Bench) -> None:
    """It takes no gradients; so every site can measure every prefix of the global adapter."""
    bench.client = replace(bench.client, test=examples_of(bench.folder, 1))
    reply = bench.measure(Broadcast(bench.trained.prefix(5)))
    head = wire.header(reply.content, messages.EvaluateReply)
    assert (head.rank, head.examples) == (5, len(bench.client.test))
    assert head.weight == sum(len(e.input_ids) - 1 for e in bench.client.test)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"base": "base-9"}, "another base model"),
        ({"layers": "none"}, "adapts other layers"),
        ({"scale": 9.0}, "uses another scale rule"),
    ],
)
def test_a_server_that_disagrees_is_refused(
    bench: Bench, changes: dict[str, Any], reason: str
) -> None:
    assert reason in bench.refusal(Broadcast(bench.trained.prefix(4)), **changes)


def test_a_fold_that_does_not_fit_is_refused(bench: Bench) -> None:
    fold = fold_of(bench.trained, 2)
    name = min(fold.layers)
    broken = Factors(fold.layers[name].A[:, 1:], fold.layers[name].B)
    sent = Broadcast(
        bench.trained.prefix(4), frozen=replace(fold, layers={**fold.layers, name: broken})
    )
    assert f"frozen layer '{name}'" in bench.refusal(sent)
    fold.layers[name].B[0, 0] = math.nan
    sent = replace(sent, frozen=fold)
    assert "holds a value that is not finite" in bench.refusal(sent)


# What stays with it


@pytest.fixture
def own(bert: Bench, tmp_path: Path) -> Bench:
    """A client that keeps its B and its head."""
    bert.client = replace(bert.client, max_rank=8, personal=PersonalStore(tmp_path / "personal"))
    return bert


def own_tensors(bench: Bench) -> Callable[[int], dict[str, torch.Tensor]]:
    assert bench.client.personal is not None
    store = bench.client.personal
    return lambda before: store.load("site-0", before=before)


def with_own(bench: Bench, adapter: LoraAdapter, kept: dict[str, torch.Tensor]) -> LoraAdapter:
    """The shared A and these tensors."""
    return LoraAdapter.from_tensors({**adapter.tensors(), **kept}, RULE)


def personal(adapter: LoraAdapter) -> Broadcast:
    return Broadcast(adapter, personal=True)


def test_it_begins_with_b_of_zeros_and_the_head_that_everyone_has(own: Bench) -> None:
    sent = personal(own.trained.prefix(4))
    _, found = own.train(sent)

    start = fresh(sent.trainable, 0)
    begun = {n: Factors(sent.trainable.layers[n].A, f.B) for n, f in start.layers.items()}
    expected = own.by_hand(Broadcast(LoraAdapter(begun, RULE, own.initial.modules_to_save)))

    assert_same(found, {n: t for n, t in expected.tensors().items() if "lora_A" in n})
    kept = own_tensors(own)(1)
    assert_same(kept, {n: t for n, t in expected.tensors().items() if "lora_A" not in n})
    assert any("classifier" in name for name in kept)


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_it_goes_on_with_its_own_also_after_a_change_of_rank(own: Bench, rank: int) -> None:
    """New slots have B = 0, so that they add nothing before they are trained."""
    own.train(personal(own.trained.prefix(4)))
    kept = own_tensors(own)(1)
    shared = min(rank, 4)
    for name, tensor in list(kept.items()):
        if "lora_B" in name:
            kept[name] = torch.zeros(tensor.shape[0], rank)
            kept[name][:, :shared] = tensor[:, :shared]
    later = own.trained.prefix(rank)

    _, found = own.train(personal(later), round=1)

    expected = own.by_hand(Broadcast(with_own(own, later, kept)), round_index=1)
    assert_same(found, {n: t for n, t in expected.tensors().items() if "lora_A" in n})


def test_without_a_place_to_keep_it_a_personal_round_is_refused(bert: Bench) -> None:
    said = bert.refusal(personal(bert.trained.prefix(4)))
    assert said == "has no place to keep its own factors: this method needs one"


# Pruning and offers


def pruning(lowest: int, weight: float = 0.0) -> Objective:
    return replace(plain(4), tail=TailPenalty(weight, 0.5, lowest))


def test_a_tail_that_training_made_smaller_is_left_off(bench: Bench) -> None:
    sent = Broadcast(bench.trained.prefix(4))
    strong = pruning(1, weight=30.0)
    expected = bench.by_hand(sent, strong)
    after = tail_norm(pairs(bench.runtime.model), TailPenalty(1.0, 0.5, 1), 4)
    install(bench.runtime.model, sent.trainable)
    assert after < tail_norm(pairs(bench.runtime.model), TailPenalty(1.0, 0.5, 1), 4)

    head, found = bench.train(sent, strong)

    assert (head.rank, head.next_rank) == (2, 2)
    assert_same(found, expected.prefix(2).tensors())


def test_it_is_asked_after_each_round_what_it_affords(bench: Bench) -> None:
    asked: list[int] = []

    def next_rank(round_index: int) -> int | None:
        asked.append(round_index)
        return {1: 7}.get(round_index)

    bench.client = replace(bench.client, next_rank=next_rank)
    sent = Broadcast(bench.trained.prefix(4))
    offers = [bench.train(sent, round=number)[0].next_rank for number in range(3)]
    assert offers == [None, 7, None]
    assert asked == [0, 1, 2]


# Measuring


def test_its_measurements_are_those_of_what_it_received(bench: Bench) -> None:
    test = examples_of(bench.folder, 1, count=7)
    bench.client = replace(bench.client, test=test)
    sent = Broadcast(
        bench.trained.prefix(4), frozen=fold_of(bench.trained, 3), scale_multiplier=2.0
    )

    reply = bench.measure(sent)

    head = wire.header(reply.content, messages.EvaluateReply)
    assert head.metrics == pytest.approx(bench.loss(sent, test), rel=5e-6)
    assert (head.client, head.round, head.examples, head.rank) == ("site-0", 1, 7, 4)
    assert "adapter" not in reply.content  # nothing but numbers goes back


def test_without_test_rows_it_says_so(bench: Bench) -> None:
    reply = bench.measure(Broadcast(bench.trained.prefix(4)))
    assert (reply.error.code, reply.error.reason) == (REFUSED, "has no test rows of its own")


def test_the_loss_on_its_validation_rows_is_that_of_what_it_trained(bench: Bench) -> None:
    rows = examples_of(bench.folder, 2, count=5)
    bench.client = replace(bench.client, validation=rows)
    sent = Broadcast(
        bench.trained.prefix(4), frozen=fold_of(bench.trained, 3), scale_multiplier=2.0
    )

    head, found = bench.train(sent, with_validation=True)

    after = replace(sent, trainable=LoraAdapter.from_tensors(found, RULE))
    expected = bench.loss(after, rows)["loss"]
    assert head.validation_loss == pytest.approx(expected, rel=5e-6)
    assert head.validation_loss != pytest.approx(bench.loss(sent, rows)["loss"], rel=5e-5)
    assert bench.train(sent)[0].validation_loss is None
    bench.client = replace(bench.client, validation=())
    assert bench.train(sent, with_validation=True)[0].validation_loss is None


# Privacy of its examples

ASKED = {"epsilon": 3.0, "delta": 1e-3, "clip": 0.5}


@pytest.fixture
def limited(bench: Bench, tmp_path: Path) -> Bench:
    """A client with a limit of its own."""
    ledger = ExampleLedger(tmp_path / "ledger.json", limit=(4.0, 1e-3))
    bench.client = replace(bench.client, ledger=ledger, test=bench.client.examples)
    return bench


def test_with_noise_its_reply_has_the_adapter_and_what_was_spent_but_no_loss(
    limited: Bench,
) -> None:
    sent = Broadcast(limited.trained.prefix(4))
    head, tensors = limited.train(sent, private=ASKED)
    assert head.loss is head.validation_loss is None
    assert 0 < head.epsilon < 3.0  # of one round of three
    assert head.epsilon == limited.client.ledger.epsilon(ExamplePrivacy(**ASKED))
    assert tensors.keys() == sent.trainable.tensors().keys()
    assert limited.train(sent, private=ASKED)[0].epsilon > head.epsilon


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({}, "trains with noise only"),
        ({"private": ASKED, "with_validation": True}, "states no validation loss"),
        ({"private": {**ASKED, "epsilon": 5.0}}, r"allows privacy\.epsilon = 4 at"),
    ],
)
def test_what_exceeds_its_limit_is_refused_and_not_trained(
    limited: Bench, changes: dict[str, Any], sentence: str
) -> None:
    assert re.search(sentence, limited.refusal(Broadcast(limited.trained.prefix(4)), **changes))
    assert limited.client.ledger.epsilon(ExamplePrivacy(**ASKED)) == 0


def test_with_a_limit_it_measures_nothing_on_its_own_rows(limited: Bench) -> None:
    reply = limited.measure(Broadcast(limited.trained))
    assert "measures nothing on its own rows" in reply.error.reason


def test_noise_without_a_ledger_is_refused(bench: Bench) -> None:
    refused = bench.refusal(Broadcast(bench.trained.prefix(4)), private=ASKED)
    assert "has no place to keep what it has spent" in refused

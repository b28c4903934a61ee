"""Secure aggregation with hidden ranks: the plain sums, and no message that names a rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prelort
from backends import in_this_process
from command_line import CommandLine
from masked_federation import (
    CLIENTS,
    Noisy,
    Sabotage,
    broken,
    distance,
    lost,
    masked_app,
    noise,
    run_of,
)
from prelort.config import Config, MethodConfig, check
from prelort.errors import ConfigError, PrelortError, QuorumError
from prelort.events import (
    ClientFailed,
    ClientFinished,
    ClientJoined,
    ClientRefused,
    DimensionsLeftOut,
)
from prelort.federation import masking, wire
from prelort.federation.content import content_of
from prelort.federation.flower import Context, Message, MessageType, RecordDict
from prelort.federation.hidden_ranks import Holders, check_prefixes
from prelort.federation.in_process import InProcessGrid
from prelort.federation.transport import Transport
from prelort.methods import build
from prelort.methods.interface import Client, ServerState
from prelort.secure.messages import CountReply, read
from random_adapters import same_bits
from small_federation import (
    App,
    blob_of,
    clients_of,
    header_of,
    make_adapter,
    make_properties,
    make_run,
    small_client_app,
)

HIDDEN = {"secure_aggregation": True, "hide_ranks": True}


def make_config(rounds: int = 1, mix: str = "2, 8", **privacy: Any) -> Config:
    return check(
        {
            "federation": {"rounds": rounds, "clients_per_round": 1.0, "quorum": 0.3},
            "method": {"weights": "uniform"},
            "ranks": {"mix": mix},
            "privacy": privacy,
        }
    )


def hidden_run(app: App, rounds: int = 1, method: str = "prelort", **privacy: Any) -> Any:
    """A run whose rank levels are configured, as the server has them."""
    options = {"donors": "holders"} if method == "replication" else None
    run = run_of(app, make_config(rounds, **HIDDEN, **privacy), method, options, weights="uniform")
    run.state = replace(run.state, levels=(2, 8))
    return run


def plain_run(app: App, rounds: int = 1, method: str = "prelort") -> Any:
    options = {"donors": "holders"} if method == "replication" else None
    return run_of(app, make_config(rounds), method, options, weights="uniform")


@pytest.mark.parametrize("method", ["prelort", "zero-padding", "replication", "fedhl"])
def test_the_round_is_the_plain_one(method: str) -> None:
    plain = plain_run(small_client_app(CLIENTS), 2, method).train()
    run = hidden_run(masked_app(), 2, method)
    assert distance(run.train().adapter, plain.adapter) < 1e-6
    assert len(run.of(ClientFinished)) == 14
    assert {event.rank for event in run.of(ClientFinished)} == {None}


def recorded(app: App, seen: dict[str, list[tuple[str, RecordDict, RecordDict]]]) -> App:
    """The app; what each client is sent and answers goes to ``seen``."""

    def answer(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        request = message.content
        reply = app(message, context)
        name = f"site-{context.node_config['partition-id']}"
        seen.setdefault(name, []).append((kind, request, reply.content))
        return reply

    return answer


def test_messages_of_clients_of_all_ranks_have_the_same_size_and_fields() -> None:
    equal, seen = [replace(client, examples=10) for client in CLIENTS], {}
    hidden_run(recorded(masked_app(clients=equal), seen), 2).train()

    def facts(content: RecordDict) -> tuple[object, ...]:
        head = json.loads(header_of(content))
        adapter = content.get("adapter")
        fields = {n: v for n, v in head.items() if n not in SECRET}
        return fields, len(header_of(content)), len(blob_of(content)) if adapter else 0

    kinds = [kind for kind, _, _ in seen["site-0"]]
    counting = ["query.keys", "query.shares", "query.count", "query.unmask"]
    training = ["query.keys", "query.shares", "train", "query.unmask"]
    assert kinds == ["query", *counting, *training, *training]
    for step, kind in enumerate(kinds):
        replies = [facts(of[step][2]) for of in seen.values()]
        requests = [facts(of[step][1]) for of in seen.values()]
        assert all(one == replies[0] for one in replies), kind
        assert all(one == requests[0] for one in requests), kind
    stated = [json.loads(header_of(of[0][2])) for of in seen.values()]
    assert {(one["rank"], one["max_rank"]) for one in stated} == {(8, 8)}
    trained = json.loads(header_of(seen["site-0"][7][2]))
    assert trained["loss"] is None


SECRET = ("client", "number", "peers", "sealed", "masked", "seeds", "keys", "words", "mask_key")
SECRET += ("share_key", "seed", "survivors")


@pytest.mark.parametrize("action", ["keys", "shares", "train", "unmask"])
def test_a_client_that_drops_out_of_a_round_shows_no_rank(action: str) -> None:
    """Sums are divided by what its share of the clients would hold on average."""
    gone = later({(1, action): lost, (5, action): lost})
    run = hidden_run(masked_app(gone), min_holders=2)
    left_out = {} if action == "unmask" else dict.fromkeys((1, 5), broken)
    plain = plain_run(small_client_app(CLIENTS, instead=left_out))
    before = plain.state.adapter.layers["model.q_proj"].A
    expected = plain.train().adapter.layers["model.q_proj"].A - before
    found = run.train().adapter.layers["model.q_proj"].A - before
    scale = torch.ones(8)
    if left_out:
        scale[2:] = 3 / (4 * 5 / 7)  # three of four holders replied, and five of seven clients
    assert torch.allclose(found, expected * scale[:, None], atol=1e-6)
    assert {event.rank for event in run.of(ClientFailed)} <= {None}


def later(sabotage: Mapping[tuple[int, str], Sabotage]) -> dict[tuple[int, str], Sabotage]:
    """The sabotage from the round on: not of the count before it."""

    def of(change: Sabotage, skipped: int) -> Sabotage:
        calls = iter(range(1000))
        return lambda content: change(content) if next(calls) >= skipped else content

    return {at: of(one, 0 if at[1] == "train" else 1) for at, one in sabotage.items()}


@pytest.mark.parametrize("action", ["keys", "shares", "count", "unmask"])
def test_a_client_that_could_not_be_counted_takes_no_part(action: str) -> None:
    """One that does not reveal is counted."""
    once = iter([True])

    def first(content: RecordDict) -> RecordDict:
        return lost(content) if next(once, False) else content

    run = hidden_run(masked_app({(5, action): first}))
    left_out = {} if action == "unmask" else {5: broken}
    plain = plain_run(small_client_app(CLIENTS, instead=left_out)).train()
    assert distance(run.train().adapter, plain.adapter) < 1e-6
    refused = {(event.client, event.reason) for event in run.of(ClientRefused)}
    assert refused == ({("site-5", "is gone")} if left_out else set())


def test_a_sum_that_may_be_of_too_few_is_not_opened() -> None:
    """Four hold rank 8; with two clients gone they may be two."""
    actions: list[str] = []

    def watched(message: Message, context: Context) -> Message:
        actions.append(message.metadata.message_type)
        return app(message, context)

    app = masked_app({(i, "train"): lost for i in (0, 1)})
    run = hidden_run(watched)
    before = run.state.adapter
    with pytest.raises(QuorumError, match=r"rank dimension 3 had 4 holders .* and 2 clients are"):
        run.train()
    assert same_bits(run.state.adapter, before)
    assert actions.count("query.unmask") == 7, "of the count alone"


def test_dimensions_of_which_too_few_are_there_keep_their_values() -> None:
    run = hidden_run(masked_app())
    run.state = run.server.connect(run.method, run.state)
    run.server.clients = run.server.clients[:5]  # two are away, whoever they are
    before = run.state.adapter.layers["model.q_proj"]
    after, _ = run.server.train(run.method, run.state, 1)
    assert run.of(DimensionsLeftOut)[0].dimensions == (3, 4, 5, 6, 7, 8)
    assert torch.equal(after.adapter.layers["model.q_proj"].A[2:], before.A[2:])
    assert not torch.equal(after.adapter.layers["model.q_proj"].A[:2], before.A[:2])


def test_noise_at_the_clients_works_without_their_ranks() -> None:
    private = Noisy()
    run = hidden_run(masked_app())
    config = run.config
    noisy = run_of(masked_app(), config, private=private, weights="uniform")
    noisy.state = replace(noisy.state, levels=(2, 8))
    plain = plain_run(small_client_app(CLIENTS)).train()
    assert distance(noisy.train().adapter, plain.adapter) < 1e-5
    assert private.releases == 1


# What a client or a server may do


def miscounted(content: RecordDict) -> RecordDict:
    """Five more for the first two rank dimensions, masked as it should be."""
    reply = read(header_of(content), CountReply)
    words = np.frombuffer(reply.words, dtype="<u8") + np.uint64(5) * (np.arange(8) < 2)
    return content_of(reply.model_copy(update={"words": words.tobytes()}).text())


def shortened(content: RecordDict) -> RecordDict:
    reply = read(header_of(content), CountReply)
    return content_of(reply.model_copy(update={"words": reply.words[:8]}).text())


def test_a_count_that_no_ranks_have_ends_the_run() -> None:
    with pytest.raises(QuorumError, match=r"7 clients count \[12, 12, 4, .* no ranks have"):
        hidden_run(masked_app({(3, "count"): miscounted})).train()
    run = hidden_run(masked_app({(3, "count"): shortened}))
    run.train()
    assert "counts 1 rank dimensions, not 8" in run.of(ClientRefused)[0].reason


def test_a_count_of_another_session_is_refused() -> None:
    def of_another(content: RecordDict) -> RecordDict:
        reply = read(header_of(content), CountReply)
        return content_of(reply.model_copy(update={"session": "0" * 32}).text())

    run = hidden_run(masked_app({(3, "count"): of_another}))
    run.train()
    (refused,) = run.of(ClientRefused)
    assert refused.reason == "answers for another session of secure aggregation"


def test_a_wrong_masked_vector_does_not_become_the_adapter() -> None:
    with pytest.raises(QuorumError, match="a client has sent a wrong masked vector"):
        hidden_run(masked_app({(3, "train"): noise})).train()


def test_a_client_that_states_its_rank_is_refused() -> None:
    """An older one does not know that it should not."""
    app = masked_app()

    def older(message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        if message.metadata.message_type == MessageType.QUERY and index == 2:
            return Message(wire.pack(make_properties(CLIENTS[2])), reply_to=message)
        return app(message, context)

    run = hidden_run(older)
    run.train()
    (refused,) = run.of(ClientRefused)
    assert (refused.client, refused.reason[:16]) == ("site-2", "states its rank,")


def test_a_client_of_a_higher_rank_than_the_run_has_is_refused() -> None:
    clients = list(CLIENTS)
    clients[5] = Client("site-5", 16, clients[5].examples)
    run = hidden_run(masked_app(clients=clients))
    run.train()
    (refused,) = run.of(ClientRefused)
    assert refused.reason == "offers a higher rank than the global adapter has: 8"
    assert not run.of(ClientFailed)


def test_a_client_of_another_rank_than_counted_does_not_train() -> None:
    clients = list(CLIENTS)
    run = hidden_run(masked_app(clients=clients))
    run.state = run.server.connect(run.method, run.state)
    clients[5] = Client("site-5", 2, clients[5].examples)
    run.server.train(run.method, run.state, 1)
    (failed,) = run.of(ClientFailed)
    assert failed.reason == "has another rank than that with which it was counted"


def test_a_client_that_was_restarted_since_the_count_does_not_train() -> None:
    app, counted = masked_app(), []

    def restarted(message: Message, context: Context) -> Message:
        kind, index = message.metadata.message_type, int(context.node_config["partition-id"])
        if index == 5 and kind == "query.keys":
            counted.append(index)
            if len(counted) == 2:
                context.state.clear()
        return app(message, context)

    run = hidden_run(restarted)
    run.train()
    (failed,) = run.of(ClientFailed)
    assert failed.reason.startswith("was not counted: it was restarted")


def test_a_second_count_and_an_open_reply_are_refused() -> None:
    run = hidden_run(masked_app())
    run.server.connect(run.method, run.state)
    with pytest.raises(QuorumError):
        run.server.connect(run.method, run.state)
    assert "has been counted in this run already" in {e.reason for e in run.of(ClientRefused)}
    unmasked = content_of('{"rank": 8, "by_rank": {"2": {}}}')
    with pytest.raises(PrelortError, match="a reply that is not masked, which shows its rank"):
        masking.masked(unmasked, content_of("{}"), RecordDict())


def test_who_comes_after_the_count_waits_for_the_next_start() -> None:
    class Late(InProcessGrid):
        late = True

        def get_node_ids(self) -> Iterable[int]:
            nodes = list(super().get_node_ids())
            return nodes[:-1] if self.late else nodes

    grid = Late(masked_app(), [{"partition-id": i} for i in range(7)])
    config = make_config(2, **HIDDEN)
    federation = config.federation.model_copy(update={"min_clients": 6})
    for known in (config, config.model_copy(update={"federation": federation})):
        run = make_run(masked_app(), known, transport=Transport(grid, 1, patience=5.0))
        run.state = replace(run.state, levels=(2, 8))
        if known is config:
            with pytest.raises(ConfigError, match=r"hide_ranks needs federation\.min_clients"):
                run.train()
    run.train(after_round=lambda state: setattr(grid, "late", False))
    (refused,) = run.of(ClientRefused)
    assert (refused.client, refused.reason[:37]) == (
        "site-6",
        "was not there when ranks were counted",
    )
    assert [event.client for event in run.of(ClientFinished)].count("site-5") == 2
    assert all(event.rank is None for event in run.of(ClientJoined))


def test_few_holders_of_the_highest_rank_are_refused() -> None:
    few = clients_of([2, 2, 2, 2, 2, 8, 8])
    with pytest.raises(ConfigError, match=r"min_holders = 3: 2 of 7 clients hold rank 8"):
        hidden_run(masked_app(clients=few)).train()


def test_a_rank_that_would_show_itself_by_its_refusal_is_refused() -> None:
    method = build(MethodConfig(name="prelort", level_weights={"8": 1.0}), 0)
    state = ServerState(make_adapter(8), levels=(2, 8))
    with pytest.raises(ConfigError, match="leaves nothing to train for a client of rank 2"):
        check_prefixes(method, state, 8)


@pytest.mark.parametrize("name", ["homogeneous-min", "fslora", "fedsa-lora", "fed-plora"])
def test_methods_whose_clients_cannot_cut_for_themselves_are_refused(name: str) -> None:
    method = build(MethodConfig(name=name), 0)
    with pytest.raises(ConfigError, match=rf"hide_ranks is not possible with method '{name}'"):
        check_prefixes(method, ServerState(make_adapter(3), levels=(2, 3)), 3)


@pytest.mark.parametrize(
    "name", ["prelort", "zero-padding", "replication", "fedhl", "ffa-lora", "rolora"]
)
def test_methods_that_cut_prefixes_are_served(name: str) -> None:
    state = ServerState(make_adapter(8), levels=(2, 3, 8))
    check_prefixes(build(MethodConfig(name=name), 0), state, 8)


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"privacy": {"hide_ranks": True}}, "needs privacy.secure_aggregation = true"),
        ({"method": {"weights": "examples"}}, "needs method.weights = 'uniform'"),
        ({"federation": {"clients_per_round": 7}}, "needs federation.clients_per_round = 1.0"),
        ({"federation": {"clients_per_round": 0.5}}, "clients_per_round = 1.0, it is 0.5"),
        ({"ranks": {"schedule": {"2": "8"}}}, "or a ranks.schedule"),
        ({"evaluation": {"at_clients": True}}, "not possible with evaluation.at_clients"),
    ],
)
def test_what_would_show_ranks_is_refused(values: dict[str, Any], reason: str) -> None:
    usual = make_config(**HIDDEN).model_dump(exclude_defaults=True)
    with pytest.raises(ConfigError, match=reason):
        check(usual | values)


def test_holders_of_those_who_are_there() -> None:
    holders = Holders(frozenset("abcd"), (4, 3, 0))
    assert holders.at_least(3) == {0: 3, 1: 2, 2: -1}
    assert holders.expected(2) == [2.0, 1.5, 0.0]


# With a model


@pytest.mark.parametrize("method, together", [("prelort", 1), ("ffa-lora", 6)])
def test_a_run_is_the_plain_one_and_its_folder_has_no_ranks(
    method: str,
    together: int,
    make_config: Callable[..., Config],
    command_line: CommandLine,
    tmp_path: Path,
) -> None:
    config = make_config(
        ranks={"mix": "2, 2, 2, 8, 8, 8"},
        federation={"rounds": 2, "clients_per_round": 1.0, "clients_per_batch": together},
        partition={"by": "iid", "clients": 6},
        training={
            "optimizer": "sgd",
            "local_steps": 2,
            "learning_rate": 0.05,
            "rank_exponent": 0.5,
        },
        method={"name": method, "weights": "uniform"},
    )
    secret = config.model_copy(update={"privacy": check_privacy()})
    plain = prelort.run(config, tmp_path / "plain")
    hidden = prelort.run(secret, tmp_path / "hidden")
    assert distance(hidden.global_adapter, plain.global_adapter) < 1e-5
    results = prelort.read(tmp_path / "hidden")
    assert results.replies["rank"].isna().all()
    assert results.clients["ranks"].isna().all()
    command_line("report", tmp_path / "hidden")
    assert "Who holds what" not in (tmp_path / "hidden" / "report.html").read_text()
    lines = (tmp_path / "hidden" / "metrics.jsonl").read_text().splitlines()
    of_clients = [line for line in lines if '"client"' in line]
    assert of_clients
    assert all('"rank":null' in line for line in of_clients)


def check_privacy() -> Any:
    return check(
        {
            "privacy": HIDDEN,
            "method": {"weights": "uniform"},
            "federation": {"clients_per_round": 1.0},
        }
    ).privacy


def test_a_resumed_run_counts_again_and_has_the_same_adapter(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_config(
        ranks={"mix": "2, 2, 2, 8, 8, 8"},
        federation={"rounds": 2, "clients_per_round": 1.0},
        partition={"by": "iid", "clients": 6},
        method={"weights": "uniform"},
    ).model_copy(update={"privacy": check_privacy()})

    class Killed(BaseException):
        pass

    trained: list[str] = []

    def train(name: str, number: int, usual: Callable[[], Message]) -> Message:
        trained.append(name)
        if len(trained) == 6 + 3:
            raise Killed
        return usual()

    whole = prelort.run(config, tmp_path / "whole")
    with pytest.raises(Killed):
        prelort.run(config, tmp_path / "killed", backend=in_this_process(train))
    again = prelort.run(config, tmp_path / "killed", resume=True, backend=in_this_process(train))
    assert same_bits(again.global_adapter, whole.global_adapter)

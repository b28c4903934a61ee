"""Compatibility of messages: another version on the other side works, or is refused in words."""

from __future__ import annotations

from typing import Any

import pytest

from prelort.config import check
from prelort.errors import QuorumError, UpdateRefused
from prelort.events import ClientFailed, ClientRefused, RoundFinished
from prelort.federation import wire
from prelort.federation.flower import Context, Error, Message, MessageType
from prelort.federation.messages import (
    PROTOCOL,
    ClientProperties,
    EvaluateReply,
    EvaluateRequest,
    Header,
    TrainReply,
    TrainRequest,
)
from random_adapters import same_bits
from small_federation import (
    App,
    clients_of,
    make_config,
    make_run,
    small_client_app,
    with_header,
)

CLIENTS = clients_of([2, 4, 8, 4])
NEWER = {"compression": {"name": "zstd"}, "a_field_of_tomorrow": [1, 2]}
KINDS: dict[type[Header], type[Header]] = {
    TrainRequest: TrainReply,
    EvaluateRequest: EvaluateReply,
    Header: ClientProperties,
}


def older_site(requests: dict[str, Any], replies: dict[str, Any]) -> App:
    """Clients that get messages with these fields, and whose replies get others on the way.

    As a `ClientApp` does, they answer what they refuse by an error with the reason.
    """
    usual = small_client_app(CLIENTS)

    def app(message: Message, context: Context) -> Message:
        message.content = with_header(message.content, **requests)
        try:
            if message.metadata.message_type == MessageType.TRAIN:
                wire.header(message.content, TrainRequest).check_features()
            reply = usual(message, context)
        except UpdateRefused as error:
            return Message(Error(100, str(error)), reply_to=message)
        reply.content = with_header(reply.content, **replies)
        return reply

    return app


@pytest.mark.parametrize("requests, replies", [(NEWER, {}), ({}, NEWER), (NEWER, NEWER)])
def test_fields_that_a_receiver_does_not_know_change_nothing(
    requests: dict[str, Any], replies: dict[str, Any]
) -> None:
    """A newer server with older sites, newer sites with an older server."""
    run, usual = make_run(older_site(requests, replies)), make_run(small_client_app(CLIENTS))
    run.train()
    usual.train()
    assert not run.of(ClientRefused)
    assert not run.of(ClientFailed)
    assert same_bits(run.state.adapter, usual.state.adapter)
    measured = run.server.evaluate_clients(run.method, run.state)
    expected = usual.server.evaluate_clients(usual.method, usual.state)
    assert (measured.clients, measured.failures) == (expected.clients, {})


def test_a_feature_that_a_site_does_not_know_is_refused_with_a_sentence() -> None:
    with_feature = older_site({"requires": ["ring-attention"]}, {})
    app = small_client_app(CLIENTS, instead={1: with_feature})
    run = make_run(app, make_config(rounds=1))
    run.train()
    (failed,) = run.of(ClientFailed)
    assert failed.client == "site-1"
    assert failed.reason == (
        "does not know 'ring-attention', which this run uses: update prelort at the site"
    )
    assert run.of(RoundFinished)[0].stats.replies == 3


def test_a_site_that_does_not_know_the_rate_of_b_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prelort.federation.messages.FEATURES", frozenset())
    training = {"training": {"b_rate_ratio": 4.0}, "federation": {"clients_per_round": 4}}
    run = make_run(older_site({}, {}), check(training))
    with pytest.raises(QuorumError):
        run.train()
    assert {one.reason.split(",")[0] for one in run.of(ClientFailed)} == {
        "does not know 'b-rate-ratio'"
    }


@pytest.mark.parametrize("kind", [*KINDS, *KINDS.values()])
@pytest.mark.parametrize("protocol", [PROTOCOL - 1, PROTOCOL + 1, 0, -1, 10**30])
def test_another_protocol_is_refused_as_such_even_where_its_keys_differ(
    kind: type[Header], protocol: int
) -> None:
    content = with_header(wire.pack(kind.model_construct(protocol=protocol)), compression="zstd")
    with pytest.raises(UpdateRefused, match=f"^speaks protocol {protocol}, expected {PROTOCOL}$"):
        wire.header(content, kind)

"""Rounds with secure aggregation: equal to plain ones, through drop-outs, on every engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec

import prelort
from backends import in_this_process
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
from prelort.config import Config, check
from prelort.errors import ConfigError, QuorumError
from prelort.events import ClientFailed, ClientFinished, DimensionsLeftOut
from prelort.federation.content import blob_in, content_of, text_in
from prelort.federation.flower import Message, RecordDict
from prelort.secure import graph
from prelort.secure.signatures import Identity
from random_adapters import same_bits
from small_federation import clients_of, small_client_app

SECURE = {"secure_aggregation": True}


def make_config(rounds: int = 1, **privacy: Any) -> Config:
    federation = {"rounds": rounds, "clients_per_round": 1.0, "quorum": 0.3}
    return check({"federation": federation, "privacy": privacy})


@pytest.mark.parametrize("sparse", [False, True], ids=["everyone", "nearest"])
@pytest.mark.parametrize(
    "method, options",
    [
        ("prelort", {}),
        ("zero-padding", {}),
        ("replication", {"donors": "holders"}),
        ("fedhl", {}),
        ("homogeneous-min", {}),
    ],
)
def test_the_round_is_the_plain_one(
    method: str, options: dict[str, Any], sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sparse:
        monkeypatch.setattr(graph, "ALL", 4)
        monkeypatch.setattr(graph, "DEGREE", 4)
    plain = run_of(small_client_app(CLIENTS), make_config(2), method, options).train()
    run = run_of(masked_app(), make_config(2, **SECURE), method, options)
    assert distance(run.train().adapter, plain.adapter) < 1e-6
    assert distance(plain.adapter, run_of(masked_app(), make_config()).state.adapter) > 0.1
    assert len(run.of(ClientFinished)) == 14


def identities_of(keys: Sequence[ec.EllipticCurvePrivateKey]) -> list[Identity]:
    """One client for each key, who all know the first seven."""
    public = [key.public_key() for key in keys]
    names = [Identity(key, {}).fingerprint for key in keys]
    return [Identity(key, dict(zip(names[:7], public, strict=False))) for key in keys]


def test_clients_that_sign_mask_their_replies_with_each_other_alone() -> None:
    identities = identities_of([ec.generate_private_key(ec.SECP384R1()) for _ in range(8)])
    plain = run_of(small_client_app(CLIENTS), make_config()).train()
    run = run_of(masked_app(identities=identities), make_config(**SECURE))
    assert distance(run.train().adapter, plain.adapter) < 1e-6
    for stranger, reason in (
        (identities[7], "which this site's peers lack"),
        (None, "has not signed its keys"),
    ):
        others = [stranger, *identities[1:7]]
        run = run_of(masked_app(identities=others), make_config(**SECURE))
        with pytest.raises(QuorumError):
            run.train()
        reasons = {event.client: event.reason for event in run.of(ClientFailed)}
        assert all(reason in reasons[client.name] for client in CLIENTS[1:])


@pytest.mark.parametrize("action", ["keys", "shares", "train", "unmask"])
def test_a_client_that_drops_out_is_left_out(action: str) -> None:
    """One that does not reveal counts: its vector is in the sum."""
    gone = {(1, action): lost, (5, action): lost}
    run = run_of(masked_app(gone), make_config(**SECURE))
    left_out = {} if action == "unmask" else dict.fromkeys((1, 5), broken)
    plain = run_of(small_client_app(CLIENTS, instead=left_out), make_config())
    assert distance(run.train().adapter, plain.train().adapter) < 1e-6
    failures = {(event.client, event.reason) for event in run.of(ClientFailed)}
    expected = set() if action == "unmask" else {("site-1", "is gone"), ("site-5", "is gone")}
    assert failures == expected


@pytest.mark.parametrize("action", ["keys", "shares", "train", "unmask"])
def test_too_few_survivors_end_the_round_with_the_state_as_it_was(action: str) -> None:
    run = run_of(masked_app({(i, action): lost for i in range(1, 7)}), make_config(**SECURE))
    before = run.state.adapter
    with pytest.raises(QuorumError, match=r"privacy\.(threshold|min_holders)|usable replies"):
        run.train()
    assert same_bits(run.state.adapter, before)


@pytest.mark.parametrize("action", ["nobody", "keys", "shares", "train", "unmask"])
def test_with_noise_at_the_clients_the_round_is_that_of_equal_weights(action: str) -> None:
    gone, private = {(1, action): lost, (5, action): lost}, Noisy()
    run = run_of(masked_app(gone), make_config(**SECURE), private=private)
    left_out = {} if action in ("unmask", "nobody") else dict.fromkeys((1, 5), broken)
    equal = [replace(client, examples=9) for client in CLIENTS]
    plain = run_of(small_client_app(equal, instead=left_out), make_config())
    assert distance(run.train().adapter, plain.train().adapter) < 1e-5
    assert private.releases == 1
    assert all(math.isnan(event.loss) for event in run.of(ClientFinished))


def test_noise_at_the_clients_is_paid_for_before_a_sum_can_be_opened() -> None:
    for action, releases in (("train", 0), ("unmask", 1)):
        private = Noisy()
        app = masked_app({(i, action): lost for i in range(1, 7)})
        with pytest.raises(QuorumError):
            run_of(app, make_config(**SECURE), private=private).train()
        assert private.releases == releases


def test_more_clients_than_know_each_other_cannot_add_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graph, "ALL", 4)
    with pytest.raises(ConfigError, match="with up to 5 clients in a round, and not with 7"):
        run_of(masked_app(), make_config(**SECURE), private=Noisy()).train()


def replayed() -> Sabotage:
    """Replies in round 2 with what was sent in round 1."""
    seen: list[RecordDict] = []

    def again(content: RecordDict) -> RecordDict:
        seen.append(content)
        return seen[0]

    return again


def cut(content: RecordDict) -> RecordDict:
    return content_of(text_in(content) or "", (blob_in(content) or b"")[:-8])


@pytest.mark.parametrize(
    "action, sabotage, reason",
    [
        ("keys", replayed(), "answers for another session"),
        ("shares", replayed(), "answers for another session"),
        ("train", replayed(), "answers for round 1, expected 2"),
        ("keys", lambda content: content_of("{}"), "malformed KeysReply"),
        ("train", cut, "masked vector cannot be read"),
    ],
    ids=["keys again", "shares again", "vector again", "no keys", "cut"],
)
def test_a_message_that_is_not_the_clients_own_is_refused(
    action: str, sabotage: Sabotage, reason: str
) -> None:
    run = run_of(masked_app({(3, action): sabotage}), make_config(2, **SECURE))
    run.train()
    assert reason in run.of(ClientFailed)[0].reason
    assert {event.client for event in run.of(ClientFailed)} == {"site-3"}


def test_a_wrong_masked_vector_does_not_become_the_adapter() -> None:
    run = run_of(masked_app({(3, "train"): noise}), make_config(**SECURE))
    with pytest.raises(QuorumError, match="a client has sent a wrong masked vector"):
        run.train()


def test_rank_dimensions_with_few_holders_keep_their_values() -> None:
    """And the clients that hold them do not send them."""
    run = run_of(masked_app({(6, "keys"): lost}), make_config(**SECURE, min_holders=4))
    with pytest.raises(QuorumError, match="rank dimension 3 has 3 clients left"):
        run.train()
    config = check(
        {
            "seed": 1,  # of whose cohort three have rank 8
            "federation": {"rounds": 1, "clients_per_round": 6, "quorum": 1},
            "privacy": {**SECURE, "min_holders": 4},
        }
    )
    run = run_of(masked_app(), config)
    before = run.state.adapter.layers["model.q_proj"]
    after = run.train().adapter.layers["model.q_proj"]
    assert run.of(DimensionsLeftOut)[0].dimensions == (3, 4, 5, 6, 7, 8)
    assert torch.equal(after.A[2:], before.A[2:])
    assert float((after.A[:2] - before.A[:2]).abs().min()) > 0


@pytest.mark.parametrize(
    "method, reason",
    [
        ("hetlora", "needs single replies"),
        ("flexlora", "needs single replies"),
        ("replication", "needs single replies"),
        ("prelort-sorted", "needs single replies"),
        ("fed-plora", "needs layers of one rank"),
    ],
)
def test_a_method_that_needs_more_than_sums_is_refused(method: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        run_of(masked_app(), make_config(**SECURE), method).train()


def test_clients_of_a_rank_that_nobody_can_hide_are_refused() -> None:
    few = clients_of([2, 2, 2, 2, 2, 8, 8])
    with pytest.raises(ConfigError, match=r"2 of 7 clients train rank 8, so its sum would show"):
        run_of(masked_app(clients=few), make_config(**SECURE)).train()


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"privacy": SECURE, "robustness": {"rule": "median"}}, "a rule compares single changes"),
        ({"privacy": SECURE, "federation": {"clients_per_round": 2}}, "clients_per_round = 3 or"),
        ({"privacy": {**SECURE, "threshold": 0.5}}, "privacy.threshold = 0.5"),
    ],
)
def test_settings_that_give_no_protection_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check(values)


# With a model


@pytest.mark.parametrize(
    "method, changes",
    [
        ("prelort", {"federation": {"clients_per_batch": 6, "wire_dtype": "bfloat16"}}),
        ("ffa-lora", {}),
        ("rolora", {}),
        ("fed-plora", {}),
        ("fslora", {}),
        ("fedit", {"ranks": {"mix": "4*1"}}),
        ("fedsa-lora", {}),
    ],
)
def test_a_run_is_the_plain_one(
    method: str, changes: dict[str, Any], make_config: Callable[..., Config], tmp_path: Path
) -> None:
    federation = {"rounds": 2, "clients_per_round": 6} | changes.get("federation", {})
    config = make_config(
        **{
            "ranks": {"mix": "2, 2, 2, 8, 8, 8"},
            "training": {"optimizer": "sgd", "local_steps": 2, "learning_rate": 0.05},
            **changes,
            "federation": federation,
            "method": {"name": method},
        }
    )
    secure = config.model_copy(update={"privacy": check({"privacy": SECURE}).privacy})
    plain = prelort.run(config, tmp_path / "plain")
    masked = prelort.run(secure, tmp_path / "masked")
    assert distance(masked.global_adapter, plain.global_adapter) < 1e-5
    incidents = [event for event in masked.history.incidents if hasattr(event, "stats")]
    assert all("secure aggregation" in e.stats.diagnostics["failed"] for e in incidents)


def test_a_resumed_run_has_new_masks_and_the_same_adapter(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """The server is killed after a round of which no checkpoint was written."""
    config = make_config(
        ranks={"mix": "8*1"}, federation={"rounds": 2, "clients_per_round": 6}, privacy=SECURE
    )
    vectors: list[bytes] = []

    class Killed(BaseException):
        pass

    def train(name: str, number: int, usual: Callable[[], Message]) -> Message:
        reply = usual()
        if name == "site-0" and number == 2:
            vectors.append(blob_in(reply.content) or b"")
        if name == "site-5" and number == 2 and len(vectors) == 1:
            raise Killed
        return reply

    whole = prelort.run(config, tmp_path / "whole")
    with pytest.raises(Killed):
        prelort.run(config, tmp_path / "killed", backend=in_this_process(train))
    again = prelort.run(config, tmp_path / "killed", resume=True, backend=in_this_process(train))
    assert same_bits(again.global_adapter, whole.global_adapter)
    first, second = (np.frombuffer(v[-8000:], dtype=np.uint64) for v in vectors)
    assert not np.any(first == second)
    files = [path for path in (tmp_path / "killed").rglob("*") if path.is_file()]
    assert not any(b"mask_key" in path.read_bytes() for path in files)

"""The content of the messages that the server sends: requests to train and to evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prelort.config import Config
from prelort.errors import ConfigError
from prelort.federation import wire
from prelort.federation.flower import RecordDict
from prelort.federation.messages import (
    B_RATE_RATIO,
    MAGNITUDES,
    AdapterSpec,
    AtRank,
    Delivery,
    EvaluateRequest,
    TrainRequest,
)
from prelort.methods.interface import Broadcast, Client, Method, ServerState
from prelort.privacy.example import EXAMPLE_PRIVACY, example_privacy
from prelort.secure.messages import FEATURE, HIDDEN_RANKS, MaskedInput
from prelort.training.settings import LocalTraining


def train_request(
    config: Config,
    spec: AdapterSpec,
    method: Method,
    state: ServerState,
    client: Client,
    *,
    with_validation: bool,
    masked: MaskedInput | None = None,
) -> RecordDict:
    """A request to train what the method broadcasts to this client.

    ``masked``: how to mask the reply, if it is to be masked.
    """
    objective = method.objective(state, client)
    broadcast = method.broadcast(state, client)
    private = example_privacy(config.privacy)
    by_rank = _by_rank(config, method, state, client) if config.privacy.hide_ranks else {}
    features = {
        FEATURE: masked is not None,
        HIDDEN_RANKS: bool(by_rank),
        B_RATE_RATIO: config.training.b_rate_ratio != 1,
        EXAMPLE_PRIVACY: private is not None,
        MAGNITUDES: broadcast.magnitude_rate_ratio is not None,
    }
    request = TrainRequest(
        **dict(_delivery(config, spec, broadcast, state.round)),
        rounds=config.federation.rounds,
        seed=config.seed,
        training=_training(config, method, broadcast, broadcast.trainable.rank, spec.schema.rank),
        objective=objective.kind,
        levels=objective.levels,
        level_weights=objective.weights,
        tail=objective.tail,
        trains=broadcast.trains,
        with_validation=with_validation,
        timeout=config.federation.timeout,
        requires=tuple(name for name, used in features.items() if used),
        masked=masked,
        private=private,
        by_rank=by_rank,
    )
    without = wire.not_sent_down(request)
    return wire.pack(request, broadcast.trainable, broadcast.frozen, without=without)


def evaluate_request(
    config: Config,
    spec: AdapterSpec,
    broadcast: Broadcast,
    finished: int,
    prefixes: Sequence[int] = (),
) -> RecordDict:
    """A request to measure an adapter after ``finished`` rounds, and its prefixes (0: the base)."""
    settings = config.evaluation
    request = EvaluateRequest(
        **dict(_delivery(config, spec, broadcast, finished)),
        prefixes=tuple(prefixes),
        metrics=settings.metrics,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        max_generated=settings.max_generated,
    )
    without = wire.not_sent_down(request)
    return wire.pack(request, broadcast.trainable, broadcast.frozen, without=without)


def _delivery(
    config: Config, spec: AdapterSpec, broadcast: Broadcast, round_index: int
) -> Delivery:
    """What every request states about the adapter that comes with it."""
    return Delivery(
        **dict(spec.header(broadcast.trainable.rank)),
        dtype=config.federation.wire_dtype,
        round=round_index,
        seeded_factors=broadcast.seeded_factors,
        factor_seed=broadcast.factor_seed,
        personal=broadcast.personal,
        scale_multiplier=broadcast.scale_multiplier,
    )


def _by_rank(
    config: Config, method: Method, state: ServerState, client: Client
) -> dict[int, AtRank]:
    """What each rank up to the client's is asked to train; without those that train nothing."""
    broadcast, found = method.broadcast(state, client), {}
    for rank in range(1, client.rank + 1):
        try:
            objective = method.objective(state, replace(client, rank=rank))
        except ConfigError:
            continue
        found[rank] = AtRank(
            learning_rate=_training(config, method, broadcast, rank, client.rank).learning_rate,
            levels=objective.levels,
            level_weights=objective.weights,
        )
    return found


def _training(
    config: Config, method: Method, broadcast: Broadcast, rank: int, highest_rank: int
) -> LocalTraining:
    """The settings with the learning rates of a client of ``rank``.

    The factors' rate grows with highest rank / client's rank, to the power of the rank exponent; a
    head has no rank, so all clients share its rate.
    """
    training = config.training
    exponent = training.rank_exponent
    if exponent is None:
        exponent = float(getattr(method, "rank_exponent", 0.0))
    head = training.head_learning_rate or training.learning_rate
    rate = training.learning_rate * (highest_rank / rank) ** exponent
    return LocalTraining.of(
        training,
        learning_rate=rate,
        head_learning_rate=head,
        magnitude_rate_ratio=broadcast.magnitude_rate_ratio,
    )

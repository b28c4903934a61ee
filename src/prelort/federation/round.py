"""One round: its clients, their replies, its costs, and the state after it."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from prelort.config import Config, count_of
from prelort.errors import BudgetSpentError, PrelortError, QuorumError, UpdateRefused
from prelort.events import ClientFailed, ClientFinished, Listener, RoundSeconds, RoundStats
from prelort.federation import wire
from prelort.federation.flower import Message
from prelort.federation.messages import AdapterSpec, TrainReply
from prelort.federation.reorder_buffer import ReorderBuffer
from prelort.federation.replies import checked_update
from prelort.methods.calls import calling, expect
from prelort.methods.interface import (
    Aggregator,
    Broadcast,
    Client,
    Method,
    RoundObserver,
    ServerState,
    Update,
)
from prelort.methods.objective import Objective
from prelort.privacy.example import SPENT
from prelort.secure.messages import MaskedInput
from prelort.training.batches import batches_per_round


class Round:
    """One attempt at a round.

    ``clients``: the cohort, each client at its current rank. Replies are aggregated as they arrive,
    but in the clients' order, so that the result has the same bits whoever replies first. An
    unusable reply is left out, with an event.
    """

    def __init__(
        self,
        number: int,
        method: Method,
        state: ServerState,
        clients: Sequence[Client],
        *,
        config: Config,
        spec: AdapterSpec,
        log: Listener,
        aggregator: Aggregator | None = None,
        observer: RoundObserver | None = None,
    ) -> None:
        """``aggregator``: in place of the method's own."""
        self.number = number
        self.clients = list(clients)
        self._bytes_down = 0
        self._method = method
        self._state = state
        self._config = config
        self._spec = spec
        self._log = log
        self._observer = observer
        with calling(method, "aggregator()"):
            self._aggregator = aggregator or method.aggregator(state)
        self._buffer = ReorderBuffer([client.name for client in clients], self._aggregate)
        self._started = time.monotonic()
        self._aggregating = 0.0
        self._replies: dict[str, TrainReply] = {}
        self._bytes_up = 0
        self.failures: dict[str, str] = {}
        """Client -> why it gave no usable reply."""

    def count_sent(self, size: int) -> None:
        """Count a request of ``size`` bytes."""
        self._bytes_down += size

    def prepare(self) -> None:
        """What comes before the requests to train: nothing, where replies are not masked."""

    def masked(self, client: Client) -> MaskedInput | None:
        """How the client is to mask its reply; None: not at all."""
        return None

    def receive(self, client: Client, reply: Message) -> None:
        """Check one client's reply; aggregate it, or leave it out with the reason."""
        broadcast = self._method.broadcast(self._state, client)
        objective = self._method.objective(self._state, client)
        try:
            head, update = self._checked(client, reply, broadcast, objective)
        except UpdateRefused as error:
            self.fail(client, str(error))
            return
        size = wire.size(reply.content)
        self._bytes_up += size
        self._replies[client.name] = head
        batches = batches_per_round(head.examples, self._config.training)
        self._log(
            ClientFinished(
                self.number,
                client=client.name,
                rank=self._stated_rank(client),
                loss=math.nan if head.loss is None else head.loss,
                examples=head.examples,
                steps=head.steps,
                passes=batches * objective.passes_per_batch,
                seconds=head.seconds,
                bytes_up=size,
                validation_loss=head.validation_loss,
            )
        )
        if update is not None:
            if self._observer is not None:
                self._observer.add(broadcast, update)
            self._buffer.put(client.name, update)

    def fail(self, client: Client, reason: str) -> None:
        """Leave a client out of the round."""
        self.failures[client.name] = reason
        self._log(ClientFailed(self.number, client.name, self._stated_rank(client), reason))
        self._buffer.skip(client.name)

    def _checked(
        self, client: Client, reply: Message, broadcast: Broadcast, objective: Objective
    ) -> tuple[TrainReply, Update | None]:
        """The reply's header and its update, None where single updates are hidden.

        Raises `UpdateRefused` for a reply that cannot be used.
        """
        update, head = checked_update(
            reply,
            client,
            self._state.round,
            self._spec,
            self._config.federation,
            broadcast,
            may_prune=objective.tail is not None,
            states_loss=not self._config.privacy.of_examples,
        )
        return head, update

    def complete(self) -> None:
        """Raise `QuorumError` if too few replies are usable."""
        quorum, cohort = self._config.federation.quorum, len(self.clients)
        # A random cohort may be smaller than a quorum that is a number.
        needed = min(count_of(quorum, cohort), cohort)
        if len(self._replies) < needed:
            reasons = [f"{name}: {reason}" for name, reason in self.failures.items()]
            spent = not self._replies and all(
                reason.startswith(SPENT) for reason in self.failures.values()
            )
            raise (BudgetSpentError if spent else QuorumError)(
                f"round {self.number} has {len(self._replies)} usable replies of {cohort}, but "
                f"federation.quorum = {quorum} needs {needed}; the global adapter is as it was "
                f"after round {self.number - 1} ({'; '.join(reasons[:3])})"
            )

    def finish(self, ranks: dict[str, int]) -> tuple[ServerState, RoundStats]:
        """The state after the round; ``ranks`` are those that differ from the clients' own."""
        started = time.monotonic()
        with calling(self._method, "its aggregator's result()"):
            after = self._aggregator.result()
        after = expect(self._method, "its aggregator's result()", after, ServerState)
        after = replace(after, round=self.number, ranks=ranks, levels=self._state.levels)
        for name, tensor in after.adapter.tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise PrelortError(
                    f"method {self._method.name!r} made tensor {name!r} of the global adapter not "
                    f"finite in round {self.number}; the adapter is as it was before the round"
                )
        self._aggregating += time.monotonic() - started
        diagnostics = self._observer.result(after) if self._observer is not None else None
        diagnosing = self._observer.seconds if self._observer is not None else 0.0
        total = time.monotonic() - self._started
        heads = self._replies.values()
        stats = RoundStats(
            replies=len(heads),
            failures=len(self.failures),
            loss=_mean_loss(heads),
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
            seconds=RoundSeconds(
                train=total - self._aggregating - diagnosing,
                aggregate=self._aggregating,
                diagnose=diagnosing,
            ),
            diagnostics=diagnostics or None,
            epsilon=max((e for head in heads if (e := head.epsilon) is not None), default=None),
        )
        return after, stats

    def offered_ranks(self) -> dict[str, int]:
        """Client -> the rank that it offers from the next round on, if it offers one."""
        offers = {name: head.next_rank for name, head in self._replies.items()}
        return {name: rank for name, rank in offers.items() if rank is not None}

    def validation_losses(self) -> dict[str, float]:
        """Client -> its loss on its validation rows, if it was requested."""
        losses = {name: head.validation_loss for name, head in self._replies.items()}
        return {name: loss for name, loss in losses.items() if loss is not None}

    def _stated_rank(self, client: Client) -> int | None:
        """The client's rank; None where it is hidden."""
        return None if self._config.privacy.hide_ranks else client.rank

    def _aggregate(self, update: Update) -> None:
        started = time.monotonic()
        with calling(self._method, "its aggregator's add()"):
            self._aggregator.add(update)
        self._aggregating += time.monotonic() - started


def _mean_loss(heads: Collection[TrainReply]) -> float:
    """The training loss over all examples; not a number where clients do not state theirs."""
    losses = [math.nan if head.loss is None else head.loss * head.examples for head in heads]
    return sum(losses) / max(sum(head.examples for head in heads), 1)

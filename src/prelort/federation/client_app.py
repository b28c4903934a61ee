"""The Flower `ClientApp`: four kinds of messages, each answered by the same function.

The messages of secure aggregation are answered here, and replies masked: the secrets are in the
context of Flower's node, which outlives its processes, and never where the client trains.

Imports no torch: in a deployment Flower starts a process for every message, which must be quick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from prelort.errors import PrelortError
from prelort.federation import masking
from prelort.federation.content import content_of, text_in
from prelort.federation.flower import ClientApp, Context, Error, Message, Mod, RecordDict
from prelort.secure.signatures import Identity

REFUSED = 100
"""The error code of a client's refusal, which has a reason (Flower's own codes are lower)."""

Kind = Literal["query", "train", "evaluate", "end"]
Answer = Callable[[Kind, RecordDict, Context], RecordDict]
"""From a message's kind, content and context to the content of the reply."""
Handler = Callable[[Message, Context], Message]


def client_app(
    answer: Answer,
    mods: Sequence[Mod] = (),
    identity_of: Callable[[Context], Identity | None] = lambda context: None,
) -> ClientApp:
    """A `ClientApp` that states its properties (query), trains and evaluates.

    query.end: a run over real sites has ended. query.keys, query.shares, query.count,
    query.unmask: secure aggregation. The message of a `PrelortError` that ``answer`` raises is sent
    to the server.
    ``mods``: Flower's, around every message. ``identity_of``: what the client signs its keys with.
    """
    app = ClientApp(mods=list(mods))

    def of_kind(kind: Kind) -> Handler:
        return handler(lambda content, context: answer(kind, content, context))

    def train(content: RecordDict, context: Context) -> RecordDict:
        return masking.masked(content, answer("train", content, context), context.state)

    def query(content: RecordDict, context: Context) -> RecordDict:
        return masking.properties(content, answer("query", content, context), context.state)

    app.query()(handler(query))
    app.query("end")(of_kind("end"))
    app.train()(handler(train))
    app.evaluate()(of_kind("evaluate"))
    for action, step in masking.STEPS.items():
        app.query(action)(handler(partial(_in_step, step, identity_of)))
    return app


def handler(reply: Callable[[RecordDict, Context], RecordDict]) -> Handler:
    """Answers a message with a reply's content, or with the reason of a `PrelortError`."""

    def handle(message: Message, context: Context) -> Message:
        try:
            return Message(reply(message.content, context), reply_to=message)
        except PrelortError as error:
            return Message(Error(REFUSED, str(error)), reply_to=message)

    return handle


def _in_step(
    step: masking.Step,
    identity_of: Callable[[Context], Identity | None],
    content: RecordDict,
    context: Context,
) -> RecordDict:
    reply = step(text_in(content) or "", context.state, identity_of(context))
    return content_of(reply.text())

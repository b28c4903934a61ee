"""The Flower `ClientApp`: four kinds of messages, each answered by the same function.

Imports no torch: in a deployment Flower starts a process for every message, which must be quick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from prelort.errors import PrelortError
from prelort.federation.flower import ClientApp, Context, Error, Message, Mod, RecordDict

REFUSED = 100
"""The error code of a client's refusal, which has a reason (Flower's own codes are lower)."""

Kind = Literal["query", "train", "evaluate", "end"]
Answer = Callable[[Kind, RecordDict, Context], RecordDict]
"""From a message's kind, content and context to the content of the reply."""


def client_app(answer: Answer, mods: Sequence[Mod] = ()) -> ClientApp:
    """A `ClientApp` that states its properties (query), trains and evaluates.

    query.end: a run over real sites has ended. The message of a `PrelortError` that ``answer``
    raises is sent to the server. ``mods``: Flower's, around every message.
    """
    app = ClientApp(mods=list(mods))

    def reply(kind: Kind, message: Message, context: Context) -> Message:
        try:
            return Message(answer(kind, message.content, context), reply_to=message)
        except PrelortError as error:
            return Message(Error(REFUSED, str(error)), reply_to=message)

    @app.query()  # type: ignore[untyped-decorator]
    def properties(message: Message, context: Context) -> Message:
        return reply("query", message, context)

    @app.query("end")  # type: ignore[untyped-decorator]
    def end(message: Message, context: Context) -> Message:
        return reply("end", message, context)

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        return reply("train", message, context)

    @app.evaluate()  # type: ignore[untyped-decorator]
    def evaluate(message: Message, context: Context) -> Message:
        return reply("evaluate", message, context)

    return app

"""A site's Flower `ClientApp`: it hands each message to the site's trainer.

Flower starts a process for every message, so nothing heavy is imported here: the trainer has
torch, the base model and the data ready.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from prelort.deployment import settings, trainer_client
from prelort.deployment.ipc import Order
from prelort.errors import PrelortError
from prelort.federation.client_app import Kind, client_app
from prelort.federation.content import blob_in, content_of, text_in
from prelort.federation.flower import ClientApp, Context, RecordDict


def site_app(federation: Path) -> ClientApp:
    """The app of a federation whose configuration is in this file.

    Which site it is stands in the SuperNode's ``--node-config 'site="/path/to/site.toml"'``.
    """

    def answer(kind: Kind, content: RecordDict, context: Context) -> RecordDict:
        overrides = tuple(shlex.split(str(context.run_config.get("set", ""))))
        text = text_in(content)
        if text is None:
            raise PrelortError("was sent a message without a header")
        order = Order(kind, str(federation), overrides, text, blob_in(content))
        site_file = _site_file(context)
        own = settings.read_quietly(site_file)
        if kind == "end":
            trainer_client.end(site_file)
            return content_of("{}")
        if own.trainer.warm:
            reply = trainer_client.ask(site_file, own, order)
        else:
            from prelort.deployment.worker import Worker

            reply = Worker(site_file).answer(order)
        if reply.refused is not None:
            raise PrelortError(reply.refused)
        return content_of(reply.text, reply.blob)

    return client_app(answer)


def _site_file(context: Context) -> Path:
    named = context.node_config.get("site")
    if not named:
        raise PrelortError(
            "has no site file: start the SuperNode with --node-config 'site=\"/path/site.toml\"'"
        )
    return Path(str(named)).expanduser()

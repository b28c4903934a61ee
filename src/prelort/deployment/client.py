"""A site's Flower `ClientApp`: it forwards each message to the site's trainer.

Flower starts a process for every message, so nothing heavy is imported here: the trainer keeps
torch, the base model and the data loaded.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from prelort.deployment import settings, trainer_client
from prelort.deployment.ipc import Request
from prelort.errors import PrelortError
from prelort.federation import masking
from prelort.federation.client_app import Kind, client_app
from prelort.federation.content import blob_in, content_of, text_in
from prelort.federation.flower import ClientApp, Context, Mod, RecordDict
from prelort.secure.signatures import Identity


def site_app(federation: Path, mods: Sequence[Mod] = ()) -> ClientApp:
    """The app of the federation with this configuration file.

    The SuperNode's ``--node-config 'site="/path/to/site.toml"'`` names the site. A node of
    Flower's simulation has none, and is dealt a client of the configured data. ``mods``: Flower's,
    around every message.
    """

    def answer(kind: Kind, content: RecordDict, context: Context) -> RecordDict:
        overrides = tuple(shlex.split(str(context.run_config.get("set", ""))))
        if "site" not in context.node_config and "partition-id" in context.node_config:
            return _simulated(federation, overrides, kind, content, context)
        text = text_in(content)
        if text is None:
            raise PrelortError("received a message without a header")
        request = Request(kind, str(federation), overrides, text, blob_in(content))
        site_file = _site_file(context)
        site, _ = settings.read_for_reply(site_file)
        if kind == "end":
            trainer_client.end(site_file)
            return content_of("{}")
        if kind == "train" and site.masked_only and masking.input_of(text) is None:
            raise PrelortError(
                "sends masked replies only (masked_only in its site.toml): set "
                "privacy.secure_aggregation = true"
            )
        if site.trainer.warm:
            reply = trainer_client.send(site_file, site, request)
        else:
            from prelort.deployment.worker import Worker

            reply = Worker(site_file).answer(request)
        if reply.refused is not None:
            raise PrelortError(reply.refused)
        return content_of(reply.text, reply.blob)

    return client_app(answer, mods, _identity)


def _simulated(
    federation: Path, overrides: tuple[str, ...], kind: Kind, content: RecordDict, context: Context
) -> RecordDict:
    from prelort import config as configuration
    from prelort.experiment.simulation import respond_simulated

    config = configuration.load(federation, overrides)
    if config.data.source == configuration.SITES:
        raise PrelortError(
            "is simulated and has no data of its own: --run-config 'set=\"data.source=...\"' names "
            "data to deal"
        )
    folder = Path(str(context.run_config["run"])).expanduser()
    return respond_simulated(config, folder, kind, content, context)


def _identity(context: Context) -> Identity | None:
    """What the site signs with; a node of Flower's simulation has nothing."""
    if "site" not in context.node_config:
        return None
    return settings.read_for_reply(_site_file(context))[1]


def _site_file(context: Context) -> Path:
    path = context.node_config.get("site")
    if not path:
        raise PrelortError(
            "has no site file: start the SuperNode with --node-config 'site=\"/path/site.toml\"'"
        )
    return Path(str(path)).expanduser()

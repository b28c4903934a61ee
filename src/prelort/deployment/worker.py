"""The replies of one site to the server; base model and data stay loaded between them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from prelort import config as configuration
from prelort.config import Config
from prelort.data import ranks
from prelort.deployment import settings
from prelort.deployment.ipc import Reply, Request
from prelort.deployment.settings import SiteSettings
from prelort.errors import AdapterError, ConfigError, PrelortError, UpdateRefused
from prelort.experiment.at_sites import dealt_site, own_site
from prelort.experiment.deterministic import deterministic
from prelort.federation.client import LocalClient, respond
from prelort.federation.client_app import Kind
from prelort.federation.content import blob_in, content_of, text_in
from prelort.training.processes import ALONE, Processes

log = logging.getLogger("prelort.trainer")

MARGIN = 0.25
"""The share of a site's memory that ``rank = "auto"`` leaves free."""

_ABOUT_THE_SERVER = (PrelortError, UpdateRefused, AdapterError)
"""Errors of exactly these types concern the server's message or the training."""


class Worker:
    """One site in this process, loaded with its first message.

    It is loaded again when the federation's configuration or the site's file has changed.
    """

    def __init__(self, site_file: Path, processes: Processes = ALONE) -> None:
        """``processes``: those that answer together; each has a worker for the same file."""
        self._file = site_file
        self._processes = processes
        self._loaded_from: tuple[Config, SiteSettings] | None = None
        self._client: LocalClient

    def answer(self, request: Request, cancelled: Callable[[], bool] = lambda: False) -> Reply:
        """The reply to a request; errors at the site are described in general words only.

        The log has the details: they may contain paths, column names, or parts of the data.
        """
        try:
            config = configuration.load(request.federation, request.overrides)
            with deterministic(config.threads):
                client = replace(self._loaded_everywhere(config), stopped=cancelled)
                kind: Kind = request.kind  # type: ignore[assignment]
                content = respond(client, kind, content_of(request.text, request.blob))
            return Reply(text_in(content) or "", blob_in(content))
        except PrelortError as error:
            log.exception("cannot answer")
            if type(error) in _ABOUT_THE_SERVER:
                return Reply(refused=str(error))
            return Reply(refused=f"cannot take part ({type(error).__name__}): its log says why")
        except Exception as error:  # the server learns that it failed, not why
            log.exception("failed")
            if self._processes.count > 1:
                # The others may wait for this one: all end, and start again. No OSError, which is
                # taken for a closed connection.
                raise RuntimeError("one of the trainer's processes failed") from error
            return Reply(refused=f"failed ({type(error).__name__}): its log says why")

    def _loaded_everywhere(self, config: Config) -> LocalClient:
        """The site's client, of the largest rank that all processes have memory for."""
        try:
            client = self._loaded(config)
        except PrelortError:
            self._processes.all_reduce_min(0)
            raise
        max_rank = self._processes.all_reduce_min(max(client.max_rank, client.rank))
        if max_rank == 0:
            raise ConfigError("another of the trainer's processes cannot load the site")
        return replace(client, rank=min(client.rank, max_rank), max_rank=max_rank)

    def _loaded(self, config: Config) -> LocalClient:
        site = settings.read(self._file)
        if self._loaded_from != (config, site):
            self._loaded_from = None
            self._client = make_client(config, site, self._file, self._processes)
            self._loaded_from = (config, site)
        return self._client


def make_client(
    config: Config, site: SiteSettings, file: Path, processes: Processes = ALONE
) -> LocalClient:
    """The client that a site's file describes. Raises `ConfigError`."""
    config = site.applied_to(config, file)
    if processes.device:
        model = config.model.model_copy(update={"device": processes.device})
        config = config.model_copy(update={"model": model})
    rank = site.rank
    if rank == "auto":
        if processes.split is not None:
            raise ConfigError("rank = 'auto' does not know what FSDP saves: set the site's rank")
        rank = _largest_rank(config, site)
    folder = site.state_folder(file)
    if site.partition is not None:
        client = dealt_site(config, site.partition, rank, folder, processes)
    else:
        if site.name is None or rank is None:
            raise AssertionError("settings without a partition have a name and a rank")
        client = own_site(config, site.name, rank, folder, processes)
    if site.privacy is None or client.ledger is None:
        return client
    limit = site.privacy.epsilon, site.privacy.delta
    return replace(client, ledger=replace(client.ledger, limit=limit))


def _largest_rank(config: Config, site: SiteSettings) -> int:
    """The largest rank that fits the site's memory, at most the federation's."""
    from prelort.planning import measured, memory, sizes

    if site.memory is not None:
        budget = sizes.parse(site.memory)
    else:
        budget, _ = measured.free_memory(config.model.device)
    # The estimate does not include loading, evaluation and the allocator's overhead.
    max_rank = max(ranks.levels(config.ranks.mix))
    rank = memory.largest_rank(config, int(budget * (1 - MARGIN)), max_rank)
    log.info("rank %d is the largest that fits %s", rank, sizes.show(budget))
    return rank

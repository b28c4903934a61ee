"""Answering the server for one site; the base model and the data stay loaded in between."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from prelort import config as configuration
from prelort.config import Config
from prelort.data import ranks
from prelort.deployment import settings
from prelort.deployment.ipc import Order, Reply
from prelort.deployment.settings import SiteSettings
from prelort.errors import AdapterError, PrelortError, UpdateRefused
from prelort.experiment.at_sites import dealt_site, own_site
from prelort.experiment.deterministic import deterministic
from prelort.federation.client import LocalClient, respond
from prelort.federation.client_app import Kind
from prelort.federation.content import blob_in, content_of, text_in

log = logging.getLogger("prelort.trainer")

MARGIN = 0.25
"""The share of a site's memory that ``rank = "auto"`` leaves free."""

_ABOUT_THE_SERVER = (PrelortError, UpdateRefused, AdapterError)
"""Errors of these very kinds speak of what the server sent, or of the training."""


class Worker:
    """One site in this process, made when the first message comes.

    It is made anew when the federation's configuration or the site's own file has changed.
    """

    def __init__(self, site_file: Path) -> None:
        self._file = site_file
        self._made_from: tuple[Config, SiteSettings] | None = None
        self._site: LocalClient

    def answer(self, order: Order, stopped: Callable[[], bool] = lambda: False) -> Reply:
        """The reply to a message; what goes wrong at the site is told in general words only.

        Its log has the details: they may hold paths, names of columns, or pieces of the data.
        """
        try:
            config = configuration.load(order.federation, order.overrides)
            with deterministic(config.threads):
                site = replace(self._prepared(config), stopped=stopped)
                kind: Kind = order.kind  # type: ignore[assignment]
                content = respond(site, kind, content_of(order.text, order.blob))
            return Reply(text_in(content) or "", blob_in(content))
        except PrelortError as error:
            log.exception("cannot answer")
            if type(error) in _ABOUT_THE_SERVER:
                return Reply(refused=str(error))
            return Reply(refused=f"cannot take part ({type(error).__name__}): its log says why")
        except Exception as error:  # the server learns that it failed, and not from which row
            log.exception("failed")
            return Reply(refused=f"failed ({type(error).__name__}): its log says why")

    def _prepared(self, config: Config) -> LocalClient:
        own = settings.read(self._file)
        if self._made_from != (config, own):
            self._made_from = None
            self._site = make_site(config, own, self._file)
            self._made_from = (config, own)
        return self._site


def make_site(config: Config, own: SiteSettings, file: Path) -> LocalClient:
    """The site that a file describes. Raises `ConfigError`."""
    config = own.applied_to(config, file)
    rank = own.rank
    if rank == "auto":
        rank = _largest_rank(config, own)
    folder = own.state_folder(file)
    if own.partition is not None:
        return dealt_site(config, own.partition, rank, folder)
    if own.name is None or rank is None:
        raise AssertionError("the settings are checked when they are read")
    return own_site(config, own.name, rank, folder)


def _largest_rank(config: Config, own: SiteSettings) -> int:
    """The largest rank that fits the site's memory, at most the federation's."""
    from prelort.planning import measured, memory, sizes

    if own.memory is not None:
        budget = sizes.parse(own.memory)
    else:
        budget, _ = measured.free_memory(config.model.device)
    # What loading, evaluation and the allocator take beside is not in the estimate.
    max_rank = max(ranks.levels(config.ranks.mix))
    rank = memory.largest_rank(config, int(budget * (1 - MARGIN)), max_rank)
    log.info("rank %d is the largest that fits %s", rank, sizes.show(budget))
    return rank

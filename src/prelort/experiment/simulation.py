"""A run on Flower's simulation: clients are trained by Ray's workers, several at a time.

The same configuration, server and client as in this process, and the same adapters, at the price
of Ray's overhead: of use where one machine has more cores or GPUs than one client can fill.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import torch

from prelort import config as configuration
from prelort.config import Config
from prelort.errors import ConfigError
from prelort.experiment.assemble import Assembly, assemble
from prelort.experiment.deterministic import deterministic
from prelort.experiment.stage import Stage, with_all_data
from prelort.federation.client import respond
from prelort.federation.client_app import Kind, client_app
from prelort.federation.flower import ClientApp, Context, RecordDict, simulate
from prelort.federation.server import ServerPlan, make_server_app
from prelort.federation.transport import Engine


def simulated(config: Config, folder: Path, cpus: int = 1, gpus: float = 0.0) -> Stage:
    """All clients on this machine, in Ray's workers of so many CPU cores and (shares of) GPUs."""
    assembly = assemble(config, folder)
    count = len(assembly.sites)

    def carry_out(plan: ServerPlan) -> None:
        server_app = make_server_app(
            plan, lambda grid: Engine(grid, None, float("inf"), nodes=count)
        )
        simulate(server_app, _client_app(config, folder), count, cpus=cpus, gpus=gpus)

    return with_all_data(assembly, carry_out)


def check_installed() -> None:
    """Raise `ConfigError` where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--engine simulation needs Ray: pip install 'prelort[simulation]'")


def _client_app(config: Config, folder: Path) -> ClientApp:
    """A `ClientApp` that can be sent to another process: it holds text and no models."""
    settings = json.dumps(config.model_dump(mode="json"))
    where = str(folder.resolve())
    threads = config.threads or torch.get_num_threads()

    def answer(kind: Kind, content: RecordDict, context: Context) -> RecordDict:
        with deterministic(threads):
            sites = _assembly(settings, where).sites
            return respond(sites[int(context.node_config["partition-id"])], kind, content)

    return client_app(answer)


@functools.lru_cache(maxsize=1)
def _assembly(settings: str, folder: str) -> Assembly:
    """One for each worker process, whichever clients it trains."""
    return assemble(configuration.check(json.loads(settings)), Path(folder))

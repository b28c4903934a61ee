"""A run on Flower's simulation: clients are trained by Ray's workers, several at a time.

Configuration, server, client and adapters are the same as in one process. Ray has its overhead, and
pays where a machine has more cores or GPUs than one client can use.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from prelort import config as configuration
from prelort.config import Config
from prelort.errors import ConfigError
from prelort.experiment.assemble import Assembly, assemble, preflight
from prelort.experiment.backend import Backend, with_all_data
from prelort.experiment.deterministic import deterministic
from prelort.experiment.folder import RunFolder
from prelort.experiment.result import RunResult
from prelort.experiment.run import run
from prelort.federation.client import respond
from prelort.federation.client_app import Kind, client_app
from prelort.federation.flower import (
    ClientApp,
    Context,
    Grid,
    RecordDict,
    ServerApp,
    simulate,
)
from prelort.federation.transport import Transport


def run_simulated(
    config: Config, out: Path | str, *, cpus: int = 1, gpus: float = 0.0, **options: Any
) -> RunResult:
    """`run` within Flower's simulation; ``cpus`` and (shares of) ``gpus`` are those of a client.

    ``options`` are those of `run`, except for ``backend``. Raises what `run` raises, and
    `ConfigError` where Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--engine simulation needs Ray: pip install 'prelort[simulation]'")
    folder = Path(out)
    if not options.get("resume"):
        RunFolder(folder).check_free()  # before the data are read and the model is loaded
    with deterministic(config.threads):
        assembly = assemble(config, folder)
        preflight(assembly)
    count = len(assembly.clients)
    server_app, results = ServerApp(), []

    @server_app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        @contextmanager
        def backend(config: Config, folder: Path) -> Iterator[Backend]:
            yield with_all_data(assembly, Transport(grid, nodes=count))

        results.append(run(config, folder, backend=backend, **options))

    simulate(server_app, _client_app(config, folder), count, cpus=cpus, gpus=gpus)
    result: RunResult = results[0]
    return result


def respond_simulated(
    config: Config, folder: Path, kind: Kind, content: RecordDict, context: Context
) -> RecordDict:
    """The reply of a simulated node: the client of its number. Raises `ConfigError`."""
    settings = json.dumps(config.model_dump(mode="json"))
    with deterministic(config.threads):
        clients = _assembly(settings, str(folder.resolve())).clients
        number = int(context.node_config["partition-id"])
        if number >= len(clients):
            raise ConfigError(f"is one too many: the data are dealt to {len(clients)} clients")
        return respond(clients[number], kind, content)


def _client_app(config: Config, folder: Path) -> ClientApp:
    """A `ClientApp` that can be sent to another process: it holds text and no models."""
    config = config.model_copy(update={"threads": config.threads or torch.get_num_threads()})

    def answer(kind: Kind, content: RecordDict, context: Context) -> RecordDict:
        return respond_simulated(config, folder, kind, content, context)

    return client_app(answer)


@functools.lru_cache(maxsize=1)
def _assembly(settings: str, folder: str) -> Assembly:
    """One for each worker process, whichever clients it trains."""
    return assemble(configuration.check(json.loads(settings)), Path(folder))

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import LAST, Killer

from prelort.config import Config, to_toml


@pytest.fixture(scope="session")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    killer = Killer(tmp_path_factory.mktemp("killer"))
    yield killer
    killer.process.kill()
    killer.process.communicate()


@pytest.fixture(scope="session")
def config_file(
    tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Config]
) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.toml"
    config = make_config(
        federation={"rounds": LAST, "clients_per_round": 3},
        evaluation={"every": 2},
        # Draws of all kinds: batches, truncations, dropout.
        lora={"dropout": 0.1},
        training={"local_steps": 2, "batch_size": 4},
    )
    path.write_text(to_toml(config))
    return path


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, killer: Killer, config_file: Path
) -> Path:
    """The folder of a run that was never killed."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    killer.finish(config_file, out, resume=False)
    return out

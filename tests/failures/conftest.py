from collections.abc import Callable
from pathlib import Path

import pytest

from prelort.config import Config, to_toml


@pytest.fixture(scope="session")
def config_file(
    tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Config]
) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(to_toml(make_config(federation={"rounds": 2, "clients_per_round": 3})))
    return path


@pytest.fixture(scope="session")
def classification_file(
    tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Config], tiny_bert: Path
) -> Path:
    path = tmp_path_factory.mktemp("config") / "classification.toml"
    config = make_config(
        task="classification",
        model={"name": str(tiny_bert)},
        federation={"rounds": 1, "clients_per_round": 2},
    )
    path.write_text(to_toml(config))
    return path

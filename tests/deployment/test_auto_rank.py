"""``rank = "auto"`` at a site: the largest rank that fits its memory."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from prelort.config import Config, check
from prelort.deployment import settings
from prelort.deployment.worker import MARGIN, make_client
from prelort.errors import ConfigError
from prelort.federation.client import LocalClient
from prelort.planning import memory


@pytest.fixture
def config(tiny_llama: Path) -> Config:
    return check(
        {
            "threads": 1,
            "model": {"name": str(tiny_llama), "device": "cpu"},
            "data": {"source": "sites", "text_column": "text", "max_length": 16},
            "ranks": {"mix": "2, 12"},
            "method": {"objective": "plain"},
        }
    )


def site_of(config: Config, folder: Path, **values: Any) -> LocalClient:
    (folder / "rows.jsonl").write_text('{"text": "one two three four five six seven"}\n' * 8)
    file = folder / "site.toml"
    own = {"name": "a", "rank": "auto", "data": {"source": "./rows.jsonl"}, **values}
    file.write_text(tomli_w.dumps(own))
    return make_client(config, settings.read(file), file)


def test_it_is_the_largest_that_fits(config: Config, tmp_path: Path) -> None:
    budget = int(memory.Planner(config).exact(9).total / (1 - MARGIN)) + 2
    site = site_of(config, tmp_path, memory=f"{budget} B")
    assert (site.rank, site.max_rank) == (9, 9)


def test_by_default_the_free_memory_counts_up_to_the_highest_rank(
    config: Config, tmp_path: Path
) -> None:
    assert site_of(config, tmp_path).rank == 12


def test_too_little_memory_is_one_sentence(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not even rank 1 fits"):
        site_of(config, tmp_path, memory="20kiB")

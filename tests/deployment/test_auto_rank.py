"""``rank = "auto"`` at a site: the largest rank that fits its memory, and no larger one."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from prelort.config import Config, check
from prelort.deployment import settings
from prelort.deployment.worker import MARGIN, make_client
from prelort.errors import ConfigError
from prelort.federation.client import LocalClient
from prelort.planning import measured, memory

CONFIG = check(
    {
        "threads": 1,
        "data": {"source": "sites", "text_column": "text", "max_length": 16},
        "ranks": {"mix": "2, 24"},
        "method": {"objective": "plain"},
    }
)


def site_of(folder: Path, **values: Any) -> LocalClient:
    (folder / "rows.jsonl").write_text('{"text": "one two three four five six seven"}\n' * 8)
    file = folder / "site.toml"
    own = {"name": "a", "rank": "auto", "data": {"source": "./rows.jsonl"}, **values}
    file.write_text(tomli_w.dumps(own))
    return make_client(CONFIG, settings.read(file), file)


def fitting(config: Config, rank: int) -> int:
    """Bytes of which, less the margin, exactly this rank fits."""
    return int(memory.estimate(config, rank).total / (1 - MARGIN)) + 2


def test_it_is_the_largest_that_fits(tmp_path: Path) -> None:
    site = site_of(tmp_path, memory=f"{fitting(CONFIG, 9)} B")
    assert (site.rank, site.max_rank) == (9, 9)


def test_it_is_not_above_the_federations(tmp_path: Path) -> None:
    assert site_of(tmp_path, memory="1TiB").rank == 24


def test_without_a_budget_what_is_free_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = (fitting(CONFIG, 5), "this machine")
    monkeypatch.setattr(measured, "free_memory", lambda device: free)
    assert site_of(tmp_path).rank == 5


def test_where_not_even_one_fits_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank 1"):
        site_of(tmp_path, memory="1MiB")

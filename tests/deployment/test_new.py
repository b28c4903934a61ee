import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from prelort import config as configuration
from prelort.deployment import settings
from prelort.deployment.new import create
from prelort.errors import ConfigError

APP_BYTES = 10 * 2**20
"""Flower's limit for an app."""


def test_it_writes_an_app_scripts_and_sites(tmp_path: Path) -> None:
    path = tmp_path / "my-federation"
    create(path, 5)
    project = tomllib.loads((path / "app" / "pyproject.toml").read_text())
    assert project["project"]["name"] == "my-federation"
    assert "@NAME@" not in (path / "README.md").read_text()
    assert configuration.load(path / "app" / "federation.toml").data.source == "sites"
    assert sum(file.stat().st_size for file in (path / "app").rglob("*")) < APP_BYTES / 100
    sites = sorted((path / "sites").iterdir())
    assert [site.name for site in sites] == [f"site-{number}" for number in range(1, 6)]
    assert [settings.read(site / "site.toml").rank for site in sites] == [4, 8, 16, 4, 8]
    texts = [set((site / "data.jsonl").read_text().splitlines()) for site in sites]
    assert all(texts)
    assert len(set.union(*texts)) == sum(map(len, texts))  # nobody has another's rows
    assert all("text" in json.loads(row) for row in texts[0])


def test_what_a_sites_file_suggests_can_be_uncommented(tmp_path: Path) -> None:
    create(tmp_path / "f", 1)
    file = tmp_path / "f" / "sites" / "site-1" / "site.toml"
    file.write_text(re.sub(r"^# (?=\w+ = |\[)", "", file.read_text(), flags=re.MULTILINE))
    site = settings.read(file)
    assert (site.memory, site.peers, site.trainer.memory) == ("8GiB", "peers.pub", "24GiB")


def test_its_scripts_are_sound_and_can_be_run(tmp_path: Path) -> None:
    create(tmp_path / "f", 1)
    for script in (tmp_path / "f" / "scripts").iterdir():
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("name", ["my federation", "-x", "böse", "a.b"])
def test_a_name_that_cannot_be_an_apps_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a federation"):
        create(tmp_path / name, 1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "mine").write_text("")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        create(tmp_path / "f", 1)


def test_the_number_of_sites_is_limited(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--sites 1000 is not allowed: there is text for"):
        create(tmp_path / "f", 1000)
    assert not (tmp_path / "f").exists()

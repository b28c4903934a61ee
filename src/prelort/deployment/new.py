"""`prelort new`: a folder with everything that a federation of real sites needs."""

from __future__ import annotations

import json
import re
import shutil
from importlib import resources
from pathlib import Path

import tomli_w

from prelort.errors import ConfigError
from prelort.experiment.folder import is_taken

RANKS = (4, 8, 16)
"""The ranks of the demonstration's sites, in turn."""
ROWS = 120
"""Texts of each of the demonstration's sites."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")


def create(path: Path, sites: int) -> None:
    """Write the federation's folder, with small demonstration data for ``sites`` sites.

    Raises `ConfigError` if the folder is not empty or its name cannot be an app's.
    """
    name = path.resolve().name
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a federation: use letters, digits and hyphens")
    if is_taken(path):
        raise ConfigError(f"{str(path)!r} exists and is not empty: choose another name")
    data = _data(sites)
    with resources.as_file(resources.files("prelort.deployment") / "template") as template:
        shutil.copytree(template, path, dirs_exist_ok=True)
    for file in (path / "app" / "pyproject.toml", path / "README.md"):
        file.write_text(file.read_text(encoding="utf-8").replace("@NAME@", name), encoding="utf-8")
    for file in (path / "scripts").glob("*.sh"):
        file.chmod(0o755)
    for number, rows in enumerate(data, start=1):
        _site(path / "sites" / f"site-{number}", RANKS[(number - 1) % len(RANKS)], rows)


def _site(folder: Path, rank: int, rows: list[dict[str, str]]) -> None:
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data.jsonl").write_text(lines, encoding="utf-8")
    values = {"name": folder.name, "rank": rank, "data": {"source": "./data.jsonl"}}
    (folder / "site.toml").write_text(_HEAD + tomli_w.dumps(values) + _MORE, encoding="utf-8")


def _data(sites: int) -> list[list[dict[str, str]]]:
    """The texts of the largest clients of the embedded data."""
    from prelort.data import standard_library

    train, _ = standard_library.load()
    by_client: dict[str, list[dict[str, str]]] = {}
    for client, text in zip(train["client"], train["text"], strict=True):
        by_client.setdefault(client, []).append({"text": text})
    largest = sorted(by_client, key=lambda client: -len(by_client[client]))
    if sites > len(largest):
        raise ConfigError(f"--sites {sites} is not allowed: there is text for {len(largest)}")
    return [by_client[client][:ROWS] for client in largest[:sites]]


_HEAD = """\
# The site's own settings. Only the name and the rank are sent to the server.
#
# With rank = "auto" it is the largest that fits the memory: see `prelort plan`.
# memory = "8GiB"
# masked_only = true           # refuse to train without secure aggregation
# key = "key"                  # sign its keys of secure aggregation: its node's private key
# peers = "peers.pub"          # with `key`: the sites' public keys, one a line
# privacy.epsilon = 8.0        # train with noise only, up to this budget, in all runs together

"""

_MORE = """
# [model]                      # keys of [model] that differ here
# name = "/models/base"        # the site's own copy of the base model
# device = "cuda:0"
# quantization = "4bit"
#
# [trainer]
# warm = true                  # keep the base model loaded between rounds
# idle_minutes = 30            # the trainer ends after this time without work
# memory = "24GiB"             # it is restarted if it takes more
# accelerate = "gpus.yaml"     # for several GPUs: what `accelerate config` wrote
"""

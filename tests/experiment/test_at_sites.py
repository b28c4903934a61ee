"""Sites that see only their own rows, against one process that sees all of them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import prelort
from backends import local_app
from prelort import config as configuration
from prelort.config import Config
from prelort.data import standard_library
from prelort.errors import ConfigError
from prelort.events import Metrics
from prelort.experiment.assemble import assemble
from prelort.experiment.at_sites import at_sites, backend_at_sites, own_site
from prelort.experiment.run import run
from prelort.federation.client import LocalClient
from prelort.federation.in_process import InProcessGrid
from prelort.history import RunHistory
from prelort.models.base import location
from run_files import adapters_of

RANKS = {"clinic-a": 2, "clinic-b": 8, "clinic-c": 4}
LABELS = ("no", "yes")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file for each site, and one with all rows and a column of sites."""
    folder = tmp_path_factory.mktemp("data")
    texts = list(standard_library.load()[0]["text"])
    found = {"all": folder / "all.jsonl"}
    everything: list[dict[str, str]] = []
    for number, name in enumerate(RANKS):
        rows = [
            {"text": text[:400], "label": LABELS[len(text) % 2]}
            for text in texts[40 * number : 40 * number + 12 + 2 * number]
        ]
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
        everything += [{**row, "client": name} for row in rows]
    found["all"].write_text("".join(json.dumps(row) + "\n" for row in everything))
    return found


def config_of(task: str = "causal-lm", **changes: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "data": {"source": "sites", "max_length": 32, "text_column": "text"},
        "ranks": {"mix": "2, 8, 4", "assign": "in-order"},
        "training": {"local_steps": 1},
        "federation": {"rounds": 2, "clients_per_round": 1.0, "wait": 5.0, "verify_names": False},
        "evaluation": {"every": 1, "diagnostics": False},
    }
    if task == "classification":
        values["data"] |= {"labels": LABELS, "label_column": "label"}
    for section, some in changes.items():
        values[section] = {**values.get(section, {}), **some}
    return configuration.check({"task": task, "seed": 5, "threads": 1, **values})


def with_source(config: Config, file: Path) -> Config:
    data = config.data.model_copy(update={"source": str(file)})
    return config.model_copy(update={"data": data})


def sites_of(config: Config, files: dict[str, Path]) -> list[LocalClient]:
    return [own_site(with_source(config, files[name]), name, RANKS[name]) for name in RANKS]


def run_at(sites: Sequence[LocalClient], config: Config, path: Path) -> RunHistory:
    grid = InProcessGrid(local_app(sites), [{"partition-id": index} for index in range(len(sites))])
    return run(config, path, backend=at_sites(grid)).history


def run_together(config: Config, file: Path, path: Path) -> RunHistory:
    together = with_source(config, file).model_copy(
        update={"partition": configuration.PartitionConfig(by="column", column="client")}
    )
    # The largest client comes first where all are dealt from one file.
    mix = ", ".join(str(RANKS[name]) for name in reversed(RANKS))
    ranks = config.ranks.model_copy(update={"mix": mix})
    return prelort.run(together.model_copy(update={"ranks": ranks}), path).history


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_sites_that_see_only_their_own_give_what_one_process_gives(
    files: dict[str, Path], tmp_path: Path, task: str
) -> None:
    config = config_of(task)
    apart = run_at(sites_of(config, files), config, tmp_path / "apart")
    together = run_together(config, files["all"], tmp_path / "together")
    assert adapters_of(tmp_path / "apart") == adapters_of(tmp_path / "together")
    # Causal text is cut into examples anew where all rows lie in one file; classes pool exactly.
    close = 0.02 if task == "causal-lm" else 1e-5

    def assert_near(measured: Metrics, expected: Metrics) -> None:
        names = {"loss", "perplexity", "accuracy"} & expected.keys()  # others are means over sites
        wanted = {name: expected[name] for name in names}
        assert {name: measured[name] for name in names} == pytest.approx(wanted, rel=close)

    assert_near(apart.base, together.base)
    assert apart.evaluations.keys() == together.evaluations.keys() == {0, 1, 2}
    for number, measured in apart.evaluations.items():
        expected = together.evaluations[number]
        assert expected.samples is None
        assert {sample.clients for sample in (measured.samples or {}).values()} == {3}
        assert measured.prefixes.keys() == expected.prefixes.keys()
        for rank, metrics in expected.prefixes.items():
            assert_near(measured.prefixes[rank], metrics)


def test_the_server_loads_no_model(files: dict[str, Path], tmp_path: Path) -> None:
    """The files of the base are enough, of which its fingerprint is taken; no tokenizer."""
    config = config_of()
    whole = Path(location(config.model.name))
    for file in (whole / "config.json", *whole.glob("*.safetensors")):
        shutil.copy(file, tmp_path / file.name)
    model = config.model.model_copy(update={"name": str(tmp_path)})
    server = config.model_copy(update={"model": model})
    assert run_at(sites_of(config, files), server, tmp_path / "run").finished
    with pytest.raises(ConfigError, match="tokenizer"):
        assemble(with_source(server, files["all"]))  # as it does where it measures itself


@pytest.mark.parametrize(
    "task, changes, sentence",
    [
        ("causal-lm", {"ranks": {"schedule": {"2": "2*1"}}}, "ranks.schedule needs clients"),
        ("classification", {"data": {"labels": None}}, "data.labels is not set"),
        ("causal-lm", {"ranks": {"mix": "2, x"}}, "'x' is not a rank"),
    ],
)
def test_what_cannot_work_over_sites_is_told(
    task: str, changes: dict[str, Any], sentence: str
) -> None:
    grid = InProcessGrid(lambda message, context: message, [])
    with pytest.raises(ConfigError, match=sentence):
        backend_at_sites(config_of(task, **changes), grid)


@pytest.mark.parametrize("rank, allowed", [(0, False), (1, True), (3, True), (8, True), (9, False)])
def test_a_site_has_any_rank_up_to_the_highest(
    files: dict[str, Path], rank: int, allowed: bool
) -> None:
    config = with_source(config_of(), files["clinic-a"])
    if allowed:
        assert own_site(config, "clinic-a", rank).rank == rank
    else:
        with pytest.raises(ConfigError, match=f"rank = {rank} is not allowed"):
            own_site(config, "clinic-a", rank)


def test_a_row_of_a_class_that_nobody_named_is_told(files: dict[str, Path]) -> None:
    config = config_of("classification", data={"labels": ("yes", "maybe")})
    config = with_source(config, files["all"])
    with pytest.raises(ConfigError, match=r"row \d+ has the label 'no', which is none of the cl"):
        own_site(config, "clinic-a", 2)


def test_by_loss_all_sites_begin_low(files: dict[str, Path]) -> None:
    config = config_of(ranks={"allocation": "by-loss"}, data={"validation_fraction": 0.2})
    site = sites_of(config, files)[1]
    assert (site.rank, site.max_rank) == (2, 8)
    assert site.validation

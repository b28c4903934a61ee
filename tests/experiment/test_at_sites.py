"""Sites that see only their own rows, against one process that sees all of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import prelort
from prelort import config as configuration
from prelort.config import Config
from prelort.data import standard_library
from prelort.errors import ConfigError
from prelort.experiment.assemble import assemble
from prelort.experiment.at_sites import at_sites, own_site
from prelort.experiment.run import run
from prelort.federation.client import LocalClient, make_client_app
from prelort.federation.flower import identify_process
from prelort.federation.in_process import InProcessGrid
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
        "training": {"local_steps": 2},
        "federation": {"rounds": 2, "clients_per_round": 1.0, "wait": 5.0},
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


def run_at(sites: Sequence[LocalClient], config: Config, path: Path) -> list[dict[str, Any]]:
    app = make_client_app(lambda context: sites[int(context.node_config["partition-id"])])
    grid = InProcessGrid(app, [{"partition-id": index} for index in range(len(sites))])
    run(config, path, stage_of=lambda config, folder: at_sites(config, grid))
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def run_together(config: Config, file: Path, path: Path) -> list[dict[str, Any]]:
    together = with_source(config, file).model_copy(
        update={"partition": configuration.PartitionConfig(by="column", column="client")}
    )
    # The largest client comes first where all are dealt from one file.
    mix = ", ".join(str(RANKS[name]) for name in reversed(RANKS))
    ranks = config.ranks.model_copy(update={"mix": mix})
    prelort.run(together.model_copy(update={"ranks": ranks}), path)
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_sites_that_see_only_their_own_give_what_one_process_gives(
    files: dict[str, Path], tmp_path: Path, task: str
) -> None:
    config = config_of(task)
    apart = run_at(sites_of(config, files), config, tmp_path / "apart")
    together = run_together(config, files["all"], tmp_path / "together")
    assert adapters_of(tmp_path / "apart") == adapters_of(tmp_path / "together")
    measured, expected = (
        [e for e in events if e["event"] == "evaluated"] for events in (apart, together)
    )
    assert len(measured) == len(expected) == 3
    # Causal text is cut into examples anew where all rows lie in one file; classes pool exactly.
    close = 0.02 if task == "causal-lm" else 1e-5
    for one, other in zip(measured, expected, strict=True):
        assert one["where"] == "clients"
        assert set(one["clients"].values()) == {3}
        rows = {**other["prefixes"], "base": other.get("base", {})}
        for rank, metrics in rows.items():
            found = one["base"] if metrics and rank == "base" else one["prefixes"].get(rank, {})
            for name in {"loss", "perplexity", "accuracy"} & metrics.keys():
                assert found[name] == pytest.approx(metrics[name], rel=close)


def test_the_server_needs_no_weights_in_memory(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    sites = sites_of(config, files)
    from prelort.models import base

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("the server has loaded the model")

    monkeypatch.setattr(base, "load_model", refuse)
    monkeypatch.setattr(base, "load_tokenizer", refuse)
    assert run_at(sites, config, tmp_path / "run")[-1]["event"] == "run_finished"


def test_what_the_server_makes_without_weights_is_what_it_makes_with_them(
    files: dict[str, Path],
) -> None:
    config = config_of()
    identify_process(1)
    stage = at_sites(config, InProcessGrid(lambda message, context: message, []))
    with_weights = assemble(with_source(config, files["all"]))
    assert stage.spec == with_weights.runtime.spec
    expected = with_weights.initial.tensors()
    for name, tensor in stage.initial.tensors().items():
        assert (tensor == expected[name]).all()
    assert stage.planned == (2, 4, 8)


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
        at_sites(config_of(task, **changes), grid)


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
    with pytest.raises(ConfigError, match=r"row \d+ has the label 'no', which is not in data.lab"):
        own_site(config, "clinic-a", 2)


def test_data_at_sites_cannot_be_run_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.source = 'sites' has no rows here"):
        prelort.run(config_of(), tmp_path / "run")


def test_by_loss_all_sites_begin_low(files: dict[str, Path]) -> None:
    config = config_of(ranks={"allocation": "by-loss"}, data={"validation_fraction": 0.2})
    site = sites_of(config, files)[1]
    assert (site.rank, site.max_rank) == (2, 8)
    assert site.validation

"""The few lines of Python that the README shows, and what the package's name gives."""

from collections.abc import Callable
from pathlib import Path

import pytest

import prelort
from prelort.config import Config, to_toml
from prelort.events import (
    Checkpointed,
    ClientFinished,
    Evaluated,
    Evaluating,
    Event,
    Loading,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
)


def test_five_lines(
    tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my.toml").write_text(to_toml(make_config()))
    monkeypatch.chdir(tmp_path)

    config = prelort.load_config("my.toml", ["federation.rounds=2"])
    result = prelort.run(config, "runs/first")
    tuned, untuned = result.metrics[4]["perplexity"], result.base["perplexity"]

    assert tuned != untuned
    assert repr(result).startswith("<RunResult 'runs/first': perplexity ")
    frame = result.to_pandas()
    (value,) = frame[(frame["round"] == 2) & (frame["rank"] == 4)]["value"][
        frame["metric"] == "perplexity"
    ]
    assert value == tuned
    assert prelort.read("runs/first").to_pandas()["value"].tolist() == frame["value"].tolist()
    assert result.levels == (2, 4, 8)
    assert result.global_adapter.prefix(4).rank == 4
    assert (result.path / "adapters" / "rank-4" / "adapter_model.safetensors").is_file()


def test_listeners_hear_the_events_in_order(
    tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    heard: list[Event] = []
    prelort.run(
        make_config(federation={"rounds": 1, "clients_per_round": 2}),
        tmp_path / "run",
        listeners=[heard.append],
    )
    assert [type(event) for event in heard if not isinstance(event, Evaluating)] == [
        Loading,
        RunStarted,
        Evaluated,
        Checkpointed,
        RoundStarted,
        ClientFinished,
        ClientFinished,
        RoundFinished,
        Evaluated,
        Checkpointed,
        RunFinished,
    ]
    assert any(isinstance(event, Evaluating) for event in heard)


def test_a_study_is_compared_and_read_again(
    tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    config = make_config(federation={"rounds": 1, "clients_per_round": 2})
    section = '[compare]\nmethods = ["prelort", "fedit"]\nseeds = [0, 1]\n'
    (tmp_path / "study.toml").write_text(to_toml(config) + section)
    results = prelort.compare(tmp_path / "study.toml", tmp_path / "out")
    assert [cell.status for cell in results.cells] == ["finished", "failed"] * 2
    assert set(results.to_pandas()["seed"]) == {0, 1}
    assert prelort.read(tmp_path / "out").to_pandas().equals(results.to_pandas())


def test_a_refused_run_leaves_nothing(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    with pytest.raises(prelort.PrelortError, match="matches no layer"):
        prelort.run(make_config(lora={"target_modules": ["nope"]}), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", prelort.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(prelort, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = prelort.nothing


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: prelort.run({}, "x"), "config must be a prelort.Config, not {}"),
        (lambda: prelort.run(Config(), "x", listeners=print), "must be a list of functions"),
        (lambda: prelort.run(Config(), None), "a path is expected, not None"),
        (lambda: prelort.load_config(None, "seed=1"), "must be a list of texts 'key=value', not"),
        (lambda: prelort.plan("my.toml"), "config must be a prelort.Config, not 'my.toml'"),
        (lambda: prelort.plan(Config(), ranks=["4"]), "must be a list of whole numbers"),
        (lambda: prelort.EarlyStopping(patience=0), "patience = 0 is not allowed"),
        (lambda: prelort.export("runs/a", "b", dtype="int3"), "dtype = 'int3' is not allowed"),
        (lambda: prelort.read(None), "a path is expected, not None"),
    ],
)
def test_wrong_types_are_one_sentence(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(prelort.PrelortError, match=sentence):
        call()

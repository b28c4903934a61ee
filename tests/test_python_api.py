"""The few lines of Python that the README shows, and what the package's name gives."""

from collections.abc import Callable
from pathlib import Path

import pytest

import prelort
from prelort.config import Config, to_toml


def test_five_lines(
    tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my.toml").write_text(to_toml(make_config()))
    monkeypatch.chdir(tmp_path)

    config = prelort.load_config("my.toml", ["federation.rounds=2"])
    result = prelort.run(config, "runs/first")
    tuned, untuned = result.metrics[4]["perplexity"], result.base["perplexity"]

    assert tuned != untuned
    assert result.levels == (2, 4, 8)
    assert result.adapter.prefix(4).rank == 4
    assert (result.path / "adapters" / "rank-4" / "adapter_model.safetensors").is_file()


def test_listeners_hear_the_events_in_order(
    tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    heard: list[str] = []
    prelort.run(
        make_config(federation={"rounds": 1, "clients_per_round": 2}),
        tmp_path / "run",
        listeners=[lambda event: heard.append(event["event"])],
    )
    assert [name for name in heard if name != "evaluating"] == [
        "loading",
        "run_started",
        "evaluated",
        "checkpointing",
        "checkpointed",
        "round_started",
        "client_finished",
        "client_finished",
        "aggregated",
        "evaluated",
        "checkpointing",
        "checkpointed",
        "run_finished",
    ]
    assert "evaluating" in heard


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

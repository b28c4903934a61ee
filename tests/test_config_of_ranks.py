"""Options of methods, plans for ranks, and the keys that need one another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from prelort.config import (
    MethodConfig,
    NoOptions,
    Section,
    check,
    differences,
    load,
    to_toml,
)
from prelort.errors import ConfigError
from prelort.methods import PrefixMethod, build


class Options(Section):
    """As a method's own file has them."""

    gamma: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    split: Literal["even", "A", "B"] = "even"


def options(**values: Any) -> Options:
    return MethodConfig(options={"mine": values}).options_of("mine", Options)


# Options


def test_options_that_are_not_given_have_their_defaults() -> None:
    assert MethodConfig().options_of("mine", Options) == Options()
    assert options() == Options()
    assert MethodConfig(options={"other": {"gamma": 0.5}}).options_of("mine", Options) == Options()


def test_options_that_are_given_are_read() -> None:
    assert options(gamma=0.5, split="B") == Options(gamma=0.5, split="B")


@pytest.mark.parametrize(
    "values, says",
    [
        ({"gama": 0.5}, "unknown key 'method.options.mine.gama': did you mean 'gamma'?"),
        ({"xyzzy": 1}, "unknown key 'method.options.mine.xyzzy': allowed are gamma, split"),
        ({"gamma": 1.5}, "method.options.mine.gamma = 1.5 is not allowed: input should be less"),
        ({"gamma": "much"}, 'method.options.mine.gamma = "much" is not allowed: input should be'),
        ({"gamma": float("nan")}, "method.options.mine.gamma = NaN is not allowed"),
        (
            {"split": "C"},
            "method.options.mine.split = \"C\" is not allowed: input should be 'even'",
        ),
    ],
)
def test_a_wrong_option_is_one_sentence_with_key_and_value(
    values: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        options(**values)
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)


def test_a_method_without_options_says_so() -> None:
    config = MethodConfig(options={"mine": {"gamma": 0.5}})
    with pytest.raises(ConfigError) as refused:
        config.options_of("mine", NoOptions)
    assert str(refused.value) == (
        "unknown key 'method.options.mine.gamma': this method has no options"
    )


def test_a_methods_options_are_checked_when_it_is_built() -> None:
    values = {"options": {"prelort": {"gamma": 0.5}}}
    with pytest.raises(ConfigError, match=r"'method\.options\.prelort\.gamma': this method has no"):
        build(MethodConfig(name="prelort", **values), [2], 0)
    # Those of another method are for its turn, where several are compared.
    build(MethodConfig(name="zero-padding", **values), [2], 0)


def test_options_of_what_is_no_method_are_refused() -> None:
    config = MethodConfig(options={"prelrot": {}})
    with pytest.raises(
        ConfigError, match=r"method\.options\.prelrot: there is no method 'prelrot'"
    ):
        build(config, [2], 0)


def test_a_method_gets_its_options_from_the_configuration() -> None:
    class Mine(PrefixMethod):
        name = "mine"
        summary = paper = ""
        Options = Options

    assert Mine(MethodConfig(options={"mine": {"gamma": 0.25}}), [2], 0).options.gamma == 0.25
    assert Mine(MethodConfig(), [2], 0).options == Options()


@pytest.mark.parametrize(
    "value, says",
    [
        (3, "method.options = 3 is not allowed"),
        ({"prelort": 3}, "method.options = 3 is not allowed"),
    ],
)
def test_options_are_tables_of_tables(value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check({"method": {"options": value}})
    assert str(refused.value).startswith(says)


def test_options_may_be_set_on_the_command_line_and_come_back_from_toml(tmp_path: Path) -> None:
    config = load(None, ["method.options.mine.gamma=0.25", "method.options.mine.split=A"])
    assert config.method.options == {"mine": {"gamma": 0.25, "split": "A"}}
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert load(tmp_path / "c.toml") == config
    other = load(None, ["method.options.mine.gamma=0.5", "method.options.mine.split=A"])
    assert differences(config, other) == ["method.options.mine.gamma"]


# A schedule of ranks


def test_a_schedule_is_a_mix_for_each_round_and_comes_back_from_toml(tmp_path: Path) -> None:
    config = load(None, ["ranks.schedule.5=4*0.5, 16*0.5", "ranks.schedule.2='8*1'"])
    assert config.ranks.schedule == {"5": "4*0.5, 16*0.5", "2": "8*1"}
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert load(tmp_path / "c.toml") == config


@pytest.mark.parametrize("key", ["1", "0", "-2", "2.5", "two", "", " 3", "٣", "²"])
def test_a_schedule_begins_in_round_two(key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check({"ranks": {"schedule": {key: "4*1"}}})
    assert str(refused.value) == (
        f"ranks.schedule: {key!r} is not a round from 2 on (round 1 has ranks.mix)"
    )


def test_a_mix_in_a_schedule_is_text() -> None:
    with pytest.raises(ConfigError, match=r"ranks\.schedule = .* is not allowed"):
        check({"ranks": {"schedule": {"2": [4, 8]}}})


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_the_share_that_is_raised_is_one(share: float) -> None:
    with pytest.raises(ConfigError, match=r"ranks\.high_share = .* is not allowed"):
        check({"ranks": {"high_share": share}})


# Keys that need rows to tune on


NEEDING = {
    "evaluation.on = 'validation'": {"evaluation": {"on": "validation"}},
    "ranks.allocation = 'by-loss'": {"ranks": {"allocation": "by-loss"}},
}


@pytest.mark.parametrize("named", NEEDING)
def test_what_needs_validation_rows_says_which_key_gives_them(named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(NEEDING[named])
    assert str(refused.value) == (
        f"{named} needs rows held out at the clients: set data.validation_fraction, for instance "
        "to 0.1"
    )
    check({**NEEDING[named], "data": {"validation_fraction": 0.1}})


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0])
def test_the_share_of_validation_rows_leaves_some_to_train_on(share: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation_fraction = .* is not allowed"):
        check({"data": {"validation_fraction": share}})


@pytest.mark.parametrize(
    "key, value",
    [("evaluation.on", "train"), ("ranks.allocation", "by-size"), ("evaluation.at_clients", 3)],
)
def test_other_values_are_refused_by_key(key: str, value: Any) -> None:
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=rf"{section}\.{name} = .* is not allowed"):
        check({section: {name: value}})

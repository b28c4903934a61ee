from __future__ import annotations

import contextlib
import tomllib
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

import prelort
from prelort import config as configuration
from prelort.config import (
    Config,
    MethodConfig,
    NoOptions,
    Section,
    check,
    differences,
    load,
    read_toml,
    to_toml,
)
from prelort.errors import ConfigError
from prelort.methods import build


def every_field(model: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    """All dotted keys with their fields."""
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += every_field(inner, f"{prefix}{name}.")
        else:
            found.append((prefix + name, field))
    return found


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


class TestDefaults:
    def test_the_empty_configuration_is_valid(self) -> None:
        assert check({}) == Config()

    def test_the_default_is_the_embedded_file(self) -> None:
        assert load() == check(tomllib.loads(configuration.EMBEDDED_FILE.read_text()))
        assert load().model.name == "embedded"

    def test_load_config_is_the_public_name(self) -> None:
        assert prelort.load_config is load
        assert prelort.Config is Config


class TestRoundTrip:
    @pytest.mark.parametrize(
        "key",
        [
            key
            for key, field in every_field(Config)
            if type(None) in typing.get_args(field.annotation)
        ],
    )
    def test_a_key_that_is_not_set_stays_so(self, tmp_path: Path, key: str) -> None:
        """TOML has no null: None must be the default wherever it is allowed."""
        config = check(nested(key, None))
        (tmp_path / "c.toml").write_text(to_toml(config))
        assert differences(load(tmp_path / "c.toml"), config) == []

    @settings(max_examples=60, deadline=None)
    @given(
        st.fixed_dictionaries(
            {},
            optional={
                "seed": st.integers(0, 2**62),
                "task": st.sampled_from(["causal-lm", "chat", "classification"]),
                "data": st.fixed_dictionaries(
                    {}, optional={"source": st.text(), "test_fraction": st.floats(0.01, 0.99)}
                ),
                "lora": st.fixed_dictionaries(
                    {},
                    optional={
                        "target_modules": st.lists(st.text(min_size=1), min_size=1) | st.text(),
                        "scale": st.floats(1e-300, 1e300, exclude_min=True),
                        "rank_pattern": st.dictionaries(st.text(min_size=1), st.integers(1, 99)),
                    },
                ),
                "ranks": st.fixed_dictionaries(
                    {"schedule": st.dictionaries(st.integers(2, 99).map(str), st.text())}
                ),
                "federation": st.fixed_dictionaries(
                    {"quorum": st.integers(1, 99) | st.floats(0.01, 1.0)}
                ),
                "evaluation": st.fixed_dictionaries(
                    {"prefixes": st.lists(st.integers(1, 99), min_size=1)}
                ),
                "method": st.fixed_dictionaries(
                    {"options": st.dictionaries(st.text(), st.just({"gamma": 0.5}))}
                ),
            },
        )
    )
    def test_of_anything(self, tmp_path_factory: Any, values: dict[str, Any]) -> None:
        config = check(values)
        file = tmp_path_factory.mktemp("c") / "c.toml"
        file.write_text(to_toml(config), encoding="utf-8")
        assert load(file) == config
        assert differences(load(file), config) == []

    def test_a_number_and_a_share_of_clients_stay_what_they_are(self) -> None:
        one = check({"federation": {"clients_per_round": 1}}).federation.clients_per_round
        all_of_them = check({"federation": {"clients_per_round": 1.0}}).federation.clients_per_round
        assert (type(one), type(all_of_them)) == (int, float)


class TestOverrides:
    @pytest.mark.parametrize(
        "override, key, value",
        [
            (" seed = 3 ", "seed", 3),
            ("method.name=fedit", "method.name", "fedit"),
            ("method.name='fedit'", "method.name", "fedit"),
            ("data.source=a=b.csv", "data.source", "a=b.csv"),
            ("ranks.mix=2*0.5, 4*0.5", "ranks.mix", "2*0.5, 4*0.5"),
            ("training.learning_rate=1e-4", "training.learning_rate", 1e-4),
            ("training.shuffle=false", "training.shuffle", False),
            ("federation.quorum=0.25", "federation.quorum", 0.25),
            ("federation.quorum=2", "federation.quorum", 2),
            ("evaluation.prefixes=[1, 2]", "evaluation.prefixes", (1, 2)),
            ("lora.rank_pattern={q_proj = 2}", "lora.rank_pattern", {"q_proj": 2}),
            ("ranks.schedule.5=4*0.5, 16*0.5", "ranks.schedule", {"5": "4*0.5, 16*0.5"}),
            ("method.options.mine.gamma=0.25", "method.options", {"mine": {"gamma": 0.25}}),
        ],
    )
    def test_a_value_is_toml_or_else_a_word(self, override: str, key: str, value: Any) -> None:
        found: Any = load(overrides=[override])
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value
        assert type(found) is type(value)

    def test_the_last_one_wins_over_others_and_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "c.toml").write_text("seed = 1\n[training]\nbatch_size = 3\n")
        config = load(tmp_path / "c.toml", ["training.batch_size=4", "training.batch_size=5"])
        assert (config.seed, config.training.batch_size) == (1, 5)

    @pytest.mark.parametrize("override", ["seed", "", "=", "=3", " =3"])
    def test_without_key_and_value_they_are_refused(self, override: str) -> None:
        with pytest.raises(ConfigError, match="is not of the form key=value"):
            load(overrides=[override])

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def test_anything_is_a_configuration_or_one_sentence(self, override: str) -> None:
        with contextlib.suppress(ConfigError):
            load(overrides=[override])


class Options(Section):
    """Options of a method."""

    gamma: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    split: Literal["even", "A", "B"] = "even"


class TestSentences:
    @pytest.mark.parametrize(
        "values, words",
        [
            ({"federation": {"round": 3}}, "'federation.round': did you mean 'rounds'?"),
            ({"sed": 3}, "unknown key 'sed': did you mean 'seed'?"),
            ({"ranks": {"xyzzy": 3}}, "unknown key 'ranks.xyzzy': allowed are mix, assign"),
            ({"federation": {"rounds": "many"}}, 'federation.rounds = "many" is not allowed'),
            ({"training": {"batch_size": 0}}, "training.batch_size = 0 is not allowed"),
            ({"federation": {"rounds": True}}, "federation.rounds: true is not allowed"),
            ({"federation": {"clients_per_batch": "all"}}, "integer, or input should be 'auto'"),
            ({"task": "poetry"}, "unknown task 'poetry': known are causal-lm, instruction"),
            ({"lora": {"rank_pattern": {"q_proj": 0}}}, "lora.rank_pattern = 0 is not allowed"),
            ({"federation": {"quorum": -1}}, "federation.quorum = -1 is not allowed"),
            ({"model": 3}, "model = 3 is not allowed"),
            ({"method": {"options": {"prelort": 3}}}, "method.options = 3 is not allowed"),
            ({"ranks": {"schedule": {"2": [4, 8]}}}, "ranks.schedule = [4, 8] is not allowed"),
            ({"ranks": {"high_share": 0.0}}, "ranks.high_share = 0.0 is not allowed"),
            ({"data": {"validation_fraction": 1.0}}, "validation_fraction = 1.0 is not allowed"),
            ({"training": {"learning_rate": float("inf")}}, "learning_rate = Infinity"),
            ({"training": {"weight_decay": float("nan")}}, "weight_decay = NaN"),
        ],
    )
    def test_name_the_key_the_value_and_what_is_allowed(
        self, values: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ConfigError) as refused:
            check(values)
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize(
        "section", sorted({key.split(".")[0] for key, _ in every_field(Config) if "." in key})
    )
    def test_every_section_refuses_unknown_keys(self, section: str) -> None:
        with pytest.raises(ConfigError, match=f"unknown key '{section}.xyzzy'"):
            check({section: {"xyzzy": 1}})

    @pytest.mark.parametrize("key", ["1", "0", "-2", "2.5", "two", "", " 3", "٣", "²"])
    def test_a_schedule_starts_in_round_two(self, key: str) -> None:
        with pytest.raises(ConfigError, match=r"ranks\.schedule: .* is not a round number"):
            check({"ranks": {"schedule": {key: "4*1"}}})

    @pytest.mark.parametrize(
        "values", [{"evaluation": {"on": "validation"}}, {"ranks": {"allocation": "by-loss"}}]
    )
    def test_what_needs_validation_rows_names_their_key(self, values: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"needs validation rows: set data\.validation_frac"):
            check(values)
        check({**values, "data": {"validation_fraction": 0.1}})

    @pytest.mark.parametrize(
        "values, words",
        [
            ({"gama": 0.5}, "'method.options.mine.gama': did you mean 'gamma'?"),
            ({"xyzzy": 1}, "'method.options.mine.xyzzy': allowed are gamma, split"),
            (
                {"gamma": 1.5},
                "method.options.mine.gamma = 1.5 is not allowed: input should be less",
            ),
            ({"split": "C"}, "mine.split = \"C\" is not allowed: input should be 'even'"),
        ],
    )
    def test_of_a_methods_option(self, values: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError) as refused:
            MethodConfig(options={"mine": values}).options_of("mine", Options)
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)


class TestOptions:
    def test_have_defaults_and_are_read(self) -> None:
        assert MethodConfig().options_of("mine", Options) == Options()
        other = MethodConfig(options={"other": {"gamma": 0.5}})
        assert other.options_of("mine", Options) == Options()
        config = MethodConfig(options={"mine": {"gamma": 0.5, "split": "B"}})
        assert config.options_of("mine", Options) == Options(gamma=0.5, split="B")

    def test_are_checked_when_the_method_is_built(self) -> None:
        values = {"options": {"prelort": {"gamma": 0.5}}}
        with pytest.raises(ConfigError, match=r"'method\.options\.prelort\.gamma': no keys"):
            build(MethodConfig(name="prelort", **values), 0)
        # Several methods that are compared share one configuration.
        build(MethodConfig(name="zero-padding", **values), 0)
        assert NoOptions() == MethodConfig().options_of("prelort", NoOptions)

    def test_of_an_unknown_method_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"method\.options\.prelrot: .* no method 'prelrot'"):
            build(MethodConfig(options={"prelrot": {}}), 0)


def test_differences_are_dotted_keys() -> None:
    assert differences(load(), load()) == []
    other = check({"seed": 1, "method": {"level_weights": {"2": 1.0}}, "threads": 2})
    assert differences(Config(), other) == ["method.level_weights.2", "seed", "threads"]


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "does not exist"),
        (b"name = '\xe9'", "cannot be read"),
        (b"seed: 3", "is not valid TOML"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "c.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_toml(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)

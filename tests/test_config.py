import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

import prelort
from prelort import config as configuration
from prelort.config import Config, check, differences, load, read_toml, to_toml
from prelort.errors import ConfigError


def every_field(model: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    """All keys with their fields, sections gone into."""
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

    def test_without_a_file_the_embedded_one_is_meant(self) -> None:
        assert load() == check(tomllib.loads(configuration.EMBEDDED_FILE.read_text()))

    def test_the_embedded_file_says_nothing_that_it_need_not_mean(self) -> None:
        """Every key in it exists; a key that was renamed would be refused."""
        assert load().model.name == "embedded"

    def test_it_is_frozen(self) -> None:
        with pytest.raises(ValidationError):
            Config().seed = 3  # type: ignore[misc]

    def test_every_section_refuses_unknown_keys(self) -> None:
        for name, field in Config.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                with pytest.raises(ConfigError, match=f"unknown key '{name}.xyzzy'"):
                    check({name: {"xyzzy": 1}})

    def test_load_config_is_the_public_name(self) -> None:
        assert prelort.load_config is load
        assert prelort.Config is Config


class TestRoundTrip:
    def test_of_the_default(self, tmp_path: Path) -> None:
        for config in (Config(), load()):
            (tmp_path / "c.toml").write_text(to_toml(config))
            assert load(tmp_path / "c.toml") == config

    @pytest.mark.parametrize(
        "key",
        [
            key
            for key, field in every_field(Config)
            if type(None) in typing.get_args(field.annotation)
        ],
    )
    def test_a_key_that_is_not_set_comes_back_so(self, tmp_path: Path, key: str) -> None:
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
                "threads": st.integers(1, 64),
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
                "federation": st.fixed_dictionaries(
                    {},
                    optional={
                        "clients_per_round": st.integers(1, 99) | st.floats(0.01, 1.0),
                        "quorum": st.integers(1, 99) | st.floats(0.01, 1.0),
                    },
                ),
                "evaluation": st.fixed_dictionaries(
                    {}, optional={"prefixes": st.lists(st.integers(1, 99), min_size=1)}
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
            ("seed=3", "seed", 3),
            (" seed = 3 ", "seed", 3),
            ("method.name=fedit", "method.name", "fedit"),
            ("method.name='fedit'", "method.name", "fedit"),
            ("model.name=Qwen/Qwen3-0.6B", "model.name", "Qwen/Qwen3-0.6B"),
            ("data.source=a=b.csv", "data.source", "a=b.csv"),
            ("ranks.mix=2*0.5, 4*0.5", "ranks.mix", "2*0.5, 4*0.5"),
            ("training.learning_rate=1e-4", "training.learning_rate", 1e-4),
            ("training.shuffle=false", "training.shuffle", False),
            ("federation.quorum=0.25", "federation.quorum", 0.25),
            ("federation.quorum=2", "federation.quorum", 2),
            ("evaluation.prefixes=[1, 2]", "evaluation.prefixes", (1, 2)),
            ("lora.target_modules=['q_proj']", "lora.target_modules", ("q_proj",)),
            ("lora.rank_pattern={q_proj = 2}", "lora.rank_pattern", {"q_proj": 2}),
        ],
    )
    def test_a_value_is_toml_or_else_a_word(self, override: str, key: str, value: Any) -> None:
        found: Any = load(overrides=[override])
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value
        assert type(found) is type(value)

    def test_the_last_one_counts(self) -> None:
        assert load(overrides=["seed=1", "seed=2"]).seed == 2

    def test_they_win_over_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "c.toml").write_text("seed = 1\n[training]\nbatch_size = 3\n")
        config = load(tmp_path / "c.toml", ["training.batch_size=5"])
        assert (config.seed, config.training.batch_size) == (1, 5)

    @pytest.mark.parametrize("override", ["seed", "", "=", "=3", " =3"])
    def test_without_key_and_value_they_are_refused(self, override: str) -> None:
        with pytest.raises(ConfigError, match="is not of the form key=value"):
            load(overrides=[override])

    def test_below_a_value_they_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="'seed' is a value, not a section"):
            load(overrides=["seed.x=1"])

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def test_anything_is_a_configuration_or_one_sentence(self, override: str) -> None:
        try:
            load(overrides=[override])
        except ConfigError as error:
            sentence = str(error)
        else:
            return
        assert sentence


class TestSentences:
    @pytest.mark.parametrize(
        "values, sentence",
        [
            (
                {"federation": {"round": 3}},
                "unknown key 'federation.round': did you mean 'rounds'?",
            ),
            ({"sed": 3}, "unknown key 'sed': did you mean 'seed'?"),
            (
                {"ranks": {"xyzzy": 3}},
                "unknown key 'ranks.xyzzy': allowed are mix, assign",
            ),
            (
                {"federation": {"rounds": "many"}},
                'federation.rounds = "many" is not allowed: input should be a valid integer, '
                "unable to parse string as an integer",
            ),
            (
                {"training": {"batch_size": 0}},
                "training.batch_size = 0 is not allowed: input should be greater than or equal",
            ),
            ({"task": "poetry"}, "task = \"poetry\" is not allowed: input should be 'causal-lm', "),
            ({"lora": {"rank_pattern": {"q_proj": 0}}}, "lora.rank_pattern = 0 is not allowed: "),
            ({"federation": {"quorum": -1}}, "federation.quorum = -1 is not allowed: "),
            ({"model": 3}, "model = 3 is not allowed: "),
        ],
    )
    def test_name_the_key_the_value_and_what_is_allowed(
        self, values: dict[str, Any], sentence: str
    ) -> None:
        with pytest.raises(ConfigError) as refused:
            check(values)
        assert str(refused.value).startswith(sentence)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    @pytest.mark.parametrize("key", ["learning_rate", "weight_decay", "max_grad_norm"])
    def test_numbers_without_end_are_refused(self, key: str, value: float) -> None:
        with pytest.raises(ConfigError, match=f"training.{key} = "):
            check({"training": {key: value}})


class TestDifferences:
    def test_of_equals_are_none(self) -> None:
        assert differences(load(), load()) == []

    def test_are_the_dotted_keys(self) -> None:
        other = check({"seed": 1, "method": {"level_weights": {"2": 1.0}}, "threads": 2})
        assert differences(Config(), other) == [
            "method.level_weights.2",
            "seed",
            "threads",
        ]


class TestFiles:
    def test_a_missing_one(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="does not exist"):
            read_toml(tmp_path / "none.toml")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read"):
            read_toml(tmp_path)

    def test_no_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "c.toml").write_bytes("name = 'é'".encode("latin-1"))
        with pytest.raises(ConfigError, match="cannot be read"):
            read_toml(tmp_path / "c.toml")

    def test_no_toml(self, tmp_path: Path) -> None:
        (tmp_path / "c.toml").write_text("seed: 3")
        with pytest.raises(ConfigError, match="is not valid TOML"):
            read_toml(tmp_path / "c.toml")

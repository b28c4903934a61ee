from pathlib import Path
from typing import Any

import pytest
import tomli_w

from prelort.config import Config
from prelort.deployment import settings
from prelort.errors import ConfigError

WHOLE: dict[str, Any] = {"name": "a", "rank": 4, "data": {"source": "./rows.csv"}}


def read(folder: Path, values: dict[str, Any]) -> settings.SiteSettings:
    file = folder / "site.toml"
    file.write_text(tomli_w.dumps(values))
    return settings.read(file)


def test_a_site_needs_little(tmp_path: Path) -> None:
    own = read(tmp_path, WHOLE)
    assert (own.name, own.rank, own.partition) == ("a", 4, None)
    assert own.trainer.warm
    assert own.state_folder(tmp_path / "site.toml") == tmp_path / "state"
    assert read(tmp_path, {"partition": 0}).partition == 0


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({}, r"a site needs a name, a rank and \[data\] source"),
        ({"name": "a", "rank": 4}, r"a site needs a name, a rank and \[data\] source"),
        (WHOLE | {"rank": 0}, "rank = 0"),
        (WHOLE | {"rank": "most"}, 'rank = "most"'),
        (WHOLE | {"memory": "8"}, "memory: .*'8' is not a size"),
        (WHOLE | {"trainer": {"memory": "much"}}, "trainer.memory: .*'much' is not a size"),
        (WHOLE | {"trainer": {"idle_minutes": 0}}, "trainer.idle_minutes = 0"),
        (
            WHOLE | {"trainer": {"warm": False, "accelerate": "gpus.yaml"}},
            "trainer: .*warm = false does not work with accelerate",
        ),
        (WHOLE | {"epochs": 3}, "unknown key 'epochs'"),
        (WHOLE | {"data": {"sauce": "b"}}, "data: unknown key 'sauce': did you mean 'source'"),
        (
            WHOLE | {"model": {"devise": "cpu"}},
            "model: unknown key 'devise': did you mean 'device'",
        ),
        (WHOLE | {"name": "x" * 201}, "name = "),
        (WHOLE | {"key": "key"}, "`key` and `peers` need each other"),
    ],
)
def test_a_wrong_value_is_one_sentence(
    tmp_path: Path, values: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as raised:
        read(tmp_path, values)
    assert "site.toml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_its_own_keys_go_before_the_federations(tmp_path: Path) -> None:
    own = read(tmp_path, WHOLE | {"model": {"device": "cpu"}, "data": {"source": "../rows.csv"}})
    found = own.applied_to(Config(), tmp_path / "site.toml")
    assert found.model.device == "cpu"
    assert found.data.source == f"{tmp_path}/../rows.csv"  # from the file on, wherever it is read
    assert found.data.max_length == Config().data.max_length

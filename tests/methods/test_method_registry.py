from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prelort.config import MethodConfig
from prelort.errors import ConfigError
from prelort.methods import REGISTRY, Client, build, find
from prelort.methods.prelort import PreLort

OWN = """
from prelort.methods.prelort import PreLort


class Mine(PreLort):
    name = "mine"


class Half:
    name = "half"
    summary = paper = ""

    def check(self, clients): ...
    def broadcast(self, state, client): ...


NUMBER = 3
"""


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """A user's own file in the folder that they work in, which Python does not search."""
    (tmp_path / "a_users_method.py").write_text(OWN)
    (tmp_path / "broken_method.py").write_text("class Mine(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and Path(p) != Path.cwd()])
    yield tmp_path
    for name in ("a_users_method", "broken_method"):
        sys.modules.pop(name, None)


def test_every_registered_method_says_what_it_is():
    assert set(REGISTRY) >= {"prelort", "zero-padding", "fedit"}
    for name, method in REGISTRY.items():
        assert method.name == name
        assert find(name) is method
        assert method.summary
        assert "\n" not in method.summary
        assert "arXiv" in method.paper


@pytest.mark.parametrize("typed, meant", [("prelrot", "prelort"), ("zero_padding", "zero-padding")])
def test_an_unknown_method_is_an_error_with_the_nearest_name(typed, meant):
    with pytest.raises(ConfigError, match=rf"unknown method '{typed}': did you mean '{meant}'\?"):
        build(MethodConfig(name=typed), [2], 0)


def test_a_name_like_no_method_is_an_error_that_lists_them():
    with pytest.raises(ConfigError, match=r"known are prelort, .*zero-padding, fedit, "):
        find("xyz")


def test_a_users_own_class_is_found_in_their_own_folder(own_file):
    method = build(MethodConfig(name="a_users_method:Mine"), [2, 4], 0)
    assert isinstance(method, PreLort)
    assert method.name == "mine"
    assert method.levels == (2, 4)
    assert method.objective(Client("k", 4, 5)).levels == (2, 4)


@pytest.mark.parametrize(
    "name, says",
    [
        ("no_such_module:Mine", "no_such_module"),
        ("a_users_method:Absent", "Absent"),
        ("a_users_method:NUMBER", "is not a class"),
        ("a_users_method:Half", "lacks objective, aggregator, readout"),
        ("collections:OrderedDict", "lacks check, broadcast, objective, aggregator, readout"),
        ("broken_method:Mine", "invalid syntax"),
        (":Mine", "cannot be imported"),
        (".relative:Mine", "cannot be imported"),
        ("a_users_method:", "cannot be imported"),
    ],
)
def test_what_is_no_method_is_refused(own_file, name, says):
    with pytest.raises(ConfigError, match=rf"method '{name}' .*{says}"):
        find(name)


def test_fedit_refuses_different_ranks_and_nested_training():
    method = build(MethodConfig(name="fedit"), [4], 0)
    method.check([Client("a", 4, 1), Client("b", 4, 9)])
    with pytest.raises(ConfigError, match=r"'fedit' needs one rank .* they have \[4, 8\]"):
        build(MethodConfig(name="fedit"), [4, 8], 0).check([Client("a", 4, 1)])  # planned for later
    with pytest.raises(ConfigError, match=r"'fedit' needs one rank .* they have \[2, 4\]"):
        method.check([Client("a", 4, 1), Client("b", 2, 1)])
    with pytest.raises(ConfigError, match="objective = 'mean' is not part of fedit"):
        build(MethodConfig(name="fedit", objective="mean"), [4], 0)
    build(MethodConfig(name="fedit", objective="plain"), [4], 0)

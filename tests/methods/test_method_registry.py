from __future__ import annotations

import sys
from pathlib import Path

import pytest

import prelort
from prelort.config import MethodConfig
from prelort.errors import ConfigError, PrelortError
from prelort.methods import REGISTRY, Client, build, find
from prelort.methods.prelort import PreLort
from rounds import start

OWN = """
from prelort.methods.prelort import PreLort


class Mine(PreLort):
    name = "mine"


class Silent(PreLort):
    def global_adapter(self, state, rank=None, layers=None):
        pass


class Half:
    name = "half"
    summary = paper = ""

    def check(self, state, clients): ...
    def broadcast(self, state, client): ...


class Nameless:
    check = broadcast = objective = aggregator = global_adapter = print


class WholeOnly(PreLort):
    def global_adapter(self, state, rank=None): ...


class Stateless(PreLort):
    def objective(self, client): ...


NUMBER = 3
"""


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """A user's own file in the folder that they work in, which Python does not search."""
    (tmp_path / "a_users_method.py").write_text(OWN)
    (tmp_path / "broken_method.py").write_text("class Mine(:\n")
    (tmp_path / "leaving_method.py").write_text("import sys\nsys.exit('bye')\n")
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


def test_a_users_own_class_is_found_in_their_own_folder(own_file):
    method = build(MethodConfig(name="a_users_method:Mine"), 0)
    assert isinstance(method, PreLort)
    assert method.name == "mine"
    assert method.objective(start(levels=[2, 4]), Client("k", 4, 5)).levels == (2, 4)


def test_a_method_without_a_global_adapter_is_one_sentence(own_file, make_config, tmp_path):
    config = make_config(method={"name": "a_users_method:Silent"}, federation={"rounds": 1})
    says = r"method Silent: global_adapter\(\) must return a LoraAdapter, but returned None"
    with pytest.raises(PrelortError, match=says):
        prelort.run(config, tmp_path / "run")


@pytest.mark.parametrize(
    "name, says",
    [
        ("no_such_module:Mine", "no_such_module"),
        ("a_users_method:Absent", "Absent"),
        ("a_users_method:NUMBER", "is not a class"),
        ("a_users_method:Half", "lacks aggregator, global_adapter, objective"),
        ("collections:OrderedDict", "lacks aggregator, broadcast, check, global_adapter, obj"),
        ("a_users_method:WholeOnly", r"must allow global_adapter\(.*, layers=None\)"),
        ("a_users_method:Stateless", r"must allow objective\(self, state, client\)"),
        ("broken_method:Mine", "invalid syntax"),
        ("leaving_method:Mine", "cannot be imported: SystemExit: bye"),
        ("a_users_method:Nameless", "lacks name"),
        (":Mine", "cannot be imported"),
        (".relative:Mine", "cannot be imported"),
        ("a_users_method:", "cannot be imported"),
    ],
)
def test_what_is_no_method_is_refused(own_file, name, says):
    with pytest.raises(ConfigError, match=rf"method '{name}' .*{says}"):
        find(name)

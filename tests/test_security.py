"""No module of the package can run code that is in a file or a message."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "prelort"
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "torch.load", "yaml.load", "numpy.load", "np.load", "pd.read_pickle"}


def test_nothing_is_unpickled_or_evaluated() -> None:
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Import():
                    names = {alias.name.split(".")[0] for alias in node.names}
                    assert not names & MODULES, (file, node.lineno)
                case ast.ImportFrom():
                    assert (node.module or "").split(".")[0] not in MODULES, (file, node.lineno)
                case ast.Call():
                    assert ast.unparse(node.func) not in CALLS, (file, node.lineno)

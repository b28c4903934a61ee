"""prelort: federated LoRA fine-tuning for clients whose hardware affords different ranks.

>>> from prelort import Federation
>>> federation = Federation(model, tokenizer, {"a": rows, "b": others}, ranks={"a": 4, "b": 16})
... # doctest: +SKIP
>>> result = federation.run(rounds=12)                                       # doctest: +SKIP
>>> result.to_pandas()                                                       # doctest: +SKIP
>>> result.model(rank=4)                                                     # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prelort.errors import PrelortError

if TYPE_CHECKING:
    from prelort.adapters import LoraAdapter, ScaleRule
    from prelort.api import Federation
    from prelort.config import Config
    from prelort.config import load as load_config
    from prelort.experiment.callbacks import EarlyStopping
    from prelort.experiment.inspect import evaluate_run as evaluate
    from prelort.experiment.inspect import export_run as export
    from prelort.experiment.result import RunResult
    from prelort.experiment.run import run
    from prelort.planning.plan import Plan, plan
    from prelort.report.results import Results
    from prelort.study.results import read
    from prelort.study.run import compare

__version__ = "0.1.0"
__all__ = [
    "Config",
    "EarlyStopping",
    "Federation",
    "LoraAdapter",
    "Plan",
    "PrelortError",
    "Results",
    "RunResult",
    "ScaleRule",
    "compare",
    "evaluate",
    "export",
    "load_config",
    "plan",
    "read",
    "run",
]

_LAZY = {
    "Config": ("prelort.config", "Config"),
    "EarlyStopping": ("prelort.experiment.callbacks", "EarlyStopping"),
    "Federation": ("prelort.api", "Federation"),
    "LoraAdapter": ("prelort.adapters", "LoraAdapter"),
    "Plan": ("prelort.planning.plan", "Plan"),
    "Results": ("prelort.report.results", "Results"),
    "RunResult": ("prelort.experiment.result", "RunResult"),
    "ScaleRule": ("prelort.adapters", "ScaleRule"),
    "compare": ("prelort.study.run", "compare"),
    "evaluate": ("prelort.experiment.inspect", "evaluate_run"),
    "export": ("prelort.experiment.inspect", "export_run"),
    "load_config": ("prelort.config", "load"),
    "plan": ("prelort.planning.plan", "plan"),
    "read": ("prelort.study.results", "read"),
    "run": ("prelort.experiment.run", "run"),
}


def __getattr__(name: str) -> Any:
    """Import pydantic, torch and the like only when needed: ``prelort --help`` is quick."""
    if name in _LAZY:
        import importlib

        from prelort.library_logging import quiet_imports

        module, attribute = _LAZY[name]
        with quiet_imports():
            return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'prelort' has no attribute {name!r}")

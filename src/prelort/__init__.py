"""prelort: federated LoRA fine-tuning for clients whose hardware affords different ranks.

>>> import prelort
>>> result = prelort.run(prelort.Config(), "runs/first")   # doctest: +SKIP
>>> result.metrics[4]["perplexity"]                        # doctest: +SKIP
>>> result.to_pandas()                                     # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prelort.errors import PrelortError

if TYPE_CHECKING:
    from prelort.adapters import LoraAdapter, ScaleRule
    from prelort.config import Config
    from prelort.config import load as load_config
    from prelort.experiment.result import RunResult
    from prelort.experiment.run import run
    from prelort.report.results import Results
    from prelort.study.results import read
    from prelort.study.run import compare

__version__ = "0.1.0"
__all__ = [
    "Config",
    "LoraAdapter",
    "PrelortError",
    "Results",
    "RunResult",
    "ScaleRule",
    "compare",
    "load_config",
    "read",
    "run",
]

_LAZY = {
    "Config": ("prelort.config", "Config"),
    "LoraAdapter": ("prelort.adapters", "LoraAdapter"),
    "Results": ("prelort.report.results", "Results"),
    "RunResult": ("prelort.experiment.result", "RunResult"),
    "ScaleRule": ("prelort.adapters", "ScaleRule"),
    "compare": ("prelort.study.run", "compare"),
    "load_config": ("prelort.config", "load"),
    "read": ("prelort.study.results", "read"),
    "run": ("prelort.experiment.run", "run"),
}


def __getattr__(name: str) -> Any:
    """Import pydantic, torch and the like only when needed: ``prelort --help`` is quick."""
    if name in _LAZY:
        import importlib

        module, attribute = _LAZY[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'prelort' has no attribute {name!r}")

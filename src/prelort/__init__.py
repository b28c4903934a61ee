"""prelort: federated LoRA fine-tuning for clients whose hardware affords different ranks.

>>> import prelort
>>> result = prelort.run(prelort.Config(), "runs/first")   # doctest: +SKIP
>>> result.metrics[4]["perplexity"]                        # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prelort.errors import PrelortError

if TYPE_CHECKING:
    from prelort.adapters import LoraAdapter, ScaleRule
    from prelort.config import Config
    from prelort.config import load as load_config
    from prelort.experiment.run import RunResult, run

__version__ = "0.1.0"
__all__ = [
    "Config",
    "LoraAdapter",
    "PrelortError",
    "RunResult",
    "ScaleRule",
    "load_config",
    "run",
]

_LAZY = {
    "Config": ("prelort.config", "Config"),
    "LoraAdapter": ("prelort.adapters", "LoraAdapter"),
    "RunResult": ("prelort.experiment.run", "RunResult"),
    "ScaleRule": ("prelort.adapters", "ScaleRule"),
    "load_config": ("prelort.config", "load"),
    "run": ("prelort.experiment.run", "run"),
}


def __getattr__(name: str) -> Any:
    """Import pydantic, torch and their kin only when needed: ``prelort --help`` is quick."""
    if name in _LAZY:
        import importlib

        module, attribute = _LAZY[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'prelort' has no attribute {name!r}")

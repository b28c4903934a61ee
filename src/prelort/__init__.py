"""prelort: federated LoRA fine-tuning for clients whose hardware affords different ranks.

>>> import prelort
>>> result = prelort.run(prelort.Config(), "runs/first")   # doctest: +SKIP
>>> result.metrics[4]["perplexity"]                        # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prelort.config import Config
from prelort.config import load as load_config
from prelort.errors import PrelortError

if TYPE_CHECKING:
    from prelort.adapters import LoraAdapter, ScaleRule
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
    "LoraAdapter": "prelort.adapters",
    "ScaleRule": "prelort.adapters",
    "RunResult": "prelort.experiment.run",
    "run": "prelort.experiment.run",
}


def __getattr__(name: str) -> Any:
    """Import torch and its kin only when they are needed, so that ``prelort --help`` is quick."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'prelort' has no attribute {name!r}")

"""Differential privacy of clients, or of their examples: what leaves says little about any one.

`accounting` turns a budget into noise. For clients `mean` clips and adds it and `run` keeps what
was spent; for examples that is `prelort.training.private` and `example`.
"""

from prelort.privacy.run import PrivateRun

__all__ = ["PrivateRun"]

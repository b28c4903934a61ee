"""Differential privacy of the clients: what the server releases says little about any one of them.

`accounting` turns a budget into noise, `mean` clips and adds it, `run` keeps what was spent.
"""

from prelort.privacy.run import PrivateRun

__all__ = ["PrivateRun"]

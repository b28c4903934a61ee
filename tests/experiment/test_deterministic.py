"""The number of threads of a run is that of all its libraries, and only while it lasts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from prelort.experiment.deterministic import deterministic


def blas_threads() -> set[int]:
    """Of the BLAS libraries that are loaded (NumPy's, perhaps SciPy's)."""
    np.linalg.eigh(np.eye(2))
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_and_numpy_have_as_many_threads_as_configured(threads: int) -> None:
    before = torch.get_num_threads(), blas_threads()
    if not before[1]:
        pytest.skip("NumPy's BLAS is none that threadpoolctl knows")
    with deterministic(threads):
        assert torch.get_num_threads() == threads
        assert blas_threads() == {threads}
    assert (torch.get_num_threads(), blas_threads()) == before


def test_without_a_number_nothing_is_limited() -> None:
    before = torch.get_num_threads(), blas_threads()
    with deterministic(None):
        assert (torch.get_num_threads(), blas_threads()) == before

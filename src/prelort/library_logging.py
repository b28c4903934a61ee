"""Output without the progress bars and notices of libraries."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

AT_IMPORT = ("bitsandbytes", "kernels")
"""Libraries that log notices when they are imported."""


def quiet_libraries() -> None:
    """Call before the libraries are imported: they read these settings then."""
    for name in AT_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # All cores; if unset, the library warns about every process that is started later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Without the notices of libraries that are imported here; afterwards they are as before."""
    levels = {name: logging.getLogger(name).level for name in AT_IMPORT}
    for name in AT_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def quiet() -> Iterator[None]:
    """The same for libraries that are imported already; afterwards they are as before."""
    import datasets
    from transformers.utils import logging as of_transformers

    level, bars = of_transformers.get_verbosity(), of_transformers.is_progress_bar_enabled()
    data_bars = not datasets.are_progress_bars_disabled()
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
            yield
    finally:
        of_transformers.set_verbosity(level)
        if bars:
            of_transformers.enable_progress_bar()
        if data_bars:
            datasets.enable_progress_bars()

"""Output without the progress bars and notices of libraries."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Call before the libraries are imported: they read these settings then."""
    for name in ("bitsandbytes", "kernels"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # All cores; if unset, the library warns about every process that is started later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

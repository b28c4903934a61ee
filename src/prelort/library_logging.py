"""No progress bars and notices of the libraries' own in our output."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Set before the libraries are imported: they read it then."""
    for name in ("bitsandbytes", "kernels"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # On all cores; unset, the library would warn of every process that is started afterwards.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

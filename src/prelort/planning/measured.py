"""The free memory of this machine."""

from __future__ import annotations

import psutil
import torch

from prelort.models.base import device_of


def free_memory(device: str = "auto") -> tuple[int, str]:
    """Free bytes on the device of ``model.device``, and a description of the place.

    On a GPU: the driver's free memory (without this process's CUDA context), else: the memory that
    the system can give without swapping. Raises `ConfigError` if CUDA is not available.
    """
    found = device_of(device)
    if found.type == "cuda":
        free, _ = torch.cuda.mem_get_info(found)
        return int(free), f"free on {torch.cuda.get_device_name(found)} now"
    return int(psutil.virtual_memory().available), "available on this machine now"

"""The free memory of this machine."""

from __future__ import annotations

import psutil
import torch

from prelort.models.base import BALANCED, device_of


def free_memory(device: str = "auto") -> tuple[int, str]:
    """Free bytes on the device of ``model.device``, and where they are in words.

    On a GPU the driver's free memory (without this process's CUDA context), else the memory
    available without swapping. Raises `ConfigError` if CUDA is not available.
    """
    place = device_of(device)
    if place.type == "cuda" and device == BALANCED:
        each = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
        return sum(each), f"free on {len(each)} GPUs now"
    if place.type == "cuda":
        free, _ = torch.cuda.mem_get_info(place)
        return int(free), f"free on {torch.cuda.get_device_name(place)} now"
    return int(psutil.virtual_memory().available), "available on this machine now"

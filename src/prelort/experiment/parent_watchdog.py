"""A process that is of no use without the one that has started it."""

from __future__ import annotations

import os
import threading
import time


def end_with_parent(started_by: int | None = None) -> None:
    """End this process soon after the one that has started it, whatever it is at.

    At any moment a run can be gone on with, and a held lock would only be in the way.
    ``started_by``: that process's number, where it may have ended before this is called.
    """
    parent = os.getppid() if started_by is None else started_by

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()

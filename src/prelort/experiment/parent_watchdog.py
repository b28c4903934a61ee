"""End a process with its parent."""

from __future__ import annotations

import os
import threading
import time


def end_with_parent(started_by: int | None = None) -> None:
    """End this process soon after its parent, whatever it is doing.

    A run can be resumed at any moment, and a held lock would block that. ``started_by``: the
    parent's process id, if it may have ended before this call.
    """
    parent = os.getppid() if started_by is None else started_by

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

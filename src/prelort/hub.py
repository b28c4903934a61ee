"""The hub, or its local cache where the hub cannot be reached."""

from __future__ import annotations

from functools import cache

SECONDS = 5.0
"""Time in which the hub must answer once."""


@cache
def offline() -> bool:
    """Whether the hub is not asked, by the user's will or since it does not answer.

    Its libraries would ask for a minute, file by file. They use their cache from then on.
    """
    import datasets
    from huggingface_hub import constants, get_session

    if not constants.is_offline_mode():
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
        except Exception:  # of the HTTP library that this release of the hub's client uses
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return constants.is_offline_mode()

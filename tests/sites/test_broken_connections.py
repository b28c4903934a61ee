"""Connections that break while adapters are on their way: nothing is lost or sent twice."""

from pathlib import Path
from typing import Any

import pytest
from cutting_proxy import CuttingProxy
from in_one_process import run_here
from loopback import Federation

from prelort.events import ClientFailed
from run_files import adapters_of

PART = 8 * 1024
"""Bytes of an object into which Flower cuts messages here; 5 MiB by default."""
CHANGES: dict[str, Any] = {
    "partition": {"clients": 1},
    "ranks": {"mix": "8"},
    "evaluation": {"every": 0},
    "federation": {"rounds": 1, "min_clients": 1, "clients_per_round": 1},
}


@pytest.mark.chaos
def test_a_transfer_goes_on_where_its_connection_broke(tmp_path: Path) -> None:
    with Federation(tmp_path, CHANGES) as federation:
        federation.environment["FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"] = str(PART)
        federation.start_superlink()
        site = federation.set_site("site-1")
        cuts: dict[Any, Any] = {
            ("push-object", 9): "request",
            ("push-object", 14): "answer",
            ("push-object", 19): "answer",
            ("pull-object", 9): "request",
            ("pull-object", 14): "answer",
            ("push-messages", 2): "answer",
            ("confirm-message-received", 2): "answer",
        }
        with CuttingProxy(federation.port, cuts) as proxy:
            federation.start_plain_node("site-1", f'site="{site}"', port=proxy.port)
            federation.run(seconds=280)
        assert proxy.cut
        assert not any(isinstance(event, ClientFailed) for event in federation.events())
        assert adapters_of(federation.folder()) == adapters_of(run_here(tmp_path / "here", CHANGES))
        # The adapter and a few small messages, each part once; again only what was cut, and once to
        # ask whether the SuperLink has a part whose answer was lost.
        size = federation.history().bytes_up
        parts = size // PART
        assert parts > 20
        assert parts <= proxy.requests["push-object"] <= parts + 30
        assert parts <= proxy.requests["pull-object"] <= parts + 30

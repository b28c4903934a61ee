"""Sites that send what they should not: refused with the reason, and the others go on."""

import shutil
from pathlib import Path

import psutil
from in_one_process import adapters_of
from loopback import Federation

EXPECTED = {
    "nan": "holds a value that is not finite",
    "inf": "holds a value that is not finite",
    "1e30": "holds 1e+30, above federation.max_abs_value",
    "other rank": "answers with rank 2, expected 4",
    "other round": "answers for round 2, asked was 1",
    "other name": "answers for 'honest'",
    "claims much": "claims 1000000000000 examples, allowed are 1 to",
    "truncated": "adapter cannot be read",
    "pickled": "carries no adapter",
    "pickled inside": "adapter cannot be read",
    "too large": "adapter cannot be read",
    "raises": "patient 17 has no text",
    "exits": "",
    "silent": "did not answer within 60 s",
}
NOT_ADMITTED = {
    "other base": "has another base model: fingerprint 0123456789abcdef, expected ",
    "other layers": "adapts other layers: digest none, expected ",
}


def test_each_is_refused_with_its_reason_and_the_others_go_on(tmp_path: Path) -> None:
    changes = {
        "evaluation": {"every": 0},
        "federation": {"rounds": 1, "min_clients": 15, "quorum": 1, "timeout": 60.0},
    }
    federation = Federation(tmp_path, changes)
    app = Path(__file__).with_name("misbehaving_app.py")
    shutil.copy(app, federation.path / "app" / "client_app.py")
    with federation:
        federation.start_superlink()
        for how in ("honest", *EXPECTED, *NOT_ADMITTED):
            federation.start_plain_node(how, f'how="{how}"')
        federation.start_run()
        server = federation.server_app()
        most = 0
        while federation.runs[-1].poll() is None:
            if server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
                most = max(most, server.memory_info().rss)
            federation.pause(0.2)
        events = federation.events()
        refused = {e["client"]: e["reason"] for e in events if e["event"] == "client_refused"}
        # On a busy machine a node may be too late with its first words; it is asked again.
        refused = {name: why for name, why in refused.items() if not name.startswith("node ")}
        assert refused.keys() == NOT_ADMITTED.keys()
        for how, reason in NOT_ADMITTED.items():
            assert reason in refused[how]
        failed = {e["client"]: e["reason"] for e in events if e["event"] == "client_failed"}
        assert failed.keys() == EXPECTED.keys()
        for how, reason in EXPECTED.items():
            assert reason in failed[how], how
        assert [e["client"] for e in events if e["event"] == "client_finished"] == ["honest"]
        assert events[-1]["event"] == "run_finished"
        assert adapters_of(federation.folder())
        assert most < 3 * 2**30  # what 200 MB in a reply may not make of the server

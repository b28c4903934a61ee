"""Who may connect: sites with a registered key, over TLS, to the server of the right authority."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Federation, free_port, missing, until

from prelort.events import ClientRefused

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"needs {', '.join(missing())}")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with Federation(tmp_path_factory.mktemp("tls"), tls=True) as made:
        # As behind a NAT: the sites know another address than the one that the server listens on.
        made.environment |= {"SERVER": "127.0.0.2", "BIND": "0.0.0.0"}
        made.start_superlink()
        yield made


def log_of(federation: Federation, name: str) -> str:
    return (federation.path / "logs" / f"{name}.log").read_text()


def connected(federation: Federation) -> int:
    return log_of(federation, "superlink").count("[Fleet.ActivateNode] Activated node_id")


def test_only_a_registered_site_is_let_in(federation: Federation) -> None:
    federation.script("key.sh", "site-1")
    federation.start_node("site-1")
    until(lambda: "not connected (try 1 of 8)" in log_of(federation, "site-1"), 60, "its refusal")
    assert "Exit Code: 305" in log_of(federation, "site-1")
    assert connected(federation) == 0

    said = federation.script("register.sh", "sites/site-1/key.pub")
    assert "registered successfully" in said
    until(lambda: connected(federation) == 1, 60, "its next try")
    assert "is registered already" in federation.script("register.sh", "sites/site-1/key.pub")


def test_a_private_key_stays_private(federation: Federation) -> None:
    federation.script("key.sh", "site-3")
    secret = [federation.path / "sites" / "site-3" / "key"]
    secret += (federation.path / "certificates").glob("*.key")
    assert len(secret) == 3
    for file in secret:
        assert file.stat().st_mode & 0o077 == 0, file


def refused(federation: Federation, name: str, *arguments: str) -> str:
    """What a SuperNode says that cannot connect; it is given a while, and is then ended."""
    before = connected(federation)
    process = federation.background(
        f"{name}.log",
        "flower-supernode",
        *("--superlink", f"127.0.0.1:{federation.port}"),
        *("--host", "127.0.0.1", "--port", str(free_port())),
        *("--max-retries", "2", "--max-wait-time", "10"),
        *arguments,
    )
    federation.nodes[name] = process
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
    assert connected(federation) == before
    return log_of(federation, name)


def test_without_tls_nobody_is_let_in(federation: Federation) -> None:
    assert "Exit Code: 305" in refused(federation, "plain", "--insecure")


def test_a_server_of_another_authority_is_not_trusted(
    federation: Federation, tmp_path: Path
) -> None:
    other = Federation(tmp_path, tls=True)
    other.script("certificates.sh")
    strange = federation.path / "certificates" / "other.crt"
    shutil.copy(other.path / "certificates" / "ca.crt", strange)
    federation.script("key.sh", "site-2")
    federation.script("register.sh", "sites/site-2/key.pub")
    said = refused(
        federation,
        "strange",
        *("--root-certificates", str(strange)),
        *("--auth-supernode-private-key", str(federation.path / "sites" / "site-2" / "key")),
    )
    assert "CERTIFICATE_VERIFY_FAILED" in said


@pytest.mark.chaos
def test_a_site_with_trusted_entities_does_not_run_an_unsigned_app(tmp_path: Path) -> None:
    changes = {"federation": {"min_clients": 1, "wait": 8.0, "verify_names": True}}
    with Federation(tmp_path, changes, tls=True) as federation:
        federation.start_superlink()
        site = federation.set_site("site-1").parent
        reviewer = site / "reviewer"
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", reviewer]
        subprocess.run(make, check=True)
        public_key = reviewer.with_suffix(".pub").read_text().strip()
        (site / "trusted.yaml").write_text(f'fpk_reviewer: "{public_key}"\n')
        federation.script("key.sh", "site-1")
        federation.script("register.sh", "sites/site-1/key.pub")
        federation.start_node("site-1")
        federation.run()
        refusals = [one.reason for one in federation.events() if isinstance(one, ClientRefused)]
        assert refusals == ["The FAB could not be verified."]
        assert not (site / "state").exists()

"""A client's name stays with the key of the node that used it first."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from flwr.proto.node_pb2 import NodeInfo

from command_line import CommandLine
from prelort.errors import ConfigError
from prelort.federation import wire
from prelort.federation.client_manager import RETRY_SECONDS, ClientManager
from prelort.federation.flower import Message
from prelort.federation.site_keys import FILE, SiteKeys
from prelort.federation.transport import Transport
from prelort.methods.interface import Client
from prelort.secure.signatures import fingerprint
from small_federation import SPEC, PlannedGrid, make_properties


def new_key() -> bytes:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class Sites:
    """A grid whose nodes (id -> key and the name that it states) the test exchanges."""

    def __init__(self, folder: Path) -> None:
        self.nodes: dict[int, tuple[bytes, str]] = {}
        self.refused: dict[str, str] = {}
        sites = self

        class KeyGrid(PlannedGrid):
            def get_nodes(self) -> Iterable[NodeInfo]:
                return [NodeInfo(node_id=n, public_key=k) for n, (k, _) in sites.nodes.items()]

        def properties_of(message: Message) -> Message:
            _, name = sites.nodes[message.metadata.dst_node_id]
            return Message(wire.pack(make_properties(Client(name, 4, 10))), reply_to=message)

        grid = KeyGrid({node: [(0.0, properties_of)] for node in range(10)})
        self.keys = SiteKeys(folder)
        transport = Transport(grid, patience=RETRY_SECONDS * 2, clock=grid)
        self.manager = ClientManager(transport, SPEC, self.refused.__setitem__, 10**7, self.keys)

    def connect(self, **nodes: tuple[bytes, str]) -> dict[str, int]:
        """Name -> node of those that are connected once these nodes are online."""
        self.nodes = {int(node.removeprefix("n")): one for node, one in nodes.items()}
        self.refused.clear()
        connected = self.manager.gather(len(nodes))
        return {one.client.name: one.node_id for one in connected}


def test_another_node_cannot_take_a_name_until_the_operator_says_so(tmp_path: Path) -> None:
    first, second = new_key(), new_key()
    sites = Sites(tmp_path)
    assert sites.connect(n1=(first, "hospital"), n2=(second, "bank")) == {"hospital": 1, "bank": 2}
    assert sites.keys.read() == {"hospital": fingerprint(first), "bank": fingerprint(second)}

    stranger = new_key()
    assert sites.connect(n3=(stranger, "hospital")) == {}
    assert f"this name is that of {fingerprint(first)}" in sites.refused["hospital"]
    # Nor with the key of another site, whose own name is its only one.
    assert sites.connect(n2=(second, "hospital")) == {}
    assert sites.connect(n2=(second, "insurance")) == {}
    assert "has the key of 'bank'" in sites.refused["insurance"]

    resumed = Sites(tmp_path)
    assert resumed.connect(n3=(stranger, "hospital")) == {}
    resumed.keys.bind("hospital", stranger)
    assert resumed.connect(n3=(stranger, "hospital"), n1=(first, "hospital")) == {"hospital": 3}


def test_a_node_without_a_key_is_refused(tmp_path: Path) -> None:
    sites = Sites(tmp_path)
    assert sites.connect(n1=(b"", "hospital")) == {}
    assert "its node has no key" in sites.refused["hospital"]


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_trust_takes_the_public_key_and_shows_the_fingerprint_of_ssh_keygen(
    tmp_path: Path, command_line: CommandLine
) -> None:
    file = tmp_path / "key.pub"
    make = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", tmp_path / "key"]
    subprocess.run(make, check=True)
    shown = subprocess.run(["ssh-keygen", "-lf", file], capture_output=True, text=True, check=True)
    expected = shown.stdout.split()[1]
    key = load_ssh_public_key(file.read_bytes())
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert fingerprint(pem) == expected

    trust = ("site", "trust", tmp_path, "hospital")
    assert "holds no run" in command_line(*trust, file).error
    (tmp_path / "config.toml").touch()
    assert "cannot be read as a public key" in command_line(*trust, tmp_path / "key").error
    assert expected in command_line(*trust, file).out
    assert SiteKeys(tmp_path).read() == {"hospital": expected}


def test_a_damaged_file_is_not_ignored(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        SiteKeys(tmp_path).read()

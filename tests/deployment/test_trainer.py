"""The site's trainer as a process, and what reaches the server when something is wrong there."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

from command_line import CommandLine
from prelort import config as configuration
from prelort.deployment import ipc, settings, trainer_client
from prelort.deployment.client import site_app
from prelort.deployment.ipc import Request, address_of
from prelort.deployment.worker import Worker, make_client
from prelort.errors import PrelortError
from prelort.extensions import calling
from prelort.federation import messages, wire
from prelort.federation.content import content_of, text_in
from prelort.federation.flower import Context, Message, RecordDict, identify_process
from prelort.secure.messages import KeysReply, KeysRequest, read
from prelort.secure.signatures import fingerprint

FEDERATION = {
    "threads": 1,
    "data": {"max_train_examples": 12, "max_length": 16},
    "partition": {"by": "iid", "clients": 2},
    "ranks": {"mix": "2, 4", "assign": "in-order"},
    "federation": {"clients_per_round": 1.0},
}


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    file = tmp_path / "federation.toml"
    file.write_text(tomli_w.dumps(FEDERATION))
    return file


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "r"
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "site.toml"
    write(file)
    yield file
    trainer_client.stop(file, seconds=1.0)


def write(file: Path, **trainer: Any) -> None:
    file.write_text(tomli_w.dumps({"partition": 1, "trainer": trainer}))


def query_of(federation: Path, *overrides: str) -> Request:
    return Request("query", str(federation), overrides, "{}")


def send(site: Path, request: Request) -> ipc.Reply:
    return trainer_client.send(site, settings.read(site), request)


def pid_of(site: Path) -> int:
    return int(address_of(site).pid.read_text())


def intro_in(reply: ipc.Reply) -> messages.ClientProperties:
    return wire.header(content_of(reply.text), messages.ClientProperties)


def test_one_process_answers_all_one_after_the_other(site: Path, federation: Path) -> None:
    replies: list[ipc.Reply] = []
    senders = [
        threading.Thread(target=lambda: replies.append(send(site, query_of(federation))))
        for _ in range(3)
    ]
    for thread in senders:
        thread.start()
    for thread in senders:
        thread.join()
    first = pid_of(site)
    assert {intro_in(reply).rank for reply in replies} == {4}
    assert len(replies) == 3
    log = (site.parent / "state" / "trainer.log").read_text()
    assert log.count("serves") == 1
    assert log.count("query: started") == log.count("query: done") == 3

    # Other keys of the federation for another run: the same process, another site.
    assert intro_in(send(site, query_of(federation, "ranks.mix=3, 6"))).rank == 6
    assert pid_of(site) == first
    assert address_of(site).socket.parent.stat().st_mode & 0o077 == 0

    os.kill(first, signal.SIGKILL)  # the next message gets another one
    assert intro_in(send(site, query_of(federation))).rank == 4
    assert pid_of(site) != first
    last = psutil.Process(pid_of(site))
    trainer_client.stop(site)
    last.wait(10)


def test_it_ends_when_it_is_idle(site: Path, federation: Path) -> None:
    write(site, idle_minutes=0.01)
    send(site, query_of(federation))
    while address_of(site).socket.exists():
        threading.Event().wait(0.05)
    assert "idle for 0.6 s: ended" in (site.parent / "state" / "trainer.log").read_text()


def test_one_that_takes_too_much_memory_ends_and_says_so(site: Path, federation: Path) -> None:
    write(site, memory="150MiB")
    with pytest.raises(PrelortError, match="its trainer died twice on this message"):
        send(site, query_of(federation))
    assert "bytes of memory, allowed are" in (site.parent / "state" / "trainer.log").read_text()


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    folder = address_of(site).socket.parent
    folder.chmod(0o755)
    with pytest.raises(PrelortError, match="is not a folder of this user alone"):
        address_of(site)


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path, runtime_folder: Path) -> None:
    elsewhere = runtime_folder / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (runtime_folder / f"prelort-{os.getuid()}").symlink_to(elsewhere)
    with pytest.raises(PrelortError, match="is not a folder of this user alone"):
        address_of(tmp_path / "site.toml")


class TestWhatTheServerLearns:
    """Of an error at a site: its kind, not the file or the row."""

    SECRET = "ward-7-patients"

    def refusal(self, file: Path, request: Request) -> str:
        refused = Worker(file).answer(request).refused
        assert refused is not None
        assert self.SECRET not in refused
        return refused

    def test_of_a_missing_file(self, tmp_path: Path, federation: Path) -> None:
        site = tmp_path / "site.toml"
        source = {"source": str(tmp_path / f"{self.SECRET}.csv")}
        site.write_text(tomli_w.dumps({"name": "a", "rank": 2, "data": source}))
        said = self.refusal(site, query_of(federation))
        assert said == "cannot take part (ConfigError): its log says why"

    def test_of_an_unexpected_error(self, tmp_path: Path, federation: Path) -> None:
        write(tmp_path / "site.toml")
        request = replace(query_of(federation), federation=f"{self.SECRET}\0")  # no valid path
        said = self.refusal(tmp_path / "site.toml", request)
        assert said == "failed (ValueError): its log says why"

    @pytest.mark.parametrize("error", [ValueError, PrelortError])
    def test_of_an_error_in_the_sites_own_code(
        self,
        tmp_path: Path,
        federation: Path,
        monkeypatch: pytest.MonkeyPatch,
        error: type[Exception],
    ) -> None:
        def encode(*_: object) -> None:
            with calling("task Own", "encode()"):
                raise error(f"no number in {self.SECRET}")

        monkeypatch.setattr("prelort.deployment.worker.make_client", encode)
        write(tmp_path / "site.toml")
        said = self.refusal(tmp_path / "site.toml", query_of(federation))
        assert said == "cannot take part (ExtensionError): its log says why"

    def test_of_its_own_mistakes_all(self, tmp_path: Path, federation: Path) -> None:
        write(tmp_path / "site.toml")
        said = self.refusal(tmp_path / "site.toml", Request("train", str(federation), (), "{}"))
        assert said.startswith("malformed header: ")


def test_without_a_warm_trainer_the_app_answers_itself(site: Path, federation: Path) -> None:
    write(site, warm=False)
    identify_process(1)
    context = Context(1, 1, {"site": str(site)}, RecordDict(), {"set": "ranks.mix='3, 6'"})
    message = Message(content_of("{}"), dst_node_id=7, message_type="query")
    reply = site_app(federation)(message, context)
    assert wire.header(reply.content, messages.ClientProperties).rank == 6
    assert not address_of(site).socket.exists()


def test_a_simulated_node_is_dealt_a_client_and_passes_through_mods(federation: Path) -> None:
    seen = []

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        seen.append(message.metadata.message_type)
        return call_next(message, context)

    identify_process(1)
    run = {"run": str(federation.parent / "run"), "set": ""}
    message = Message(content_of("{}"), dst_node_id=7, message_type="query")
    app = site_app(federation, mods=[mod])
    reply = app(message, Context(1, 1, {"partition-id": 1}, RecordDict(), run))
    assert wire.header(reply.content, messages.ClientProperties).rank == 4
    assert seen == ["query"]

    run["set"] = "data.source=sites"
    reply = app(message, Context(1, 1, {"partition-id": 1}, RecordDict(), run))
    assert "is simulated and has no data of its own" in reply.error.reason


@pytest.mark.parametrize(
    "node_config, sentence",
    [
        ({}, "has no site file: start the SuperNode with --node-config"),
        ({"partition-id": 2}, "is one too many: the data are dealt to 2 clients"),
        ({"site": "/nowhere/site.toml"}, "its site file cannot be used: its log says why"),
    ],
)
def test_a_node_without_settings_says_so(
    federation: Path, node_config: dict[str, Any], sentence: str
) -> None:
    identify_process(1)
    context = Context(1, 1, node_config, RecordDict(), {"run": str(federation.parent / "run")})
    message = Message(content_of("{}"), dst_node_id=7, message_type="query")
    reply = site_app(federation)(message, context)
    assert sentence in reply.error.reason


def test_a_site_may_refuse_to_send_an_adapter_that_is_not_masked(
    site: Path, federation: Path
) -> None:
    site.write_text(tomli_w.dumps({"partition": 1, "masked_only": True}))
    identify_process(1)
    context = Context(1, 1, {"site": str(site)}, RecordDict(), {})
    message = Message(content_of('{"masked": null}'), dst_node_id=7, message_type="train")
    reply = site_app(federation)(message, context)
    assert "sends masked replies only (masked_only in its site.toml)" in reply.error.reason
    assert not address_of(site).socket.exists()


def test_a_sites_own_privacy_budget_is_its_clients_limit(site: Path, federation: Path) -> None:
    site.write_text(tomli_w.dumps({"partition": 1, "privacy": {"epsilon": 4.0}}))
    client = make_client(configuration.load(federation), settings.read(site), site)
    assert client.ledger.limit == (4.0, 1e-5)
    assert client.ledger.file.is_relative_to(site.parent / "state")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_a_site_signs_its_keys_with_the_key_of_its_node(
    site: Path, federation: Path, command_line: CommandLine
) -> None:
    make = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", site.parent / "key"]
    subprocess.run(make, check=True)
    own = fingerprint((site.parent / "key.pub").read_bytes())
    request = KeysRequest(session="0" * 32, number=1, blocks=(0, 1))
    identify_process(1)
    context = Context(1, 1, {"site": str(site)}, RecordDict(), {})
    message = Message(content_of(request.model_dump_json()), 7, "query.keys")
    for signing, signer in (({}, ""), ({"key": "key", "peers": "key.pub"}, own)):
        site.write_text(tomli_w.dumps({"partition": 1, **signing}))
        reply = site_app(federation)(message, context).content
        assert read(text_in(reply) or "", KeysReply).signer == signer
    assert f"signs with {own}" in command_line("site", "check", site, "-f", federation).out
    site.write_text(tomli_w.dumps({"partition": 1, "key": "gone", "peers": "key.pub"}))
    assert "its site file cannot be used" in site_app(federation)(message, context).error.reason

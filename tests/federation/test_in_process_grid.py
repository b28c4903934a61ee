import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from prelort.federation.flower import ConfigRecord, Context, Message, MessageType, RecordDict
from prelort.federation.in_process import CLIENT_APP_RAISED
from prelort.federation.transport import Engine, exchange
from small_federation import in_process


def echo(message: Message, context: Context) -> Message:
    """Answers with what it was asked, and its own number."""
    text = f"{message.content['text']['text']} from {context.node_config['partition-id']}"
    return Message(RecordDict({"text": ConfigRecord({"text": text})}), reply_to=message)


def message_to(node: int, text: str = "hello") -> Message:
    content = RecordDict({"text": ConfigRecord({"text": text})})
    return Message(content, dst_node_id=node, message_type=MessageType.TRAIN)


def text_of(reply: Message) -> str:
    return str(reply.content["text"]["text"])


class TestGrid:
    def test_node_ids_are_stable_and_not_the_servers(self) -> None:
        grid = in_process(echo, 3)
        assert list(grid.get_node_ids()) == list(grid.get_node_ids())
        assert len(set(grid.get_node_ids())) == 3
        assert 1 not in grid.get_node_ids()

    def test_each_reply_answers_its_message_and_comes_from_its_node(self) -> None:
        grid = in_process(echo, 3)
        nodes = list(grid.get_node_ids())
        ids = list(grid.push_messages([message_to(node, f"q{node}") for node in nodes]))

        replies = [reply for _ in ids for reply in grid.pull_messages(ids)]

        assert [r.metadata.reply_to_message_id for r in replies] == ids
        assert [r.metadata.src_node_id for r in replies] == nodes
        assert [text_of(r) for r in replies] == [f"q{n} from {i}" for i, n in enumerate(nodes)]

    def test_messages_are_answered_in_the_order_sent_however_they_are_asked_for(self) -> None:
        asked: list[int] = []

        def app(message: Message, context: Context) -> Message:
            asked.append(message.metadata.dst_node_id)
            return echo(message, context)

        grid = in_process(app, 3)
        nodes = list(grid.get_node_ids())
        ids = list(
            grid.push_messages([message_to(node) for node in (nodes[2], nodes[0], nodes[1])])
        )
        for _ in ids:
            list(grid.pull_messages(reversed(ids)))
        assert asked == [nodes[2], nodes[0], nodes[1]]

    def test_nothing_runs_before_its_reply_is_pulled(self) -> None:
        calls: list[int] = []

        def app(message: Message, context: Context) -> Message:
            calls.append(1)
            return echo(message, context)

        grid = in_process(app, 2)
        (first, _second) = grid.push_messages([message_to(node) for node in grid.get_node_ids()])
        assert calls == []
        assert len(list(grid.pull_messages([first]))) == 1
        assert len(calls) == 1
        assert list(grid.pull_messages([first])) == []  # a reply comes once
        assert list(grid.pull_messages(["nobody's"])) == []

    def test_send_and_receive_gives_one_reply_each(self) -> None:
        grid = in_process(echo, 3)
        replies = list(grid.send_and_receive(message_to(n) for n in grid.get_node_ids()))
        assert [text_of(r) for r in replies] == [f"hello from {i}" for i in range(3)]

    def test_a_client_keeps_its_state_between_messages(self) -> None:
        def app(message: Message, context: Context) -> Message:
            count = int(context.state["n"]["n"]) + 1 if "n" in context.state else 1
            context.state["n"] = ConfigRecord({"n": count})
            content = RecordDict({"text": ConfigRecord({"text": str(count)})})
            return Message(content, reply_to=message)

        grid = in_process(app, 2)
        first, second = grid.get_node_ids()
        seen = [
            text_of(reply)
            for node in (first, first, second, first)
            for reply in grid.send_and_receive([message_to(node)])
        ]
        assert seen == ["1", "2", "1", "3"]

    def test_an_exception_becomes_an_error_reply_and_is_logged(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def app(message: Message, context: Context) -> Message:
            if context.node_config["partition-id"] == 1:
                raise ZeroDivisionError("no examples")
            return echo(message, context)

        grid = in_process(app, 3)
        with caplog.at_level(logging.ERROR, logger="prelort"):
            replies = list(grid.send_and_receive(message_to(n) for n in grid.get_node_ids()))

        assert [r.has_error() for r in replies] == [False, True, False]
        assert replies[1].error.code == CLIENT_APP_RAISED
        assert replies[1].error.reason == "ZeroDivisionError: no examples"
        assert replies[1].metadata.src_node_id == list(grid.get_node_ids())[1]
        assert "Traceback" in caplog.text
        assert "no examples" in caplog.text

    def test_an_interrupt_is_not_a_clients_failure(self) -> None:
        def app(message: Message, context: Context) -> Message:
            raise KeyboardInterrupt

        grid = in_process(app, 1)
        with pytest.raises(KeyboardInterrupt):
            list(grid.send_and_receive([message_to(*grid.get_node_ids())]))


class TestOneInFlight:
    def test_a_message_is_made_only_when_the_one_before_it_is_answered(self) -> None:
        grid = in_process(echo, 5)
        made: list[weakref.ref[Any]] = []
        answered = 0

        def messages() -> Iterator[Message]:
            for node in grid.get_node_ids():
                assert len(made) == answered, "a message was made while another waits"
                message = message_to(node)
                made.append(weakref.ref(message.content))
                yield message

        for _reply in exchange(Engine(grid, 1, float("inf")), messages()):
            answered += 1
        assert answered == 5

    def test_contents_are_freed_once_answered(self) -> None:
        def app(message: Message, context: Context) -> Message:
            return Message(RecordDict(), reply_to=message)

        grid = in_process(app, 6)
        made: list[weakref.ref[Any]] = []

        def messages() -> Iterator[Message]:
            for node in grid.get_node_ids():
                assert sum(ref() is not None for ref in made) <= 1
                message = message_to(node)
                made.append(weakref.ref(message.content))
                yield message

        assert len(list(exchange(Engine(grid, 1, float("inf")), messages()))) == 6
        assert not any(ref() for ref in made)

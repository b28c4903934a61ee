"""The in-process engine: a grid whose nodes are calls."""

from __future__ import annotations

import logging
import sys
import threading

import pytest

from prelort.federation.flower import ConfigRecord, Context, Message, MessageType, RecordDict
from prelort.federation.in_process import CLIENT_APP_RAISED, InProcessGrid
from prelort.federation.transport import Transport
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


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_reply_answers_its_message_in_the_order_sent(threads: int) -> None:
    """However the ids are asked for, and however many are answered at a time."""
    configs = [{"partition-id": i} for i in range(5)]
    grid = InProcessGrid(echo, configs, threads=threads)
    nodes = [1003, 1000, 1004, 1001, 1002]
    ids = list(grid.push_messages([message_to(node, f"q{node}") for node in nodes]))
    replies = [reply for _ in ids for reply in grid.pull_messages(reversed(ids))]
    grid.close()
    assert [r.metadata.reply_to_message_id for r in replies] == ids
    assert [r.metadata.src_node_id for r in replies] == nodes
    assert [text_of(r) for r in replies] == [f"q{n} from {n - 1000}" for n in nodes]


def test_nothing_runs_before_its_reply_is_pulled_and_a_reply_comes_once() -> None:
    calls: list[int] = []

    def app(message: Message, context: Context) -> Message:
        calls.append(1)
        return echo(message, context)

    grid = in_process(app, 2)
    (first, _second) = grid.push_messages([message_to(node) for node in grid.get_node_ids()])
    assert calls == []
    assert len(list(grid.pull_messages([first]))) == len(calls) == 1
    assert list(grid.pull_messages([first])) == list(grid.pull_messages(["nobody's"])) == []


def test_threads_answer_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=30)

    def app(message: Message, context: Context) -> Message:
        both.wait()  # broken, and so an error, where the other never comes
        return echo(message, context)

    grid = InProcessGrid(app, [{"partition-id": i} for i in range(2)], threads=2)
    replies = Transport(grid, 4).send_and_receive(message_to(n) for n in grid.get_node_ids())
    assert [reply.has_error() for reply in replies] == [False, False]
    grid.close()


def test_an_exception_becomes_an_error_reply_and_is_logged(
    caplog: pytest.LogCaptureFixture,
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
    assert replies[1].metadata.src_node_id == 1001
    assert "Traceback" in caplog.text


def test_an_interrupt_is_not_a_clients_failure() -> None:
    def app(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    grid = in_process(app, 1)
    with pytest.raises(KeyboardInterrupt):
        list(grid.send_and_receive([message_to(1000)]))


def test_a_batch_that_raises_is_answered_one_by_one_with_its_memory_free() -> None:
    """Outside the handler, whose traceback would hold the batch."""
    handled: list[object] = []

    def app(message: Message, context: Context) -> Message:
        handled.append(sys.exc_info()[1])
        return echo(message, context)

    def fails(messages: object) -> list[Message]:
        raise RuntimeError("no memory")

    configs = [{"partition-id": i} for i in range(2)]
    grid = InProcessGrid(app, configs, answer_batched=fails, clients_per_batch=2)
    ids = grid.push_messages([message_to(node) for node in grid.get_node_ids()])
    assert [reply.has_error() for reply in grid.pull_messages(ids)] == [False, False]
    assert handled == [None, None]

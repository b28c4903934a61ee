"""Conversations in the tokenizer's chat template, loss on the assistant's turns only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from datasets import Dataset

from prelort.config import DataConfig
from prelort.errors import ConfigError
from prelort.tasks._batches import tokenise
from prelort.tasks._causal import CausalTask, answer_example
from prelort.tasks.columns import cells, require
from prelort.tasks.interface import IGNORED, Example

Message = dict[str, str]


class Chat(CausalTask):
    """A row is a list of messages, each with a ``role`` and a ``content``."""

    name = "chat"
    metrics: tuple[str, ...] = ("perplexity", "rouge_l")
    allowed_metrics: tuple[str, ...] = ("perplexity", "rouge_l")

    def columns(self, config: DataConfig, available: Sequence[str]) -> tuple[str, ...]:
        """The column of messages; raises `ConfigError` if it does not exist."""
        require("data.messages_column", config.messages_column, available)
        return (config.messages_column,)

    def encode(
        self, rows: Dataset, tokenizer: Any, config: DataConfig, labels: Sequence[str]
    ) -> list[Example]:
        """One example a conversation, up to and with its last assistant turn.

        What the assistant's turns add to the conversation (their end tokens included, their
        headers not) is learnt. Too long a conversation loses its oldest tokens first. One without
        an assistant turn gives no example. Raises `ConfigError` if the tokenizer has no chat
        template, if the template refuses a conversation, or for what is not a list of messages.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the tokenizer has no chat template, which the task 'chat' needs: use an "
                "instruction-tuned model, or the task 'instruction'"
            )
        conversations = []
        for cell in cells(rows, config.messages_column):
            conversation = _messages(cell, config.messages_column)
            while conversation and conversation[-1]["role"] != "assistant":
                conversation.pop()
            if conversation:
                conversations.append(conversation)
        # The template need not mark the assistant's tokens: they are what a prefix of the
        # conversation gains from an assistant's turn. All prefixes go to the tokenizer at once.
        rendered = [_prefixes(tokenizer, conversation) for conversation in conversations]
        tokens = iter(tokenise(tokenizer, [text for texts in rendered for text in texts]))
        return [
            _example([next(tokens) for _ in texts], conversation[-1]["content"], config.max_length)
            for texts, conversation in zip(rendered, conversations, strict=True)
        ]


def _prefixes(tokenizer: Any, conversation: Sequence[Message]) -> list[str]:
    """Before and after each assistant turn: the conversation so far, as the template has it."""
    texts = []
    for number, message in enumerate(conversation):
        if message["role"] == "assistant":
            texts.append(_render(tokenizer, conversation[:number], prompt=True))
            texts.append(_render(tokenizer, conversation[: number + 1], prompt=False))
    return texts


def _render(tokenizer: Any, conversation: Sequence[Message], prompt: bool) -> str:
    if not conversation:
        return ""  # many templates fail without a message
    try:
        text: str = tokenizer.apply_chat_template(
            list(conversation), tokenize=False, add_generation_prompt=prompt
        )
    except (
        Exception
    ) as error:  # a template raises what it likes, e.g. on roles that do not take turns
        raise ConfigError(f"the chat template refuses a conversation: {error}") from None
    return text


def _example(prefixes: Sequence[Sequence[int]], reference: str, max_length: int) -> Example:
    """``prefixes`` are the token ids before and after each assistant turn, in their order."""
    whole = prefixes[-1]
    labels = [IGNORED] * len(whole)
    start = 0
    for before, after in zip(prefixes[::2], prefixes[1::2], strict=True):
        # Common beginnings, because a template may render earlier turns anew (dropping their
        # thoughts, say), and a token may span the border.
        start, end = _common(before, whole), _common(after, whole)
        labels[start:end] = whole[start:end]
    return answer_example(whole[:start], labels[:start], whole[start:], reference, max_length)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the common beginning."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _messages(cell: Any, column: str) -> list[Message]:
    """A cell as messages; raises `ConfigError` if it is something else."""
    if isinstance(cell, Mapping) and {"role", "content"} <= cell.keys():
        # A table may hold the columns of a list of messages instead of the list.
        cell = [
            {"role": role, "content": content}
            for role, content in zip(cell["role"], cell["content"], strict=True)
        ]
    valid = isinstance(cell, list) and all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in cell
    )
    if not valid:
        raise ConfigError(
            f"column {column!r} must hold lists of messages with 'role' and 'content' as text, "
            f"and one is {str(cell)[:80]!r}"
        )
    return [{"role": message["role"], "content": message["content"]} for message in cell]

"""Conversations in the tokenizer's chat template, loss on the assistant's turns only."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from datasets import Dataset

from prelort.config import DataConfig
from prelort.errors import ConfigError
from prelort.tasks._batches import tokenise
from prelort.tasks._causal import CausalTask, answer_example
from prelort.tasks.columns import cells, find
from prelort.tasks.interface import IGNORED, Example

Message = dict[str, Any]

MESSAGES_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_AND_COMPLETION = ("prompt", "completion")
SYSTEM = "system"
"""The column of a text that opens the conversation, beside some data sets' messages."""

ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai"), "assistant"),
}
"""Names of the roles, ShareGPT's among them, without regard to case; others stay as they are."""

MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag of a chat template that says which tokens are the assistant's."""

STAND_IN = "\ue000"
"""Replaces a content, to find the header before it."""


class Chat(CausalTask):
    """A row is a list of messages, or a list that prompts and one that completes it."""

    name = "chat"
    metrics: tuple[str, ...] = ("perplexity", "rouge_l")

    def columns(self, config: DataConfig, available: Sequence[str]) -> tuple[str, ...]:
        """The column of messages, or those of prompt and completion; raises `ConfigError`."""
        named, there = config.messages_column, {*available}
        if named is None and not there & {*MESSAGES_COLUMNS} and there >= {*PROMPT_AND_COMPLETION}:
            return PROMPT_AND_COMPLETION
        found = find("data.messages_column", named, MESSAGES_COLUMNS, available)
        return (SYSTEM, found) if SYSTEM in available else (found,)

    def check(self, rows: Dataset, config: DataConfig, where: str) -> None:
        """Raise `ConfigError` naming the first row of ``where`` that is no conversation.

        Warns of conversations without a turn to learn.
        """
        without: list[int] = []
        roles: set[str] = set()
        for number, conversation in enumerate(self._conversations(rows, config, where), start=1):
            own = {message["role"] for message in conversation}
            if "assistant" not in own:
                without.append(number)
                roles |= own
        if without:
            warnings.warn(
                f"{where}: {len(without)} of {len(rows)} conversations have no turn of the role "
                f"'assistant' and are left out (the first is row {without[0]}; their roles are "
                f"{', '.join(sorted(map(repr, roles))) or 'none'})",
                stacklevel=2,
            )

    def encode(
        self, rows: Dataset, tokenizer: Any, config: DataConfig, labels: Sequence[str]
    ) -> list[Example]:
        """One example a conversation, up to and with its last assistant turn.

        What the template marks as the assistant's is learnt; if it marks nothing, what the
        assistant's turns add to the conversation (their end tokens included, their headers not).
        Too long a conversation loses its oldest tokens first. One without an assistant turn gives
        no example. Raises `ConfigError` if the tokenizer has no chat template, if the template
        refuses a conversation, or for what is not a list of messages.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the tokenizer has no chat template, which the task 'chat' needs: use an "
                "instruction-tuned model, set model.chat_template, or use the task 'instruction'"
            )
        conversations = []
        for conversation in self._conversations(rows, config, "data"):
            while conversation and conversation[-1]["role"] != "assistant":
                conversation.pop()
            if conversation:
                conversations.append(conversation)
        if MARKS_ANSWERS.search(tokenizer.get_chat_template()):
            marked = [_marked(tokenizer, one, config.max_length) for one in conversations]
            return [example for example in marked if example is not None]
        # Otherwise the assistant's tokens are what a prefix of the conversation gains from an
        # assistant's turn. All prefixes go to the tokenizer at once.
        rendered = [_prefixes(tokenizer, conversation) for conversation in conversations]
        tokens = iter(tokenise(tokenizer, [text for texts in rendered for text in texts]))
        return [
            _example([next(tokens) for _ in texts], conversation[-1]["content"], config.max_length)
            for texts, conversation in zip(rendered, conversations, strict=True)
        ]

    def _conversations(
        self, rows: Dataset, config: DataConfig, where: str
    ) -> Iterator[list[Message]]:
        names = self.columns(config, rows.column_names) if len(rows) else ()
        parts = (cells(rows, name) for name in names)
        for number, row in enumerate(zip(*parts, strict=True), start=1):
            conversation: list[Message] = []
            for name, cell in zip(names, row, strict=True):
                if name == SYSTEM and len(names) > 1 and (cell is None or isinstance(cell, str)):
                    conversation += [{"role": "system", "content": cell}] if cell else []
                    continue
                try:
                    conversation += _messages(cell)
                except ValueError as error:
                    raise ConfigError(f"{where}: row {number}, column {name!r}: {error}") from None
            yield conversation


def _marked(tokenizer: Any, conversation: Sequence[Message], max_length: int) -> Example | None:
    """The example of a conversation whose template marks the assistant's tokens, if any."""
    encoded = _templated(
        tokenizer, conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    if not any(mask):
        return None
    end = len(mask) - mask[::-1].index(1)
    start = next(i for i in range(end, 0, -1) if not mask[i - 1])
    labels = [token if mark else IGNORED for token, mark in zip(ids, mask, strict=True)]
    reference = conversation[-1]["content"]
    return answer_example(ids[:start], labels[:start], ids[start:end], reference, max_length)


def _prefixes(tokenizer: Any, conversation: Sequence[Message]) -> list[str]:
    """Before and after each assistant turn: the conversation so far, as the template has it."""
    texts = []
    for number, message in enumerate(conversation):
        if message["role"] == "assistant":
            texts.append(_before(tokenizer, conversation, number))
            texts.append(_templated(tokenizer, conversation[: number + 1], tokenize=False))
    return texts


def _before(tokenizer: Any, conversation: Sequence[Message], number: int) -> str:
    if number == 0:  # many templates fail without a message
        text: str = _templated(
            tokenizer, [{**conversation[0], "content": STAND_IN}], tokenize=False
        )
        return text.partition(STAND_IN)[0] if STAND_IN in text else ""
    before: str = _templated(
        tokenizer, conversation[:number], tokenize=False, add_generation_prompt=True
    )
    return before


def _templated(tokenizer: Any, conversation: Sequence[Message], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(list(conversation), **options)
    except Exception as error:  # it raises what it likes, e.g. on roles that do not take turns
        raise ConfigError(
            f"the chat template refuses the conversation that begins with "
            f"{str(conversation[0]['content'])[:60]!r}: {error}"
        ) from None


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


def _messages(cell: Any) -> list[Message]:
    """A cell as messages with the usual roles; raises ValueError if it is something else."""
    if isinstance(cell, Mapping):
        # A table may hold the columns of a list of messages instead of the list.
        columns = [value for value in cell.values() if isinstance(value, list)]
        if columns and len(columns) == len(cell):
            cell = [dict(zip(cell, values, strict=True)) for values in zip(*columns, strict=True)]
    if not isinstance(cell, list):
        raise ValueError(f"{str(cell)[:80]!r} is no list of messages")
    return [_message(value) for value in cell]


def _message(value: Any) -> Message:
    known = dict(value) if isinstance(value, Mapping) else {}
    role = known.pop("role", None) or known.pop("from", None)
    content = known.pop("content", None)
    content = known.pop("value", None) if content is None else content
    if isinstance(content, list):
        content = _joined(content)
    if content is None and known.get("tool_calls"):
        content = ""
    if not (isinstance(role, str) and isinstance(content, str)):
        raise ValueError(
            f"a message has 'role' and 'content' (or 'from' and 'value') as text, and one is "
            f"{str(value)[:80]!r}"
        )
    others = {key: value for key, value in known.items() if value is not None}
    return {**others, "role": ROLES.get(role.lower(), role), "content": content}


def _joined(parts: list[Any]) -> str | None:
    """The text of a content in parts; None unless all of them are text."""
    texts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        for part in parts
    ]
    return "".join(text for text in texts if text) if None not in texts else None

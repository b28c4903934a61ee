from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from byte_tokens import TEMPLATE, learnt, make_tokenizer, read
from datasets import Dataset

from prelort.config import DataConfig, ModelConfig
from prelort.errors import ConfigError
from prelort.models.base import load_tokenizer
from prelort.tasks import get
from prelort.tasks.interface import Example

TASK = get("chat")


def say(*turns: str) -> list[dict[str, str]]:
    """Messages from 'u: text', 'a: text' and 's: text'."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]


def encode(
    conversations: list[Any], tokenizer: Any, max_length: int = 128, column: str = "messages"
) -> list[Example]:
    rows = Dataset.from_dict({column: conversations})
    config = DataConfig(max_length=max_length, messages_column=column)
    return list(TASK.encode(rows, tokenizer, config, ()))


def test_the_assistants_turns_are_learnt(chat_tokenizer: Any) -> None:
    (example,) = encode([say("u: hi", "a: hello", "u: bye", "a: ciao")], chat_tokenizer)
    text = "<user>hi<end><assistant>hello<end><user>bye<end><assistant>ciao<end>"
    assert read(chat_tokenizer, example.input_ids) == text
    assert learnt(chat_tokenizer, example) == "hello<end>|ciao<end>"
    prompt = example.input_ids[: example.prompt_length]
    assert read(chat_tokenizer, prompt) == text.removesuffix("ciao<end>")
    assert example.reference == "ciao"


def test_conversations_are_not_mixed_up(chat_tokenizer: Any) -> None:
    draw = random.Random(0)
    conversations = [
        say(*(f"{role}: {i}{k}" for k in range(draw.randint(1, 4)) for role in "ua"))
        for i in range(10)
    ]
    together = encode(conversations, chat_tokenizer)
    apart = [encode([conversation], chat_tokenizer)[0] for conversation in conversations]
    assert together == apart


def test_a_conversation_ends_with_its_last_assistant_turn(chat_tokenizer: Any) -> None:
    examples = encode([say("u: hi", "a: hello", "u: bye"), say("u: hi")], chat_tokenizer)
    assert [read(chat_tokenizer, e.input_ids) for e in examples] == [
        "<user>hi<end><assistant>hello<end>"
    ]


def test_an_assistant_may_begin(chat_tokenizer: Any) -> None:
    (example,) = encode([say("a: hello", "u: hi", "a: so")], chat_tokenizer)
    assert read(chat_tokenizer, example.input_ids).startswith("<assistant>hello<end><user>")
    assert learnt(chat_tokenizer, example) == "hello<end>|so<end>"


def test_the_template_may_mark_what_the_assistant_says() -> None:
    answer = "{% generation %}{{ message['content'] }}<end>{% endgeneration %}\n"
    template = (
        "{% for message in messages %}<{{ message['role'] }}>"
        + f"{{% if message['role'] == 'assistant' %}}{answer}"
        + "{% else %}{{ message['content'] }}<end>{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(template=template)
    first, second = encode(
        [say("a: hello", "u: hi", "a: so"), say("u: q", "a: yes", "u: bye")], tokenizer
    )
    assert learnt(tokenizer, first) == "hello<end>|so<end>"
    assert read(tokenizer, first.input_ids[: first.prompt_length]).endswith("hi<end><assistant>")
    assert learnt(tokenizer, second) == "yes<end>"
    assert (
        encode([say("a: ")], make_tokenizer(template=template.replace("<end>{% endg", "{% endg")))
        == []
    )


def test_a_template_may_drop_thoughts_from_earlier_turns() -> None:
    # As reasoning models do: only the last turn keeps what stands before the bar.
    content = "{{ message['content'] if loop.last else message['content'].split('|')[-1] }}"
    template = TEMPLATE.replace("{{ message['content'] }}", content)
    tokenizer = make_tokenizer(template=template)
    (example,) = encode([say("u: q", "a: xx|yes", "u: r", "a: zz|no")], tokenizer)
    text = "<user>q<end><assistant>yes<end><user>r<end><assistant>zz|no<end>"
    assert read(tokenizer, example.input_ids) == text
    # What was rendered anew is not learnt, for no prefix of the conversation ends so.
    assert learnt(tokenizer, example) == "zz|no<end>"
    assert read(tokenizer, example.input_ids[: example.prompt_length]).endswith("<assistant>")


def test_a_template_without_a_generation_prompt() -> None:
    tokenizer = make_tokenizer(template=TEMPLATE.split("{% if")[0])
    (example,) = encode([say("u: hi", "a: hello")], tokenizer)
    assert learnt(tokenizer, example) == "<assistant>hello<end>"


def test_too_long_a_conversation_loses_its_oldest_tokens(chat_tokenizer: Any) -> None:
    conversation = say("u: first", "a: one", "u: second", "a: two")
    (example,) = encode([conversation], chat_tokenizer, max_length=16)
    assert read(chat_tokenizer, example.input_ids) == "ne<end><user>second<end><assistant>two<end>"
    assert learnt(chat_tokenizer, example) == "ne<end>|two<end>"
    assert read(chat_tokenizer, example.input_ids[example.prompt_length :]) == "two<end>"
    (example,) = encode([say("u: hi", "a: 0123456789")], chat_tokenizer, max_length=8)
    assert read(chat_tokenizer, example.input_ids) == "<assistant>0123456"


def test_columns_of_messages_are_messages(chat_tokenizer: Any) -> None:
    columns = {"role": ["user", "assistant"], "content": ["hi", "hello"]}
    (example,) = encode([columns], chat_tokenizer, column="talk")
    assert learnt(chat_tokenizer, example) == "hello<end>"


def test_needs_a_chat_template(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="the tokenizer has no chat template, which the task 'ch"):
        encode([say("u: hi", "a: hello")], tokenizer)


def test_a_refusal_of_the_template_is_told() -> None:
    tokenizer = make_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="begins with 'hi': roles must alternate"):
        encode([say("u: hi", "a: hello")], tokenizer)


@pytest.mark.parametrize(
    "cell",
    [
        "hi",
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        ["hi"],
        [{"role": "user", "content": [{"type": "image", "text": None}]}],
        [{"role": "user", "text": "hi"}],
    ],
)
def test_names_the_row_that_is_no_conversation(cell: Any) -> None:
    rows = Dataset.from_dict({"messages": [None, cell] if cell == "hi" else [[], cell]})
    number = 1 if cell == "hi" else 2
    with pytest.raises(ConfigError, match=f"data.source: row {number}, column 'messages': "):
        TASK.check(rows, DataConfig(), "data.source")


SHAREGPT = [
    {"from": "system", "value": "S"},
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "hello"},
]
TOOL = [
    {"role": "User", "content": "hi", "tool_calls": None},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
    {"role": "tool", "content": "3", "tool_calls": None},
    {"role": "Bot", "content": "hello", "tool_calls": None},
]
PARTS = [
    {"role": role, "content": [{"type": "text", "text": half} for half in (text[:1], text[1:])]}
    for role, text in (("user", "hi"), ("assistant", "hello"))
]


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"conversations": SHAREGPT, "id": "x"}, "<system>S<end><user>hi<end>"),
        ({"messages": PARTS}, "<user>hi<end>"),
        ({"messages": say("u: hi", "a: hello"), "system": "S"}, "<system>S<end><user>hi<end>"),
        ({"messages": TOOL}, "<user>hi<end><assistant><end><tool>3<end>"),
        ({"prompt": say("u: hi"), "completion": say("a: hello")}, "<user>hi<end>"),
    ],
)
def test_formats_of_the_hub(chat_tokenizer: Any, row: dict[str, Any], prompt: str) -> None:
    (example,) = TASK.encode(Dataset.from_list([row]), chat_tokenizer, DataConfig(), ())
    assert read(chat_tokenizer, example.input_ids) == f"{prompt}<assistant>hello<end>"
    assert learnt(chat_tokenizer, example).split("|")[-1] == "hello<end>"
    assert example.reference == "hello"


def test_says_how_many_conversations_have_nothing_to_learn() -> None:
    other = [*say("u: hi"), {"role": "zoe", "content": "hello"}]
    rows = Dataset.from_dict({"messages": [say("u: hi", "a: hello"), other]})
    with pytest.warns(
        UserWarning, match="d: 1 of 2 conv.* is row 2; their roles are 'user', 'zoe'"
    ):
        TASK.check(rows, DataConfig(), "d")


def test_a_configured_template_replaces_the_tokenizers(tmp_path: Path, tiny_llama: Path) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    make_tokenizer(template=TEMPLATE).save_pretrained(base)
    template = "{% for message in messages %}{{ message['content'] }}<end>{% endfor %}"
    tokenizer = load_tokenizer(ModelConfig(name=str(base), chat_template=template))
    (example,) = encode([say("u: hi", "a: hello")], tokenizer)
    assert read(tokenizer, example.input_ids) == "hi<end>hello<end>"
    assert learnt(tokenizer, example) == "hello<end>"
    wrong = load_tokenizer(ModelConfig(name=str(base), chat_template="{% for x %}"))
    with pytest.raises(ConfigError, match="the chat template refuses the conversation"):
        encode([say("u: hi", "a: hello")], wrong)

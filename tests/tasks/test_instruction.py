from __future__ import annotations

from typing import Any

import pytest
from byte_tokens import learnt, make_tokenizer, read
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.config import DataConfig
from prelort.errors import ConfigError
from prelort.tasks import get
from prelort.tasks.interface import IGNORED, Example

TASK = get("instruction")


def encode(prompt: str, completion: str | int, tokenizer: Any, max_length: int = 64) -> Example:
    rows = Dataset.from_dict({"instruction": [prompt], "answer": [completion]})
    config = DataConfig(prompt_template="{instruction}\n", max_length=max_length)
    (example,) = TASK.encode(rows, tokenizer, config, ())
    return example


def test_the_completion_and_eos_are_learnt(tokenizer: Any) -> None:
    example = encode("say yes", "yes", tokenizer)
    assert read(tokenizer, example.input_ids) == "say yes\nyes<eos>"
    assert learnt(tokenizer, example) == "yes<eos>"
    assert read(tokenizer, example.input_ids[: example.prompt_length]) == "say yes\n"
    assert example.reference == "yes"


def test_bos_where_the_tokenizer_puts_it() -> None:
    tokenizer = make_tokenizer(bos=True)
    example = encode("say yes", "yes", tokenizer)
    assert read(tokenizer, example.input_ids) == "<bos>say yes\nyes<eos>"
    assert read(tokenizer, example.input_ids[: example.prompt_length]) == "<bos>say yes\n"


@pytest.mark.parametrize("bos", [False, True])
@settings(max_examples=60, deadline=None)
@given(prompt=st.integers(1, 40), completion=st.integers(0, 40), length=st.integers(8, 50))
def test_truncation_cuts_the_prompt_on_the_left_before_the_completion(
    bos: bool, prompt: int, completion: int, length: int
) -> None:
    tokenizer = make_tokenizer(bos=bos)
    texts = "".join(chr(97 + i % 26) for i in range(prompt)), "X" * completion
    example = encode(*texts, tokenizer, length)
    before = ["<bos>"] * bos
    whole_prompt, answer = [*before, *texts[0], "\n"], [*texts[1], "<eos>"]
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in example.input_ids]
    tokens = ["\n" if token == "Ċ" else token for token in tokens]
    kept = answer[: length - 1]
    room = length - len(kept)
    if len(whole_prompt) > room:
        whole_prompt = before + whole_prompt[len(whole_prompt) - room + bos :]
    assert tokens == whole_prompt + kept
    assert example.labels == [IGNORED] * len(whole_prompt) + example.input_ids[len(whole_prompt) :]
    assert example.prompt_length == len(whole_prompt)


@pytest.mark.parametrize(
    "row, text",
    [
        ({"prompt": "The sky is", "completion": " blue"}, "The sky is| blue<eos>"),
        ({"response": "A", "instruction": "Q"}, "Q\n\n|A<eos>"),
        ({"instruction": "Q", "context": "C", "response": "A", "id": 7}, "Q\n\nC\n\n|A<eos>"),
        ({"instruction": "Q", "input": "", "output": "A", "text": "x"}, "Q\n\n|A<eos>"),
        ({"Instruction": "Q", "Input": "C", "Output": "A"}, "Q\n\nC\n\n|A<eos>"),
        ({"question": "Q", "answer": "A"}, "Q\n\n|A<eos>"),
    ],
)
def test_usual_columns_need_no_template(tokenizer: Any, row: dict[str, Any], text: str) -> None:
    (example,) = TASK.encode(Dataset.from_list([row]), tokenizer, DataConfig(), ())
    prompt, answer = text.split("|")
    assert read(tokenizer, example.input_ids) == prompt + answer
    assert learnt(tokenizer, example) == answer


def test_a_column_of_the_template_is_no_completion() -> None:
    config = DataConfig(prompt_template="{output}\n")
    assert TASK.columns(config, ["output", "answer"]) == ("answer", "output")


@pytest.mark.parametrize(
    "values, available, message",
    [
        ({}, ["ask", "answer"], r"data\.prompt_template is not set, and none of the usual names"),
        (
            {"prompt_template": "{q}{c}"},
            ["q", "answer"],
            r"prompt_template: column = 'c' is not a column: the",
        ),
        ({"prompt_template": "{q}"}, ["q"], r"data\.completion_column is not set, and none of the"),
        ({"prompt_template": "{q"}, ["q"], r"data\.prompt_template = '{q' is not allowed"),
        (
            {"prompt_template": "{q}", "completion_column": "a"},
            ["q"],
            r"data\.completion_column = 'a' is not a column: the columns are 'q'",
        ),
    ],
)
def test_names_what_is_missing(values: dict[str, Any], available: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TASK.columns(DataConfig(**values), available)

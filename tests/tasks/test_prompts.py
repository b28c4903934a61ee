from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelort.config import DataConfig
from prelort.errors import ConfigError
from prelort.tasks.instruction import template
from prelort.tasks.prompts import fields, render

DEFAULT = template(DataConfig(), ["instruction", "context"])


@pytest.mark.parametrize(
    "template, values, prompt",
    [
        (DEFAULT, {"instruction": "Q", "context": "C"}, "Q\n\nC\n\n"),
        (DEFAULT, {"instruction": "Q", "context": ""}, "Q\n\n"),
        (DEFAULT, {"instruction": "Q", "context": " \n"}, "Q\n\n"),
        (DEFAULT, {"instruction": "", "context": "C"}, "C\n\n"),
        (DEFAULT, {"instruction": "Q\n\n\nQ", "context": "\n\nC"}, "Q\n\n\nQ\n\n\n\nC\n\n"),
        ("{q}\n{c}\nA:", {"q": "Q", "c": ""}, "Q\nA:"),
        ("{q}\n\n{c}\nA:", {"q": "Q", "c": ""}, "Q\n\nA:"),
        ("{q}\n\n{c}", {"q": "Q", "c": ""}, "Q"),
        ("{q}\n\nIn:\n{c}\n\nOut:\n", {"q": "Q", "c": ""}, "Q\n\nOut:\n"),
        ("{q}\n\nIn:\n{c}\n\nOut:\n", {"q": "Q", "c": "C"}, "Q\n\nIn:\nC\n\nOut:\n"),
        ("In: {c}\nQ: {q}\nA: ", {"q": "Q", "c": ""}, "Q: Q\nA: "),
        ("{a} and {b}", {"a": "", "b": "B"}, " and B"),
        ("\n\n{q}\n\n\n", {"q": "Q"}, "\n\nQ\n\n\n"),
        ("{{{q}}}", {"q": "{x}"}, "{{x}}"),
        ("{a.b}", {"a.b": "dot"}, "dot"),
        ("fixed\n\n", {}, "fixed\n\n"),
        ("", {}, ""),
    ],
)
def test_empty_columns_leave_no_gap(template: str, values: dict[str, str], prompt: str) -> None:
    assert render(template, values) == prompt


@given(
    template=st.lists(st.sampled_from(["{a}", "{b}", "\n", "x", " "])).map("".join),
    a=st.text(min_size=1).filter(str.strip),
    b=st.text(min_size=1).filter(str.strip),
)
def test_without_empty_columns_it_is_str_format(template: str, a: str, b: str) -> None:
    lines = [line if line.strip() else "" for line in template.split("\n")]
    assert render(template, {"a": a, "b": b}) == "\n".join(lines).format(a=a, b=b)


def test_fields_are_the_columns_in_order_once() -> None:
    assert fields("{b} {a}\n{b} {{c}}") == ("b", "a")


@pytest.mark.parametrize("template", ["{", "}", "{a", "{}", "{a!r}", "{a:>3}"])
def test_refuses_braces_that_name_no_column(template: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.prompt_template = .* is not allowed"):
        fields(template)

from __future__ import annotations

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from prelort.errors import ConfigError
from prelort.tasks import columns


def test_the_configured_column_goes_before_the_usual_ones() -> None:
    assert columns.find("data.text_column", "b", ("text",), ["text", "b"]) == "b"


def test_usual_names_are_tried_in_their_order_without_regard_to_case() -> None:
    assert columns.find("k", None, ("text", "sentence"), ["sentence", "Text"]) == "Text"


def test_says_which_of_several_usual_columns_is_read() -> None:
    with pytest.warns(UserWarning, match="k is not set: column 'b' is read, and not 'A'"):
        assert columns.find("k", None, ("b", "a"), ["A", "b", "c"]) == "b"


def test_says_that_most_rows_have_no_text() -> None:
    rows = Dataset.from_dict({"text": ["a", " ", ""]})
    with pytest.warns(UserWarning, match="d: 2 of 3 rows have no text in column 'text'"):
        columns.require_texts(rows, ["text"], "d")


def test_says_that_classes_are_almost_the_same() -> None:
    rows = Dataset.from_dict({"y": ["good", "bad", "Good "]})
    with pytest.warns(UserWarning, match="d: '.ood ?' and '.ood ?' in column 'y' are two classes"):
        assert columns.class_order(rows, "y", "d") == ("Good ", "bad", "good")


def test_names_what_is_missing_and_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"k = 'c' is not a column: the columns are 'a', 'b'"):
        columns.find("k", "c", ("text",), ["a", "b"])
    with pytest.raises(ConfigError, match=r"k is not set, and none of the usual names \(text\) is"):
        columns.find("k", None, ("text",), ["a", "b"])


def test_cells_as_text() -> None:
    rows = Dataset.from_dict(
        {"a": [1.0, 2.5, None], "b": [True, False, None], "c": ["x", "", None]}
    )
    assert columns.texts(rows, "a") == ["1", "2.5", ""]
    assert columns.texts(rows, "b") == ["True", "False", ""]
    assert columns.texts(rows, "c") == ["x", "", ""]
    with pytest.raises(ConfigError, match=r"data: row 2 has list \['x'\] in column 'd', where"):
        columns.texts(Dataset.from_dict({"d": [None, ["x"]]}), "d")


def test_class_names() -> None:
    features = Features({"label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"label": [1, 0, -1, None]}, features=features)
    assert columns.names(rows, "label") == ["yes", "no", None, None]
    with pytest.raises(ConfigError, match="here: row 3 has no value in column 'label'"):
        columns.class_names(rows, "label", "here")


def test_class_order_is_by_number_or_alphabet() -> None:
    text = Dataset.from_dict({"n": ["10", "-1", "9"], "s": ["b", "10", "a"]})
    assert columns.class_order(text, "n", "") == ("-1", "9", "10")
    assert columns.class_order(text, "s", "") == ("10", "a", "b")
    assert columns.class_order(text.cast_column("n", Value("int64")), "n", "") == ("-1", "9", "10")


@pytest.mark.parametrize(
    "cells, message",
    [
        ([1.0, 0.25, 1.0], "row 2 has 0.25 in column 'y', which is a measurement and no class"),
        (["1", "1e-3", "1"], "row 2 has 1e-3 in column 'y'"),
        ([1.0, float("nan")], "row 2 has no value in column 'y'"),
        (range(40), "column 'y' has 40 different values in 40 rows"),
        ([f"a sentence {n // 2}" for n in range(43)], "22 different values in 43 rows"),
    ],
)
def test_measurements_and_texts_are_no_classes(cells: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"data.source: .*{message}"):
        columns.class_order(Dataset.from_dict({"y": list(cells)}), "y", "data.source")


@pytest.mark.parametrize("cells", [[1.0, 5.0], ["nan", "inf"], [f"{n // 2}" for n in range(44)]])
def test_whole_numbers_and_words_are_classes(cells: list[Any]) -> None:
    assert len(columns.class_order(Dataset.from_dict({"y": cells}), "y", "")) == len(set(cells))

"""The corpus made of the Python standard library's own source."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from datasets import Dataset

from prelort.data import standard_library
from prelort.data.standard_library import find_clients, load, split
from prelort.errors import PrelortError


@pytest.fixture(scope="module")
def splits() -> tuple[Dataset, Dataset]:
    """The corpus of the Python that runs the tests."""
    return load()


def write(folder: Path, relative: str, lines: int = 2_500) -> None:
    """Write a module of this many numbered 20-byte lines that no other module has."""
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = relative.replace("/", "_")[:10]
    path.write_text("".join(f"{stem:10} = {number:06}\n" for number in range(lines)))


def test_every_client_is_in_both_splits_which_are_disjoint(
    splits: tuple[Dataset, Dataset],
) -> None:
    train, test = splits
    assert set(train["client"]) == set(test["client"])
    assert len(set(train["client"])) >= 16
    assert len({*train["path"], *test["path"]}) == len(train) + len(test)
    assert not set(train["text"]) & set(test["text"])
    for first, second in zip(splits, load(), strict=True):
        assert first.to_dict() == second.to_dict()


def test_texts_are_files_of_the_library_or_lines_of_them(splits: tuple[Dataset, Dataset]) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    for part in splits:
        for row in part:
            name, _, lines = row["path"].partition(":")
            text = (library / name).read_text(encoding="utf-8", errors="replace")
            if lines:
                first, last = map(int, lines.split("-"))
                text = "".join(text.splitlines(keepends=True)[first - 1 : last])
            assert row["text"] == text


def test_four_fifths_of_every_client_are_for_training(splits: tuple[Dataset, Dataset]) -> None:
    sizes = []
    for part in splits:
        size: dict[str, int] = {}
        for row in part:
            size[row["client"]] = size.get(row["client"], 0) + len(row["text"].encode())
        sizes.append(size)
    train, test = sizes
    for client in train:
        total = train[client] + test[client]
        assert standard_library.MINIMUM_BYTES <= total <= standard_library.MAXIMUM_BYTES
        assert 0.08 <= test[client] / total <= 0.3, client


def test_modules_fill_up_where_packages_are_missing(tmp_path: Path) -> None:
    write(tmp_path, "json/encoder.py")
    write(tmp_path, "json/test/big.py")
    write(tmp_path, "html/entities.py", lines=100)  # too small for a client
    write(tmp_path, "_private.py")
    for letter in "abcdefghijklmnopq":
        write(tmp_path, f"{letter}_module.py", lines=2_100 if letter < "d" else 2_500)
    clients = find_clients(tmp_path)
    assert list(clients) == ["json", *(f"modules {letter}" for letter in "adefghijklmnopq")]
    assert all(train and test for train, test in clients.values())
    assert not any("test" in path for train, _ in clients.values() for path in train)


def test_a_library_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrelortError, match="makes 0 clients where 16 are needed"):
        find_clients(tmp_path)


def test_a_package_of_one_file_is_cut_by_lines() -> None:
    text = "".join(f"line {number}\n" for number in range(10))
    train, test = split({"p/a.py": text})
    assert [*train, *test] == ["p/a.py:1-8", "p/a.py:9-10"]
    assert train["p/a.py:1-8"] + test["p/a.py:9-10"] == text
    assert split({"p/a.py": "pass\n"}) == ({"p/a.py:1-1": "pass\n"}, {})

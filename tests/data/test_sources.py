from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from prelort import hub
from prelort.config import DataConfig
from prelort.data import _reading, sources
from prelort.errors import ConfigError

ask_once = hub.offline

ROWS = [{"text": "one, two", "label": "a"}, {"text": 'say "hi"\nnow', "label": "b"}]


def read(source: Path | str, **values: Any) -> Dataset:
    return sources.read(DataConfig(source=str(source), **values))[0]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that must not be asked; what it was asked for."""
    asked: list[str] = []

    def load(name: str, *_: Any, **__: Any) -> None:
        asked.append(name)
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(sources, "load_dataset", load)
    return asked


CSV = 'text,label\n"one, two",a\n"say ""hi""\nnow",b\n'


@pytest.mark.parametrize(
    "name, content",
    [
        ("data.csv", CSV),
        ("data.CSV", "\ufeff" + CSV),
        ("data.csv", CSV.replace(",", ";").replace("one;", "one,")),
        ("data.csv", CSV.replace(",", "\t").replace("one\t", "one,")),
        ("data.csv", CSV.encode("utf-16")),
        ("data.csv", ',text,label\n0,"one, two",a\n1,"say ""hi""\nnow",b\n'),  # by pandas
        ("data.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS).encode("utf-16")),
        ("data.tsv", 'text\tlabel\none, two\ta\n"say ""hi""\nnow"\tb\n'),
        ("data.json", json.dumps(ROWS)),
        ("data.json", json.dumps({"version": 1, "tags": ["x"], "rows": ROWS})),
        ("data.json", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("data.jsonl", "".join(json.dumps(row) + "\n\n" for row in ROWS)),
    ],
)
def test_reads_each_kind_of_file(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert read(write(tmp_path / name, content)).to_list() == ROWS


def test_text_is_a_row_a_line_without_the_blank_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "data.txt", "one\n\n  \r\n two \r\nthree")
    assert read(path).to_list() == [{"text": "one"}, {"text": " two "}, {"text": "three"}]


@pytest.mark.parametrize("name", ["data.csv", "data.txt", "data.jsonl", "data.json"])
def test_a_large_file_is_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_reading, "IN_MEMORY", 4)
    content = '{"text": "a"}\n' * 2 if "json" in name else "text\n\na\n"
    rows = read(write(tmp_path / name, content))
    assert rows.cache_files
    assert rows[-1]["text"] == "a"


def test_csv_types_do_not_depend_on_the_first_rows(tmp_path: Path) -> None:
    lines = [f"t,{i}" for i in range(12_000)] + ["t,other"]  # more than a chunk of the loader
    rows = read(write(tmp_path / "data.csv", "text,label\n" + "\n".join(lines)))
    assert rows["label"][-1] == "other"


def test_json_rows_may_lack_a_column_and_keep_their_types(tmp_path: Path) -> None:
    content = [{"date": "2020-01-01", "label": "0"}, {"text": "x", "label": "1"}]
    rows = read(write(tmp_path / "data.json", json.dumps({"data": content})))
    assert rows.to_list() == [
        {"date": "2020-01-01", "label": "0", "text": None},
        {"date": None, "label": "1", "text": "x"},
    ]


def test_a_changed_file_is_read_anew_and_leaves_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    path = write(tmp_path / "data.csv", "text\none\n")
    stamp = path.stat()
    assert read(path)["text"][:] == ["one"]
    write(path, "text\ntwo\n")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert read(path)["text"][:] == ["two"]
    assert not cache.exists()


def test_reads_what_save_to_disk_wrote(tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, dev=rows.select([0])).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one").to_list() == ROWS
    assert len(read(tmp_path / "two", split="dev")) == 1
    train, test = sources.read(DataConfig(source=str(tmp_path / "two"), test="dev"))
    assert test is not None
    assert (len(train), len(test)) == (2, 1)
    with pytest.raises(ConfigError, match="no split 'val': the splits are 'train', 'dev'"):
        read(tmp_path / "two", split="val")


def test_reads_a_folder_that_holds_files_of_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "copy"
    folder.mkdir()
    write(folder / "train.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    write(folder / "test.jsonl", '{"text": "three"}\n')
    assert len(read(folder)) == 2
    assert len(read(folder, split="test")) == 1
    with pytest.raises(ConfigError, match="has no split 'dev': the splits are 'train', 'test'"):
        read(folder, split="dev")


def test_a_test_file_goes_with_any_source(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "text\na\nb\n")
    test = write(tmp_path / "test.jsonl", '{"text": "c"}\n')
    _, rows = sources.read(DataConfig(source=str(train), test=str(test)))
    assert rows is not None
    assert rows.to_list() == [{"text": "c"}]
    _, rows = sources.read(DataConfig(test=str(test)))
    assert rows is not None
    assert len(rows) == 1


def test_the_embedded_text_has_its_own_test_rows() -> None:
    train, test = sources.read(DataConfig())
    assert test is not None
    assert {"text", "client"} <= set(train.column_names) & set(test.column_names)
    with pytest.raises(ConfigError, match=r"data\.test = 'test' is not allowed with the emb"):
        sources.read(DataConfig(test="test"))


@pytest.mark.parametrize(
    "name, content, cells",
    [
        ("a.csv", "text\nNone\n007\nNA\n", ["None", "007", "NA"]),  # text as written
        ("a.tsv", 'text\n"hello" he said\n"\n', ['"hello" he said', '"']),  # no quoting
        ("a.csv", f'text\n"{"word " * 60_000}"\n', ["word " * 60_000]),  # a long cell
        (".run[1]*/data[0].csv", "text\nright\n", ["right"]),  # a path is no pattern
    ],
)
def test_cells_and_paths_are_taken_as_they_are(
    tmp_path: Path, name: str, content: str, cells: list[str]
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    assert read(write(tmp_path / name, content))["text"][:] == cells


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("e.csv", "", "the file is empty"),
        ("e.txt", "\n \n", "it has no rows"),
        ("e.csv", "text,label\n\n", "it has no rows"),
        ("e.jsonl", "\n", "it has no rows"),
        ("e.json", "[]", "it has no rows"),
        ("long.csv", "text,label\na,b\nc,d,e\n", r"row 2 \(line 3\) has 3 cells"),
        ("short.csv", "text,label\na,b\nc\n", r"row 2 \(line 3\) has 1 cells"),
        ("quote.csv", 'text,label\n"a,b\nc,d\n', "line 3: unexpected end of data"),
        ("twice.csv", "text,text\na,b\n", "empty or repeated name"),
        ("short.tsv", "text\tlabel\na\n", r"row 1 \(line 2\) has 1 cells"),
        ("gap.csv", "text,,label\na,b,c\n", "empty or repeated name"),
        ("latin.csv", b"text\n\xe4 b\n", "not UTF-8 .* cp1252"),
        ("wide.csv", "text\na\n".encode("utf-16-le"), "UTF-16 without its mark"),
        ("latin.txt", b"\xe4 b\n", "not UTF-8"),
        ("latin.jsonl", b'{"a": "\xe4"}\n', "not UTF-8"),
        ("cut.jsonl", '{"a": 1}\n{"a":\n', "line 2 is not JSON"),
        ("list.jsonl", '{"a": 1}\n[1]\n', r"line 2 is not an object: \[1\]"),
        ("cut.json", '[{"a": 1}', "not JSON: .* line 1 column 10"),
        ("number.json", "3", "must be a list of objects"),
        ("mixed.json", '[{"a": 1}, 2]', "row 2 is not an object: 2"),
        (
            "types.json",
            '[{"b": 1, "a": 1}, {"a": "x"}]',
            "row 2 has another kind of value in column 'a' .*: \"x\"",
        ),
        ("none.json", '{"a": [1]}', "has: none"),
        ("two.json", '{"a": [{"x": 1}], "b": [{"x": 1}]}', "has: 'a', 'b'"),
        ("bad.parquet", "hello", "Parquet"),
        ("data.xlsx", "x", "unknown kind of file: allowed are .csv, .tsv"),
    ],
)
def test_a_wrong_file_is_one_sentence(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ConfigError, match=message) as refusal:
        read(path)
    assert repr(str(path)) in str(refusal.value)
    assert "\n" not in str(refusal.value)


# The hub: `load_dataset` is the boundary to the network.


@pytest.fixture(autouse=True)
def hub_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "offline", lambda: False)


@pytest.mark.parametrize("answers", [True, False])
def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    asked: list[str] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            if not answers:
                raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    offline = functools.cache(ask_once.__wrapped__)
    assert [offline(), offline()] == [not answers] * 2
    assert len(asked) == 1
    if not answers:
        with pytest.raises(ConfigError, match="the hub cannot be reached"):
            read("org/set")


@pytest.mark.parametrize(
    "source", ["./nowhere", "/nowhere/data", "~/nowhere-at-all", "data.jsonl", "a/b/c", ""]
)
def test_a_missing_path_is_not_looked_up_on_the_hub(source: str, no_hub: list[str]) -> None:
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        read(source)
    assert no_hub == []


@pytest.mark.parametrize("test", ["gone.csv", "validation"])
def test_a_missing_test_file_is_named(tmp_path: Path, test: str, no_hub: list[str]) -> None:
    path = write(tmp_path / "train.csv", "text\na\n")
    with pytest.raises(ConfigError, match=f"data.test = '{test}'"):
        sources.read(DataConfig(source=str(path), test=test))
    assert no_hub == []


@pytest.mark.parametrize(
    "error, message",
    [
        (ConnectionError("Couldn't reach 'org/set' on the Hub"), "the hub cannot be reached"),
        (DatasetNotFoundError("Dataset 'org/set' doesn't exist"), "neither a file .* on the hub"),
        (
            ValueError("Unknown split \"trian\". Should be one of ['train', 'test']."),
            "no split 'trian': the splits are 'train', 'test'",
        ),
        (RuntimeError("Dataset scripts are no longer\nsupported"), "scripts are no longer supp"),
    ],
)
def test_an_error_of_the_hub_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sources, "load_dataset", load)
    with pytest.raises(ConfigError, match=message) as refusal:
        read("org/set", split="trian")
    assert "\n" not in str(refusal.value)


def test_a_hub_name_is_loaded_by_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, subset: str | None, split: str) -> Dataset:
        return Dataset.from_dict({"text": [f"{name} {subset} {split}"]})

    monkeypatch.setattr(sources, "load_dataset", load)
    config = DataConfig(source="org/set", subset="small", split="train[:10%]", test="test")
    train, test = sources.read(config)
    assert test is not None
    assert train["text"][:] == ["org/set small train[:10%]"]
    assert test["text"][:] == ["org/set small test"]

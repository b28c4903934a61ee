"""The Python standard library's own source as a corpus: one client per package, no download.

Every machine with Python has it, it is licensed (PSF), and its packages are natural clients: HTTP
handling, XML parsing and editor widgets are each written in a vocabulary of their own. The text
differs a little from one Python version to the next, so figures compare within a version.
"""

from __future__ import annotations

import hashlib
import string
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from prelort.errors import PrelortError

if TYPE_CHECKING:
    from datasets import Dataset

# The packages of an ordinary CPython, 3.11 to 3.14. Left out are those that came or went in
# between, and encodings and pydoc_data, which are generated tables rather than code.
PACKAGES = (
    "asyncio", "collections", "concurrent", "ctypes", "email", "html", "http", "idlelib",
    "importlib", "json", "logging", "multiprocessing", "re", "tkinter", "turtledemo", "unittest",
    "urllib", "wsgiref", "xml", "xmlrpc",
)  # fmt: skip
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
MINIMUM_CLIENTS = 16
MINIMUM_FILE_BYTES = 500  # a smaller file is a comment or a few imports, often alike
MINIMUM_BYTES = 40_000  # less source than this makes no client
MAXIMUM_BYTES = 200_000  # more than this of one client only costs time
TEST_SHARE = 0.2
MINIMUM_FILES = 5  # fewer are cut by lines: each may be unlike the others
# Whole files make the test split where their sizes allow a share between these two.
LEAST_TEST_SHARE, MOST_TEST_SHARE = 0.1, 0.25


Files = dict[str, str]
"""A file's path relative to the library, with "/" between the parts -> its text."""


def load() -> tuple[Dataset, Dataset]:
    """Return the (train, test) splits of this machine's standard library.

    Both have the string columns ``text`` (a file's source), ``client`` (its package) and ``path``
    (relative to the library), are sorted by client and path, and hold every client, of which there
    are at least 16. About four fifths of a client's bytes are for training. Files are split whole;
    where a package has too few, each is cut at a line and its path ends in the lines kept
    (``xmlrpc/client.py:1-1211``). The same Python gives the same splits.

    Raises:
        PrelortError: the library's source is not on this machine, or too little of it.
    """
    from datasets import Dataset, Features, Value

    clients = find_clients(Path(sysconfig.get_path("stdlib")))
    features = Features({column: Value("string") for column in ("text", "client", "path")})
    train, test = (
        Dataset.from_list(
            [
                {"text": text, "client": client, "path": path}
                for client, splits in clients.items()
                for path, text in sorted(splits[half].items())
            ],
            features=features,
        )
        for half in (0, 1)
    )
    return train, test


def find_clients(library: Path) -> dict[str, tuple[Files, Files]]:
    """The clients of the library in this folder, by name, each with its (train, test) files.

    They are its packages; where fewer than 16 are large enough, top-level modules grouped by their
    first letter ("modules a") fill up, the letters with the most source first.

    Raises:
        PrelortError: even so there are fewer than 16.
    """
    groups = {name: _read(library, (library / name).rglob("*.py")) for name in PACKAGES}
    groups = {name: files for name, files in groups.items() if _size(files) >= MINIMUM_BYTES}
    if len(groups) < MINIMUM_CLIENTS:
        # No private modules: one of them holds the settings this Python was built with.
        modules = {
            f"modules {letter}": _read(library, library.glob(f"{letter}*.py"))
            for letter in string.ascii_lowercase
        }
        large = [name for name, files in modules.items() if _size(files) >= MINIMUM_BYTES]
        large.sort(key=lambda name: (-_size(modules[name]), name))
        groups |= {name: modules[name] for name in large[: MINIMUM_CLIENTS - len(groups)]}
    if len(groups) < MINIMUM_CLIENTS:
        raise PrelortError(
            f"The source of Python's standard library at {library} makes {len(groups)} clients "
            f"where {MINIMUM_CLIENTS} are needed; install Python with its library's source, or "
            "name another data set."
        )
    return {name: split(_limited(files)) for name, files in sorted(groups.items())}


def split(files: Files) -> tuple[Files, Files]:
    """Split a client's files about 4:1 by bytes."""
    size, test = _size(files), Files()
    for path, text in files.items():
        share = _size(test) / size
        if share < TEST_SHARE and share + _bytes(text) / size <= MOST_TEST_SHARE:
            test[path] = text
    if len(files) >= MINIMUM_FILES and _size(test) >= LEAST_TEST_SHARE * size:
        return {path: text for path, text in files.items() if path not in test}, test
    train, test = Files(), Files()
    for path, text in files.items():
        lines = text.splitlines(keepends=True)
        kept = len(lines) - int(len(lines) * TEST_SHARE)
        train[f"{path}:1-{kept}"] = "".join(lines[:kept])
        if "".join(lines[kept:]).strip():
            test[f"{path}:{kept + 1}-{len(lines)}"] = "".join(lines[kept:])
    return train, test


def _read(library: Path, paths: Iterable[Path]) -> Files:
    """The files that are not tests, in an order that their paths' hashes shuffle."""
    files = Files()
    for path in paths:
        relative = path.relative_to(library)
        if not TEST_FOLDERS.intersection(relative.parts) and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            if _bytes(text) >= MINIMUM_FILE_BYTES:
                files[relative.as_posix()] = text
    return dict(sorted(files.items(), key=lambda file: hashlib.sha256(file[0].encode()).digest()))


def _limited(files: Files) -> Files:
    """The first files that have `MAXIMUM_BYTES` together, or all if that would leave too few."""
    chosen, left = Files(), MAXIMUM_BYTES
    for path, text in files.items():
        if _bytes(text) <= left:
            chosen[path] = text
            left -= _bytes(text)
    return chosen if _size(chosen) >= MINIMUM_BYTES else files


def _size(files: Files) -> int:
    return sum(map(_bytes, files.values()))


def _bytes(text: str) -> int:
    return len(text.encode())

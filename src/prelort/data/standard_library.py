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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prelort.errors import PrelortError

if TYPE_CHECKING:
    from datasets import Dataset

# The packages of an ordinary CPython, 3.11 to 3.14. Left out are those that came or went in
# between, and encodings and pydoc_data, which are generated tables rather than code.
PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "ctypes",
    "email",
    "html",
    "http",
    "idlelib",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "re",
    "tkinter",
    "turtledemo",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
)
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
MINIMUM_CLIENTS = 16
MINIMUM_FILE_BYTES = 500  # a smaller file is a comment or a few imports, often alike
MINIMUM_BYTES = 40_000  # less source than this makes no client
MAXIMUM_BYTES = 200_000  # more than this of one client only costs time
TEST_SHARE = 0.2
MINIMUM_FILES = 5  # fewer are cut by lines: each may be unlike the others
# Whole files make the test split where their sizes allow a share between these two.
LEAST_TEST_SHARE, MOST_TEST_SHARE = 0.1, 0.25


@dataclass(frozen=True)
class SourceFile:
    """A file's text and its path relative to the library, with "/" between the parts."""

    path: str
    text: str

    @property
    def size(self) -> int:
        """The text's length in bytes of UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Client:
    """One client's files, split in two; both halves are sorted by path."""

    name: str
    train: tuple[SourceFile, ...]
    test: tuple[SourceFile, ...]


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

    def dataset(rows: list[tuple[str, SourceFile]]) -> Dataset:
        columns = {
            "text": [file.text for _, file in rows],
            "client": [client for client, _ in rows],
            "path": [file.path for _, file in rows],
        }
        return Dataset.from_dict(columns, features=features)

    return (
        dataset([(client.name, file) for client in clients for file in client.train]),
        dataset([(client.name, file) for client in clients for file in client.test]),
    )


def find_clients(library: Path) -> list[Client]:
    """Return the clients of the library in this folder, sorted by name.

    They are its packages; where fewer than 16 are large enough, top-level modules grouped by their
    first letter ("modules a") fill up, the letters with the most source first.

    Raises:
        PrelortError: even so there are fewer than 16.
    """
    groups = {name: read_files(library, (library / name).rglob("*.py")) for name in PACKAGES}
    groups = {name: files for name, files in groups.items() if is_large_enough(files)}
    if len(groups) < MINIMUM_CLIENTS:
        # No private modules: one of them holds the settings this Python was built with.
        modules = {
            f"modules {letter}": read_files(library, library.glob(f"{letter}*.py"))
            for letter in string.ascii_lowercase
        }
        large = [name for name, files in modules.items() if is_large_enough(files)]
        large.sort(key=lambda name: (-total_size(modules[name]), name))
        for name in large[: MINIMUM_CLIENTS - len(groups)]:
            groups[name] = modules[name]
    if len(groups) < MINIMUM_CLIENTS:
        raise PrelortError(
            f"The source of Python's standard library at {library} makes {len(groups)} clients "
            f"where {MINIMUM_CLIENTS} are needed; install Python with its library's source, or "
            "name another data set."
        )
    return [split(name, limit_size(files)) for name, files in sorted(groups.items())]


def read_files(library: Path, paths: Iterable[Path]) -> list[SourceFile]:
    """Read the files that are not tests, in an order that their paths' hashes shuffle."""
    files = []
    for path in paths:
        relative = path.relative_to(library)
        if not TEST_FOLDERS.intersection(relative.parts) and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            file = SourceFile(relative.as_posix(), text)
            if file.size >= MINIMUM_FILE_BYTES:
                files.append(file)
    return sorted(files, key=lambda file: hashlib.sha256(file.path.encode()).digest())


def total_size(files: Iterable[SourceFile]) -> int:
    """Return the bytes of all files together."""
    return sum(file.size for file in files)


def is_large_enough(files: list[SourceFile]) -> bool:
    """Say whether these files make a client."""
    return total_size(files) >= MINIMUM_BYTES


def fill(files: list[SourceFile], limit: float) -> list[SourceFile]:
    """Return the files, first come first served, that together have at most limit bytes."""
    chosen = []
    for file in files:
        if file.size <= limit:
            chosen.append(file)
            limit -= file.size
    return chosen


def limit_size(files: list[SourceFile]) -> list[SourceFile]:
    """Return files of at most MAXIMUM_BYTES, or all of them if that would leave too few."""
    limited = fill(files, MAXIMUM_BYTES)
    return limited if is_large_enough(limited) else files


def split(name: str, files: list[SourceFile]) -> Client:
    """Split a client's files about 4:1 by bytes."""
    size = total_size(files)
    test: list[SourceFile] = []
    for file in files:
        tested = total_size(test)
        if tested < TEST_SHARE * size and tested + file.size <= MOST_TEST_SHARE * size:
            test.append(file)
    if len(files) >= MINIMUM_FILES and total_size(test) >= LEAST_TEST_SHARE * size:
        train = [file for file in files if file not in test]
    else:
        halves = [cut(file) for file in files]
        train = [first for first, _ in halves]
        test = [second for _, second in halves if second.text.strip()]
    return Client(name, by_path(train), by_path(test))


def cut(file: SourceFile) -> tuple[SourceFile, SourceFile]:
    """Cut a file after about four fifths of its lines."""
    lines = file.text.splitlines(keepends=True)
    kept = len(lines) - int(len(lines) * TEST_SHARE)
    return (
        SourceFile(f"{file.path}:1-{kept}", "".join(lines[:kept])),
        SourceFile(f"{file.path}:{kept + 1}-{len(lines)}", "".join(lines[kept:])),
    )


def by_path(files: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
    """Return the files sorted by path."""
    return tuple(sorted(files, key=lambda file: file.path))

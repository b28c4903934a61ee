import pytest

from prelort.errors import ConfigError
from prelort.planning.sizes import parse


@pytest.mark.parametrize(
    "text, expected",
    [
        ("8GiB", 8 * 2**30),
        ("512 MiB", 512 * 2**20),
        ("80GB", 80 * 10**9),
        (" 1.5 gib ", 3 * 2**29),
        ("100kB", 100_000),
        ("7B", 7),
        ("0.5TiB", 2**39),
    ],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("text", ["", "8", "GiB", "8 Gi", "-1GB", "1e3MB", "8GiB free", "٣GB"])
def test_what_is_no_size_is_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--memory .* is not a size: write a number and a unit"):
        parse(text, "--memory")


@pytest.mark.parametrize("text", ["0GiB", "0.1B"])
def test_nothing_is_no_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="must be at least one byte"):
        parse(text)

"""What a client keeps to itself: found again, by the right round, and never half written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prelort.errors import CheckpointError
from prelort.federation.personal import KEPT, PersonalStore


def tensors(number: float) -> dict[str, torch.Tensor]:
    return {"q.lora_B.weight": torch.full((3, 2), number), "head.bias": torch.tensor([number])}


def value(found: dict[str, torch.Tensor]) -> float:
    return float(found["head.bias"])


@pytest.fixture
def store(tmp_path: Path) -> PersonalStore:
    return PersonalStore(tmp_path / "personal")


def test_everything_comes_back_bit_for_bit(store: PersonalStore) -> None:
    generator = torch.Generator().manual_seed(0)
    kept = {
        "a": torch.randn(4, 3, generator=generator),
        "turned": torch.randn(4, 3, generator=generator).T,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "nothing": torch.zeros(0, 5),
    }
    store.save("site-0", 0, kept)
    found = store.load("site-0", before=1)
    assert found.keys() == kept.keys()
    for name, tensor in kept.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_there_is_nothing_before_the_first_round(store: PersonalStore) -> None:
    assert store.load("site-0", before=0) == {}
    assert store.load("site-0", before=9) == {}
    store.save("site-0", 0, tensors(0))
    assert store.load("site-0", before=0) == {}


def test_a_round_reads_what_the_last_one_before_it_left(store: PersonalStore) -> None:
    """The client need not take part in every round."""
    for number in (0, 3, 10):
        store.save("site-0", number, tensors(number))
    read = [value(store.load("site-0", before=number)) for number in (1, 3, 4, 10, 11, 99)]
    assert read == [0, 0, 3, 3, 10, 10]


def test_a_round_that_is_done_again_reads_what_it_read_at_first(store: PersonalStore) -> None:
    """A run that was killed after round 7 goes on from the checkpoint before it, or before that."""
    for number in range(8):
        store.save("site-0", number, tensors(number))
    for again in (6, 7):
        assert value(store.load("site-0", before=again)) == again - 1
    store.save("site-0", 6, tensors(60))
    assert value(store.load("site-0", before=7)) == 60
    store.save("site-0", 7, tensors(70))
    assert value(store.load("site-0", before=8)) == 70


def test_only_the_last_few_are_kept(store: PersonalStore, tmp_path: Path) -> None:
    for number in range(10):
        store.save("site-0", number, tensors(number))
        files = list((tmp_path / "personal").rglob("*"))
        assert len([file for file in files if file.is_file()]) == min(number + 1, KEPT)
    assert KEPT >= 3  # two checkpoints back, and the one that is being written
    assert value(store.load("site-0", before=10)) == 9
    assert value(store.load("site-0", before=10 - KEPT + 1)) == 10 - KEPT
    assert store.load("site-0", before=10 - KEPT) == {}


def test_rounds_are_in_the_order_of_their_numbers(store: PersonalStore) -> None:
    for number in (99_998, 99_999, 100_000, 100_001, 100_002):
        store.save("site-0", number, tensors(number))
    assert value(store.load("site-0", before=100_001)) == 100_000
    assert value(store.load("site-0", before=10**6)) == 100_002


def test_clients_do_not_meet_and_write_nothing_outside(
    store: PersonalStore, tmp_path: Path
) -> None:
    names = ["site-0", "site-1", "a/b", "../site-0", "", ".", "sité", "s" * 200, "CON", "a\nb"]
    names += ["../../outside", "/outside", "..", "a/../../b"]
    for number, name in enumerate(names):
        store.save(name, 0, tensors(number))
    assert [value(store.load(name, before=1)) for name in names] == list(range(len(names)))
    assert [path.name for path in tmp_path.iterdir()] == ["personal"]
    assert all(path.is_dir() for path in (tmp_path / "personal").iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def overwritten(path: Path) -> None:
    path.write_bytes(b"\x80\x04" + path.read_bytes())


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, emptied, overwritten, a_folder])
def test_a_damaged_file_is_told_and_not_passed_over(
    store: PersonalStore, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """To go on from an older one in silence would be another run."""
    for number in (0, 1):
        store.save("site-0", number, tensors(number))
    (path,) = (tmp_path / "personal").rglob("00001.safetensors")
    damage(path)
    with pytest.raises(CheckpointError, match=r"00001\.safetensors' is damaged"):
        store.load("site-0", before=2)
    assert value(store.load("site-0", before=1)) == 0


def test_other_files_in_its_folder_are_no_rounds(store: PersonalStore, tmp_path: Path) -> None:
    store.save("site-0", 2, tensors(2))
    (own,) = (tmp_path / "personal").iterdir()
    for name in ("notes.txt", "best.safetensors", ".00003.safetensors.tmp", "-1.safetensors"):
        (own / name).write_bytes(b"x")
    assert value(store.load("site-0", before=9)) == 2

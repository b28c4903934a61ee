"""What a client keeps to itself: found again, by the right round, and never half written."""

from pathlib import Path

import pytest
import torch

from prelort.errors import CheckpointError
from prelort.federation.personal import PersonalStore


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


def test_a_round_reads_what_the_last_one_before_it_left(store: PersonalStore) -> None:
    """The client need not take part in every round."""
    for number in (0, 3, 10):
        store.save("site-0", number, tensors(number))
    read = [value(store.load("site-0", before=number)) for number in (1, 3, 4, 10, 11, 99)]
    assert read == [0, 0, 3, 3, 10, 10]


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


def test_a_damaged_file_is_told_and_not_passed_over(store: PersonalStore, tmp_path: Path) -> None:
    """To go on from an older one in silence would be another run."""
    for number in (0, 1):
        store.save("site-0", number, tensors(number))
    (path,) = (tmp_path / "personal").rglob("00001.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"00001\.safetensors' is damaged"):
        store.load("site-0", before=2)
    assert value(store.load("site-0", before=1)) == 0

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.errors import CheckpointError
from prelort.experiment import checkpoint
from prelort.experiment.checkpoint import Checkpoint
from prelort.methods.interface import ServerState


def make_checkpoint(number: int = 3, base: str = "base-0", **memory: torch.Tensor) -> Checkpoint:
    generator = torch.Generator().manual_seed(number)
    layers = {
        "q_proj": Factors(
            torch.randn(4, 6, generator=generator), torch.randn(5, 4, generator=generator)
        ),
        "k_proj": Factors(
            torch.randn(2, 6, generator=generator), torch.randn(3, 2, generator=generator)
        ),
    }
    adapter = LoraAdapter(layers, ScaleRule("rslora", 1.7), {"head.weight": torch.randn(2, 3)})
    return Checkpoint(ServerState(adapter, number, memory), 11, base, 1000 * number)


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    a, b = one.state, other.state
    assert (one.seed, one.base, one.metrics_bytes) == (other.seed, other.base, other.metrics_bytes)
    assert (a.round, a.adapter.scale) == (b.round, b.adapter.scale)
    assert a.adapter.layers.keys() == b.adapter.layers.keys()
    for found, expected in ((a.adapter.tensors(), b.adapter.tensors()), (a.memory, b.memory)):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Let another version have written the checkpoint, with these facts and their digest."""
    facts = json.loads((path / "state.json").read_text())
    del facts["sha256"]
    change(facts)
    data = json.dumps(facts, sort_keys=True).encode() + (path / "state.safetensors").read_bytes()
    facts["sha256"] = hashlib.sha256(data).hexdigest()
    (path / "state.json").write_text(json.dumps(facts))


def latest(folder: Path) -> Checkpoint:
    found = checkpoint.load_latest(folder, "base-0")
    assert found is not None
    return found


class TestRoundTrip:
    def test_everything_comes_back(self, tmp_path: Path) -> None:
        saved = make_checkpoint(
            3,
            momentum=torch.randn(4, 6),
            count=torch.tensor([7]),
            half=torch.ones(3, dtype=torch.bfloat16),
            scalar=torch.tensor(0.25, dtype=torch.float64),
        )
        path = checkpoint.save(saved, tmp_path)

        assert path.name == "00003"
        assert_same(checkpoint.load(path), saved)
        assert_same(latest(tmp_path), saved)

    def test_the_ranks_that_have_changed_and_the_levels_come_back(self, tmp_path: Path) -> None:
        state = replace(make_checkpoint().state, ranks={"site-0": 3, "sité/1": 16}, levels=(3, 16))
        path = checkpoint.save(replace(make_checkpoint(), state=state), tmp_path)
        assert checkpoint.load(path).state.ranks == state.ranks
        assert checkpoint.load(path).state.levels == (3, 16)

    @pytest.mark.parametrize("missing", ["ranks", "levels"])
    def test_a_checkpoint_of_an_earlier_version_is_read(self, tmp_path: Path, missing: str) -> None:
        saved = make_checkpoint()
        path = checkpoint.save(saved, tmp_path)
        rewrite(path, lambda facts: facts.pop(missing))
        assert_same(checkpoint.load(path), saved)
        assert not getattr(checkpoint.load(path).state, missing)

    def test_no_folder_and_an_empty_folder_are_no_checkpoint(self, tmp_path: Path) -> None:
        assert checkpoint.load_latest(tmp_path / "nothing", "base-0") is None
        assert checkpoint.load_latest(tmp_path, "base-0") is None

    def test_memory_may_be_views_and_the_adapter_itself(self, tmp_path: Path) -> None:
        """Server momentum keeps the last adapter: the tensors share memory."""
        plain = make_checkpoint(1)
        factors = plain.state.adapter.layers["q_proj"]
        saved = make_checkpoint(1, last=factors.A, again=factors.A, turned=factors.A.T)
        state = ServerState(plain.state.adapter, 1, saved.state.memory)
        checkpoint.save(Checkpoint(state, 0, "base-0", 0), tmp_path)

        loaded = latest(tmp_path)
        assert torch.equal(loaded.state.memory["turned"], factors.A.T)
        assert torch.equal(loaded.state.memory["last"], factors.A)


class TestKeeping:
    def test_the_last_two_are_kept(self, tmp_path: Path) -> None:
        for number in range(5):
            checkpoint.save(make_checkpoint(number), tmp_path)
            names = sorted(path.name for path in tmp_path.iterdir())
            assert names == [f"{n:05d}" for n in range(max(0, number - 1), number + 1)]


def truncate(name: str, share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(len(data) * share)])

    return damage


def flip(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[len(data) * 2 // 3] ^= 4
        (path / name).write_bytes(bytes(data))

    return damage


DAMAGES = {
    "half the tensors": truncate("state.safetensors", 0.5),
    "tensors one byte short": truncate("state.safetensors", 0.999),
    "no byte of the facts": truncate("state.json", 0.0),
    "no tensors file": lambda path: (path / "state.safetensors").unlink(),
    "a flipped bit in the tensors": flip("state.safetensors"),
    "a flipped bit in the facts": flip("state.json"),
    "facts that are a list": lambda path: (path / "state.json").write_text("[]"),
    "facts not UTF-8": lambda path: (path / "state.json").write_bytes(b"\xff\xfe\x00"),
    "an empty folder": lambda path: [file.unlink() for file in path.iterdir()],
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
    def test_one_falls_back_to_the_one_before_it_and_all_are_an_error(
        self, tmp_path: Path, damage: Callable[[Path], Any]
    ) -> None:
        before = make_checkpoint(2, momentum=torch.ones(3))
        path = checkpoint.save(before, tmp_path)
        damage(checkpoint.save(make_checkpoint(3), tmp_path))
        with pytest.warns(UserWarning, match="falling back to the checkpoint before it") as said:
            assert_same(latest(tmp_path), before)
        assert f"{str(tmp_path / '00003')!r} is damaged" in str(said[0].message)

        damage(path)
        with pytest.warns(UserWarning), pytest.raises(CheckpointError) as raised:  # noqa: PT030
            latest(tmp_path)
        assert str(raised.value) == f"all checkpoints in {str(tmp_path)!r} are damaged"

    def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(self, tmp_path: Path) -> None:
        saved = make_checkpoint(3, momentum=torch.ones(3))
        path = checkpoint.save(saved, tmp_path)
        draw = random.Random(0)
        found = 0
        for name in ("state.json", "state.safetensors"):
            whole = (path / name).read_bytes()
            for _ in range(200):
                data = bytearray(whole)
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                (path / name).write_bytes(bytes(data))
                try:
                    assert_same(checkpoint.load(path), saved)
                except CheckpointError:
                    found += 1
            (path / name).write_bytes(whole)
        assert found > 350

    def test_a_later_format_is_not_guessed_at(self, tmp_path: Path) -> None:
        path = checkpoint.save(make_checkpoint(), tmp_path)
        rewrite(path, lambda facts: facts.update(format=2))
        with pytest.raises(CheckpointError, match="format 2, this version reads 1"):
            checkpoint.load(path)


def test_leftovers_of_a_crash_do_not_stop_the_next_one(tmp_path: Path) -> None:
    """Half a new checkpoint, or half an old one that was being deleted."""
    leftover = tmp_path / ".00003.tmp"
    leftover.mkdir()
    (leftover / "state.safetensors").write_bytes(b"half")
    assert checkpoint.load_latest(tmp_path, "base-0") is None
    (checkpoint.save(make_checkpoint(1), tmp_path) / "state.json").unlink()
    for number in (2, 3):
        saved = make_checkpoint(number)
        checkpoint.save(saved, tmp_path)
        assert_same(latest(tmp_path), saved)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00002", "00003"]

"""What a client keeps from round to round, on its own disk (FedSA-LoRA's B and head).

One safetensors file for each round in which the client trained. A round reads what an earlier one
left, so a run that goes on from a checkpoint finds what was there then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from prelort.errors import CheckpointError
from prelort.files import write_atomically

KEPT = 4
"""Files a client keeps. A run keeps two checkpoints, so a resumed one goes back two rounds."""


@dataclass(frozen=True, slots=True)
class PersonalStore:
    """One client's own tensors in ``folder``."""

    folder: Path

    def save(self, client: str, round_index: int, tensors: Mapping[str, Tensor]) -> None:
        """Leave the tensors of a round (from 0), and drop what no resumed run can ask for."""
        own = self._of(client)
        own.mkdir(parents=True, exist_ok=True)
        data = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
        write_atomically(own / f"{round_index:05d}.safetensors", data)
        for old in self._rounds(client)[:-KEPT]:
            (own / f"{old:05d}.safetensors").unlink(missing_ok=True)

    def load(self, client: str, before: int) -> dict[str, Tensor]:
        """The tensors of the client's last round before round ``before``; empty if there is none.

        Raises `CheckpointError` for a damaged file.
        """
        rounds = [number for number in self._rounds(client) if number < before]
        if not rounds:
            return {}
        path = self._of(client) / f"{rounds[-1]:05d}.safetensors"
        try:
            return safetensors.torch.load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{str(path)!r} is damaged: {error}") from None

    def _of(self, client: str) -> Path:
        """A client's folder: its name may hold anything, so it goes by a hash of it."""
        return self.folder / hashlib.sha256(client.encode()).hexdigest()[:16]

    def _rounds(self, client: str) -> list[int]:
        own = self._of(client)
        if not own.is_dir():
            return []
        return sorted(int(p.stem) for p in own.glob("*.safetensors") if p.stem.isdecimal())

"""Tensors that a client keeps between rounds on its own disk (FedSA-LoRA's B and head).

One safetensors file for each round in which the client trained. A round reads the file of an
earlier one, so a run resumed from a checkpoint reads what that round had left.
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

MAX_FILES = 4
"""Files per client. A run has two checkpoints, so a resumed one goes back at most two rounds."""


@dataclass(frozen=True, slots=True)
class PersonalStore:
    """One client's own tensors in ``folder``."""

    folder: Path

    def save(self, client: str, round_index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a round (from 0), and delete files that no resumed run needs."""
        folder = self._folder(client)
        folder.mkdir(parents=True, exist_ok=True)
        data = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
        write_atomically(folder / f"{round_index:05d}.safetensors", data)
        for old in self._rounds(client)[:-MAX_FILES]:
            (folder / f"{old:05d}.safetensors").unlink(missing_ok=True)

    def load(self, client: str, before: int) -> dict[str, Tensor]:
        """The tensors of the client's last round before round ``before``; empty if there is none.

        Raises `CheckpointError` for a damaged file.
        """
        rounds = [number for number in self._rounds(client) if number < before]
        if not rounds:
            return {}
        path = self._folder(client) / f"{rounds[-1]:05d}.safetensors"
        try:
            return safetensors.torch.load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{str(path)!r} is damaged: {error}") from None

    def _folder(self, client: str) -> Path:
        """A client's folder, named by a hash, since a client's name may have any characters."""
        return self.folder / hashlib.sha256(client.encode()).hexdigest()[:16]

    def _rounds(self, client: str) -> list[int]:
        folder = self._folder(client)
        if not folder.is_dir():
            return []
        return sorted(int(p.stem) for p in folder.glob("*.safetensors") if p.stem.isdecimal())

"""The files of a run, for comparisons."""

from __future__ import annotations

from pathlib import Path


def adapters_of(run: Path) -> dict[str, bytes]:
    """The bytes of every adapter's tensors, by their file's path inside the run."""
    files = sorted((run / "adapters").rglob("*.safetensors"))
    return {str(path.relative_to(run)): path.read_bytes() for path in files}

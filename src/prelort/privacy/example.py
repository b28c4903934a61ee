"""Differential privacy of a client's examples, from the client itself: its budget.

The client takes noisy steps (DP-SGD, `prelort.training.private`), so what it sends in all rounds is
(epsilon, delta)-differentially private for each of its examples, against the server too. It counts
on no secret sample of clients: as if it took part in every round.

Neighbouring data differ in one training example, which is there or adds nothing ("zero-out",
Kairouz et al., arXiv 2103.00039): the number of examples is public.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from filelock import FileLock
from pydantic import Field

from prelort.config import MAX_CLIP, MIN_CLIP, PrivacyConfig
from prelort.errors import CheckpointError, PrelortError
from prelort.files import sync_folder, write_atomically
from prelort.privacy.accounting import Budget, Releases, epsilon_of
from prelort.privacy.noise import Normal, system_normal

EXAMPLE_PRIVACY = "example-privacy"
"""Its name among the features that a request to train requires."""
FOLDER = "privacy"
"""Of ledgers."""
SPENT = "has spent its privacy budget"
"""How the refusal of a client begins that can take no further round."""


@dataclass(frozen=True, slots=True)
class ExamplePrivacy:
    """What the server wants of a client: a budget for the whole run, and the norm of a gradient."""

    epsilon: Annotated[float, Field(gt=0.0, le=100.0)]
    delta: Annotated[float, Field(gt=0.0, lt=1.0)]
    clip: Annotated[float, Field(ge=MIN_CLIP, le=MAX_CLIP)]


def example_privacy(privacy: PrivacyConfig) -> ExamplePrivacy | None:
    """What the configuration asks of each client; None: nothing."""
    if privacy.epsilon is None or privacy.unit != "example":
        return None
    return ExamplePrivacy(privacy.epsilon, privacy.delta, privacy.clip)


@dataclass(frozen=True, slots=True)
class NoisyGradients:
    """The mechanism of each step: clip norm C, noise multiplier z, sampling probability q.

    ``normal``: draws standard normal numbers; from the system's generator but in tests.
    """

    clip: float
    multiplier: float
    rate: float
    normal: Normal = system_normal


def ledger_in(folder: Path, client: str) -> ExampleLedger:
    """A client's ledger in its own or in a run's folder; a name may have any characters."""
    name = hashlib.sha256(client.encode()).hexdigest()[:16]
    return ExampleLedger(folder / FOLDER / f"{name}.json")


def check_ledgers(folder: Path) -> None:
    """Raise `CheckpointError` if a resumed run has lost the ledgers of its clients."""
    if not (folder / FOLDER).is_dir():
        raise CheckpointError(
            f"{str(folder / FOLDER)!r} is missing, so what has been spent of the privacy budget is "
            "not known"
        )


@dataclass(frozen=True, slots=True)
class ExampleLedger:
    """What one client has spent, in a file: in all runs that use the file.

    A round is paid for before its first step. One that is repeated draws new noise and new batches
    and is paid for again, so that neither is used twice unnoticed.

    ``limit``: (epsilon, delta) that no request may exceed, and no request may do without.
    """

    file: Path
    limit: tuple[float, float] | None = None

    def pay(self, privacy: ExamplePrivacy, budget: Budget, steps: int) -> NoisyGradients:
        """Note the steps of a round, durably, and return their mechanism.

        Raises `PrelortError` if they would exceed the budget or the limit, `CheckpointError` for a
        damaged file.
        """
        if self.limit is not None:
            epsilon, delta = self.limit
            if not (privacy.epsilon <= epsilon and privacy.delta <= delta):
                raise PrelortError(
                    f"allows privacy.epsilon = {epsilon:g} at privacy.delta = {delta:g} at most "
                    f"(its site.toml), requested was {privacy.epsilon:g} at {privacy.delta:g}"
                )
        noise = budget.noise_multiplier()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        sync_folder(self.file.parent.parent)
        with FileLock(f"{self.file}.lock"):  # another run may use the same file
            self._add(Releases(noise, budget.rate, steps), privacy)
        return NoisyGradients(privacy.clip, noise, budget.rate)

    def epsilon(self, privacy: ExamplePrivacy) -> float:
        """What has been spent, at the delta of a request."""
        return epsilon_of(self._read(), privacy.epsilon, privacy.delta)

    def _add(self, releases: Releases, privacy: ExamplePrivacy) -> None:
        spent = self._read()
        counts = {(one.noise_multiplier, one.rate): one.count for one in spent}
        kind = releases.noise_multiplier, releases.rate
        counts[kind] = counts.get(kind, 0) + releases.count
        after = [Releases(*kind, count) for kind, count in counts.items()]
        if not epsilon_of(after, privacy.epsilon, privacy.delta) <= privacy.epsilon:
            raise PrelortError(
                f"{SPENT}: {self.epsilon(privacy):.4g} of privacy.epsilon = {privacy.epsilon:g}, "
                "repeated rounds were paid for too"
            )
        write_atomically(self.file, json.dumps([asdict(one) for one in after], indent=2).encode())

    def _read(self) -> list[Releases]:
        if not self.file.exists():
            return []
        try:
            values = json.loads(self.file.read_text(encoding="utf-8"))
            return [Releases(**one) for one in values]
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{str(self.file)!r} is damaged, so what has been spent of the privacy budget is "
                f"not known: {error}"
            ) from None

"""The result of a run, from Python: measured values, and the adapter at any rank."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi
from peft import PeftModel

from prelort import tasks
from prelort.adapters import LoraAdapter, peft_folder
from prelort.errors import ConfigError
from prelort.events import Metrics
from prelort.experiment import inspect
from prelort.experiment.adapter_folder import is_hub_name
from prelort.experiment.folder import RunFolder
from prelort.history import RunHistory
from prelort.library_logging import quiet
from prelort.models import base
from prelort.tasks import labels

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, repr=False)
class RunResult:
    """The result of a finished run: its folder, the global adapter, and its history."""

    path: Path
    global_adapter: LoraAdapter
    history: RunHistory

    def __repr__(self) -> str:
        values = [
            f"{name} {value:.4g} at rank {rank}"
            for rank, metrics in self.metrics.items()
            for name, value in list(metrics.items())[:1]
        ]
        return f"<RunResult {str(self.path)!r}: {', '.join(values) or 'no global model'}>"

    @property
    def levels(self) -> tuple[int, ...]:
        """The distinct ranks of the clients, rising."""
        return self.history.started.levels if self.history.started is not None else ()

    @property
    def base(self) -> Metrics:
        """The untuned base model's metrics."""
        return self.history.base

    @property
    def metrics(self) -> dict[int, Metrics]:
        """Rank -> the global adapter's metrics after the last round; empty without one."""
        final = self.history.final
        return final.prefixes if final is not None else {}

    def to_pandas(self) -> pd.DataFrame:
        """Every value that was measured: round, rank (0: the untuned base), metric, value."""
        return self.history.to_pandas()

    def adapter(self, rank: int | None = None) -> Path:
        """The PEFT folder of the adapter cut to ``rank`` (default: its whole rank).

        It is in the run's folder, and written there if it is not yet. Raises `ConfigError` for a
        rank that the adapter does not have.
        """
        rank = self.global_adapter.rank if rank is None else rank
        folder = RunFolder(self.path).adapters / f"rank-{rank}"
        if not (folder / peft_folder.WEIGHTS).is_file():
            inspect.export_run(self.path, folder, rank)
        return folder

    @quiet()
    def model(self, rank: int | None = None) -> PeftModel:
        """The tuned model: a new copy of the base with the adapter cut to ``rank``.

        In evaluation mode, on the run's device.
        """
        folder, run = self.adapter(rank), RunFolder(self.path)
        config = run.read_config()
        tokenizer = base.load_tokenizer(config.model)
        kind, names = tasks.get(config.task).kind, labels.read(folder)
        model = base.load_model(config.model, kind, names, pad_id=tokenizer.pad_token_id)
        tuned: PeftModel = PeftModel.from_pretrained(model, folder)
        return tuned.eval()

    def push_to_hub(
        self,
        repo: str,
        rank: int | None = None,
        *,
        base_name: str | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the adapter cut to ``rank`` to a repository of the hub, which is made if needed.

        Args:
            repo: its name, ``user/name``.
            rank: default: the adapter's whole rank.
            base_name: the base model that the adapter names; needed where that is a local folder.
            private: whether a new repository is private; default: the account's setting.
            token: default: that of ``hf auth login``.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: for a base that others do not have.
            huggingface_hub.errors.HfHubHTTPError: without permission.
        """
        name = base_name or RunFolder(self.path).read_config().model.name
        if not is_hub_name(name):
            raise ConfigError(
                f"the base model {name!r} is on this machine only: give base_name, the name by "
                "which others find it"
            )
        with tempfile.TemporaryDirectory() as place:
            folder = self.adapter(rank)
            if base_name is not None:
                folder = Path(place) / "adapter"
                inspect.export_run(self.path, folder, rank, base_name=base_name)
            api = HfApi(token=token)
            address = api.create_repo(repo, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(repo_id=address, folder_path=folder)
            return str(commit.commit_url)

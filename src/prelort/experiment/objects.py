"""What a run in this process gets as Python objects, beside its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prelort.config import ModelConfig
from prelort.data.tables import Tables
from prelort.errors import ConfigError
from prelort.experiment.folder import BASE, ROWS, TOKENIZER
from prelort.models import base
from prelort.training.runtime import ComputeMetrics


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """A loaded base model, its tokenizer, the rows and metrics of one's own, where they are given.

    A run's configuration names the places where model and tokenizer can be loaded from (`place`),
    so that the run's folder is complete and the shell can go on with it.
    """

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    tables: Tables | None = None
    compute_metrics: ComputeMetrics | None = None

    def place(self, config: ModelConfig, out: Path) -> ModelConfig:
        """The configuration of the model as it is, and of where it can be loaded from.

        That is where it came from, or the folder ``base`` in ``out`` (see `store`) for a model that
        was made or changed in Python. Raises `ConfigError` for what is no base model.
        """
        changes: dict[str, object] = {}
        if self.tokenizer is not None:
            changes["tokenizer"] = str((out / TOKENIZER).absolute())
        if (model := self.model) is None:
            return config.model_copy(update=changes)
        if isinstance(model, PeftModel):
            raise ConfigError(
                f"model is a {type(model).__name__}: give a model of transformers without adapters "
                "(merge_and_unload merges them; lora.start_from begins from one)"
            )
        if not isinstance(model, PreTrainedModel):
            raise ConfigError(
                f"model is a {type(model).__name__}: give a model of transformers, and not what "
                "wraps it"
            )
        if any(weight.is_meta for weight in model.parameters()):
            raise ConfigError("model is on the meta device and has no weights: load it")
        quantised = getattr(model.config, "quantization_config", None)
        in_bits = {n: getattr(quantised, f"load_in_{n}", False) for n in ("4bit", "8bit")}
        changes |= {
            "name": model.name_or_path,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "quantization": next((bits for bits, used in in_bits.items() if used), "none"),
            "trust_remote_code": type(model).__module__.startswith("transformers_modules"),
        }
        if Path(model.name_or_path).is_dir():
            changes["name"] = str(Path(model.name_or_path).absolute())
        found = config.model_copy(update=changes)
        if model.name_or_path and base.is_stored(model, found):
            return found
        if self.tokenizer is None:
            raise ConfigError("give a tokenizer: the model is in no files to take it from")
        return found.model_copy(update={"name": str((out / BASE).absolute()), "revision": None})

    def store(self, config: ModelConfig, folder: Path) -> None:
        """Write model and tokenizer to where ``config`` says, unless they are there.

        A digest of the rows goes into the run's folder. Raises `ConfigError` where there are
        others: those of an earlier run in this folder.
        """
        if self.tokenizer is not None and config.tokenizer is not None:
            _store(self.tokenizer, Path(config.tokenizer), self._is_same_tokenizer)
        if self.model is not None:
            model = self.model
            _store(model, Path(config.name), lambda path: base.is_stored(model, config))
        if self.tables is not None:
            file = folder / ROWS
            if not file.exists():
                file.write_text(self.tables.digest, encoding="utf-8")
            elif file.read_text(encoding="utf-8") != self.tables.digest:
                raise ConfigError(
                    f"the run in {str(folder)!r} has other rows than the ones given: continue with "
                    "the same rows, or choose another folder"
                )

    def _is_same_tokenizer(self, path: Path) -> bool:
        own, other = self.tokenizer, AutoTokenizer.from_pretrained(path)
        return own is not None and (own.get_vocab(), own.chat_template) == (
            other.get_vocab(),
            other.chat_template,
        )


NONE = Objects()


def _store(
    thing: PreTrainedModel | PreTrainedTokenizerBase, path: Path, is_there: Callable[[Path], bool]
) -> None:
    if not path.is_absolute():  # a name on the hub
        return
    if not path.exists():
        part = path.with_name(f".{path.name}.part")
        thing.save_pretrained(part)
        part.rename(path)
    elif not is_there(path):
        raise ConfigError(
            f"{str(path)!r} has another {type(thing).__name__} than the one given: continue with "
            "the same objects, or choose another folder"
        )

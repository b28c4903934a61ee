"""A model to train and to evaluate: the base with an exchangeable adapter, and its task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase

from prelort.errors import ConfigError
from prelort.tasks._causal import CausalTask
from prelort.tasks.interface import Batch, Example, Task
from prelort.tasks.packing import pack
from prelort.training.processes import ALONE, Processes
from prelort.training.truncation import Truncation

ComputeMetrics = Callable[[EvalPrediction], Mapping[str, float]]
"""From predictions and labels to the values of metrics by their names."""


@dataclass(frozen=True, slots=True)
class ModelRuntime:
    """The base model with LoRA layers, their truncation, and how the task sees its batches.

    ``tokenizer`` is needed only where text is generated. ``compute_metrics``: own metrics, as in
    transformers' Trainer (`prelort.metrics.evaluate`). ``processes``: those that train a client
    together, each with such a model. One thread may use it at a time.
    """

    model: PeftModel
    truncation: Truncation
    task: Task
    pad_id: int
    tokenizer: PreTrainedTokenizerBase | None = None
    compute_metrics: ComputeMetrics | None = None
    processes: Processes = ALONE

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def by_example(self) -> bool:
        """Whether each example of a batch can have its own truncation, and its own adapter.

        Not where the rows of a layer are not those of the batch: DeBERTa's relative positions, and
        XLNet, whose batch comes second. Tried once, with 3 rows of 5 tokens.
        """
        if self.truncation.by_example is None:
            end = getattr(self.model.config, "eos_token_id", None)
            ids = [end if isinstance(end, int) else 0] * 5  # an encoder-decoder reads its end token
            rows = torch.tensor([ids] * 3, device=self.device)
            ranks = torch.ones(3, dtype=torch.int64, device=self.device)
            with torch.no_grad(), evaluation_mode(self.model), self.truncation.at(ranks, (3, 5)):
                try:
                    self.model(input_ids=rows, attention_mask=torch.ones_like(rows))
                    self.truncation.by_example = True
                except ConfigError:
                    self.truncation.by_example = False
        return self.truncation.by_example

    def collate(self, examples: Sequence[Example], *, packing: bool = False) -> Batch:
        """A batch of examples, each in a row of its own or with ``packing`` in fewer rows."""
        if not packing:
            return self.task.collate(examples, self.pad_id)
        attention = getattr(self.model.config, "_attn_implementation", None) or ""
        return pack(examples, self.pad_id, one_row="flash" in attention)

    def check_packing(self) -> None:
        """Raise `ConfigError` if examples that share a row are not independent of each other.

        Tried once: in any order in their row, three examples must have the same losses. They do not
        in recurrent layers, or if a model does not use the positions that it is given.
        """
        own = type(self.task)
        if any(
            getattr(own, part, None) is not getattr(CausalTask, part)
            for part in ("collate", "weight", "losses")
        ):
            raise ConfigError(
                f"training.packing = true does not work with task {own.__name__}, which has its "
                "own collate, weight or losses: use false"
            )
        if self.truncation.separates is None:
            rows = self.model.get_input_embeddings().num_embeddings
            ids = [[(7 * i + 31 * n) % rows for i in range(5)] for n in range(3)]
            longest, *short = [Example(own, own) for own in ([*ids[0], *ids[1], *ids[2]], *ids)]
            found: list[Tensor] = []
            with torch.no_grad(), evaluation_mode(self.model), self.truncation.at(0):
                for some in (short, short[::-1]):
                    packed = self.collate([longest, *some], packing=True)
                    batch = {key: value.to(self.device) for key, value in packed.items()}
                    try:
                        found.append(self.task.losses(self.model, batch)[1:])
                    except torch.OutOfMemoryError:
                        raise
                    except (TypeError, ValueError, RuntimeError, IndexError):
                        break
            self.truncation.separates = len(found) == 2 and torch.allclose(
                found[0], found[1].flip(0), rtol=1e-3 if low_precision(self.model) else 1e-5
            )
        if not self.truncation.separates:
            raise ConfigError(
                "training.packing = true does not work with this model, in which an example "
                "depends on the others of its row: use false"
            )


def low_precision(model: nn.Module) -> bool:
    """Whether the model computes in half precision or less."""
    low = (torch.float16, torch.bfloat16, torch.int8)
    return any(parameter.dtype in low for parameter in model.parameters())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is back in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

"""One model evaluated at several ranks on the same examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import EvalPrediction

from prelort.errors import ConfigError
from prelort.extensions import calling
from prelort.metrics import scores
from prelort.metrics.generate import continuations, fit_prompt
from prelort.metrics.scores import HIGHER_IS_BETTER
from prelort.tasks.interface import IGNORED, Batch, Example, Task
from prelort.training.processes import ALONE, Processes
from prelort.training.runtime import ComputeMetrics, ModelRuntime, evaluation_mode

T = TypeVar("T")

Array = npt.NDArray[Any]

FROM_LOGITS = ("accuracy", "macro_f1")

AtRanks = Callable[[Sequence[int], int, int], AbstractContextManager[Any]]
"""``at_ranks(ranks, rows, length)``: while it is active, part i of a batch goes through the model
of ``ranks[i]``. Every part has ``rows`` rows of ``length`` tokens (0: any)."""


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """What is measured (docs/configuration.md, ``[evaluation]``); the loss always is.

    ``max_new_tokens`` and ``max_generated`` (examples) limit the generation for ``rouge_l``.
    """

    metrics: tuple[str, ...]
    batch_size: int = 32
    max_new_tokens: int = 48
    max_generated: int = 64


def evaluate(
    runtime: ModelRuntime,
    examples: Sequence[Example],
    ranks: Sequence[int],
    at_ranks: AtRanks,
    settings: EvaluationSettings,
    *,
    progress: Callable[[int, int], None] | None = None,
    at_once: int = 1,
) -> dict[int, dict[str, float]]:
    """The metrics, and always ``loss``, at each of ``ranks`` (0 is the untuned base).

    A forward pass evaluates up to ``at_once`` ranks, each on its own copy of the rows, and fewer
    where memory does not suffice. The order of the examples, ``batch_size`` and ``at_once`` matter
    only for rounding, except that ``rouge_l`` takes the first ``max_generated`` examples that have
    a prompt and a reference. Units: loss in nats per token (causal) or example, accuracy and
    macro_f1 in 0..1, rouge_l in 0..100. ``progress`` is called with the number of steps done and of
    all steps. The modules' training modes are restored. Of several `ModelRuntime.processes` with
    whole bases each measures a share of the examples, and all return the values over all of them.

    The task's ``compute_metrics`` and the runtime's add values of their own. They get numpy arrays
    in the order of the examples: a classification's logits [examples, classes], or the token that a
    causal model finds most likely after each place [examples, length], padded with `IGNORED` as the
    labels are.

    Raises `ConfigError` for a metric that the task does not allow and where nothing can be
    measured: no examples, no labels, no references for ``rouge_l``.
    """
    prompts: list[Example] = []
    if "rouge_l" in settings.metrics:
        usable = (e for e in examples if e.reference and e.prompt_length > 0)
        prompts = list(islice(usable, settings.max_generated))
    _check(runtime.task, examples, prompts, settings.metrics)
    if not ranks:
        return {}
    outputs = {rank: _Outputs() for rank in ranks}
    groups = _RankGroups(ranks, at_once)
    # A base that is split needs all processes in every pass, so that each measures all examples.
    processes = runtime.processes if runtime.processes.split is None else ALONE
    batches = _batches([len(e.input_ids) for e in examples], settings.batch_size, processes)
    generated = _batches([e.prompt_length for e in prompts], settings.batch_size, processes)
    count = _Counter(progress, (len(batches) + len(generated)) * len(ranks))
    own = _own_metrics(runtime, settings.metrics)
    predict = bool(own) or any(metric in FROM_LOGITS for metric in settings.metrics)
    # Not inference_mode: tensors made there (rotary caches) must not meet autograd later.
    with evaluation_mode(runtime.model), torch.no_grad():
        for indices in batches:
            batch = runtime.task.collate([examples[i] for i in indices], runtime.pad_id)
            weight = int(runtime.task.weight(batch))
            labels = batch["labels"].numpy()
            for group, scored in groups.map(partial(_score, runtime, at_ranks, batch, predict)):
                for rank, (losses, made) in zip(group, scored, strict=True):
                    outputs[rank].nll += float(losses.sum())
                    outputs[rank].weight += weight
                    if predict:
                        outputs[rank].made.update(zip(indices, made.cpu().numpy(), strict=True))
                        outputs[rank].labels.update(zip(indices, labels, strict=True))
                    count()
        for indices in generated:
            some = [prompts[i] for i in indices]
            for group, texts in groups.map(partial(_generate, runtime, at_ranks, some, settings)):
                for rank, continued in zip(group, texts, strict=True):
                    outputs[rank].texts.update(zip(indices, continued, strict=True))
                    count()
    if processes.count > 1:
        outputs = _of_all(outputs, processes)
    references = [example.reference for example in prompts]
    return {rank: _summary(outputs[rank], settings.metrics, references, own) for rank in ranks}


def ranks_at_once(device: torch.device) -> int:
    """The number of ranks to evaluate in one forward pass, by default.

    Several on a GPU, which a small batch does not fill; one on a CPU, where more bring nothing.
    """
    return 1 if device.type == "cpu" else 8


@dataclass
class _Outputs:
    """The outputs at one rank so far."""

    nll: float = 0.0  # a Python float is a float64
    weight: int = 0
    made: dict[int, Array] = field(default_factory=dict)
    """An example's logits [classes], or the tokens that were most likely [length]."""
    labels: dict[int, Array] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)

    def predicted(self) -> list[int]:
        """The predicted classes, in the order of `truth`."""
        return [int(logits.argmax()) for logits in self.made.values()]

    def truth(self) -> list[int]:
        """The classes' numbers."""
        return [int(label) for label in self.labels.values()]


def _of_all(outputs: Mapping[int, _Outputs], processes: Processes) -> dict[int, _Outputs]:
    """The outputs of all processes together."""

    def listed(rows: Mapping[int, Array]) -> list[tuple[int, str, object]]:
        return [(index, str(row.dtype), row.tolist()) for index, row in rows.items()]

    def rows(listed: Iterable[tuple[int, str, object]]) -> dict[int, Array]:
        return {index: np.array(row, dtype) for index, dtype, row in listed}

    own = [
        (rank, o.nll, o.weight, listed(o.made), listed(o.labels), [*o.texts.items()])
        for rank, o in outputs.items()
    ]
    together = {rank: _Outputs() for rank in outputs}
    for part in processes.all_gather(json.dumps(own).encode()):
        for rank, nll, weight, made, labels, texts in json.loads(part):
            together[rank].nll += nll
            together[rank].weight += weight
            together[rank].made |= rows(made)
            together[rank].labels |= rows(labels)
            together[rank].texts |= dict(texts)
    return together


class _RankGroups:
    """The ranks that share a forward pass; half as many from when memory does not suffice."""

    def __init__(self, ranks: Sequence[int], at_once: int) -> None:
        self._ranks = ranks
        self._at_once = at_once

    def map(self, work: Callable[[Sequence[int]], T]) -> Iterator[tuple[Sequence[int], T]]:
        """Group after group with the result of ``work`` on it, until all ranks are done."""
        done = 0
        while done < len(self._ranks):
            group = self._ranks[done : done + self._at_once]
            try:
                result = work(group)
            except torch.OutOfMemoryError:
                if len(group) == 1:
                    raise
                self._at_once = len(group) // 2
                torch.cuda.empty_cache()
            else:
                done += len(group)
                yield group, result


class _Counter:
    """Counts its calls and reports them."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _score(
    runtime: ModelRuntime, at_ranks: AtRanks, batch: Batch, predict: bool, group: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """For each rank the losses (float64) [rows] and, with ``predict``, what was predicted."""
    rows, length = batch["input_ids"].shape
    repeated = {
        name: tensor.to(runtime.device).repeat(len(group), *[1] * (tensor.ndim - 1))
        for name, tensor in batch.items()
    }
    with at_ranks(group, rows, length):
        if predict:
            losses, made = runtime.task.scores(runtime.model, repeated)
        else:
            losses = made = runtime.task.losses(runtime.model, repeated)
    by_rank = made.reshape(len(group), rows, *made.shape[1:])
    return list(zip(losses.double().view(-1, rows), by_rank, strict=True))


def _generate(
    runtime: ModelRuntime,
    at_ranks: AtRanks,
    examples: Sequence[Example],
    settings: EvaluationSettings,
    group: Sequence[int],
) -> list[list[str]]:
    """For each rank the texts that continue the examples' prompts."""
    limit = settings.max_new_tokens
    prompts = [fit_prompt(runtime.model, e.input_ids[: e.prompt_length], limit) for e in examples]
    with at_ranks(group, len(prompts), 0):
        texts = continuations(
            runtime.model,
            runtime.tokenizer,
            prompts * len(group),
            pad_id=runtime.pad_id,
            max_new_tokens=limit,
            device=runtime.device,
        )
    return [texts[start : start + len(prompts)] for start in range(0, len(texts), len(prompts))]


def _check(
    task: Task, examples: Sequence[Example], prompts: Sequence[Example], metrics: Sequence[str]
) -> None:
    for metric in metrics:
        if metric not in task.metrics:
            allowed = ", ".join(task.metrics)
            raise ConfigError(
                f"metric {metric!r} is not defined for task {task.name!r}: allowed are {allowed}"
            )
        if metric in FROM_LOGITS and task.kind != "classification":
            raise ConfigError(f"metric {metric!r} needs a task that classifies, not {task.name!r}")
    if not examples:
        raise ConfigError("there are no test examples to evaluate on")
    if "rouge_l" in metrics and not prompts:
        raise ConfigError("metric 'rouge_l' needs test examples with a prompt and a reference")


def _batches(lengths: Sequence[int], size: int, processes: Processes) -> list[list[int]]:
    """This process's indices, in batches of like length to save padding.

    The longest come first, to fail early.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    order = order[processes.index :: processes.count]
    return [order[start : start + size] for start in range(0, len(order), size)]


def _summary(
    outputs: _Outputs,
    metrics: Sequence[str],
    references: Sequence[str],
    own: Mapping[str, ComputeMetrics],
) -> dict[str, float]:
    if outputs.weight < 1:
        raise ConfigError("no test example has anything to learn: every label is ignored")
    texts = [outputs.texts[index] for index in range(len(outputs.texts))]
    score_of: dict[str, Callable[[], float]] = {
        "perplexity": lambda: scores.perplexity(outputs.nll, outputs.weight),
        "accuracy": lambda: scores.accuracy(outputs.predicted(), outputs.truth()),
        "macro_f1": lambda: scores.macro_f1(outputs.predicted(), outputs.truth()),
        "rouge_l": lambda: scores.rouge_l(texts, references),
    }
    values = {metric: score_of[metric]() for metric in metrics if metric in score_of}
    if own:
        made, labels = _in_order(outputs.made), _in_order(outputs.labels)
        for owner, compute in own.items():
            with calling(owner, "compute_metrics"):
                found = compute(EvalPrediction(predictions=made, label_ids=labels))
            values |= _numbers(owner, found)
    if missing := [metric for metric in metrics if metric not in values]:
        raise ConfigError(f"task: compute_metrics did not return its metric {missing[0]!r}")
    return values | {"loss": outputs.nll / outputs.weight}


def _own_metrics(runtime: ModelRuntime, metrics: Sequence[str]) -> dict[str, ComputeMetrics]:
    """What computes further metrics: the user's function, and the task's if it has any."""
    own: dict[str, ComputeMetrics] = {}
    if any(metric not in HIGHER_IS_BETTER for metric in metrics):
        own[f"task {type(runtime.task).__name__}"] = runtime.task.compute_metrics
    if runtime.compute_metrics is not None:
        own["prelort.Federation"] = runtime.compute_metrics
    return own


def _numbers(owner: str, values: Any) -> dict[str, float]:
    """What ``compute_metrics`` returned. Raises `ConfigError` unless these are numbers by name."""
    try:
        numbers = {str(metric): float(value) for metric, value in dict(values).items()}
    except (TypeError, ValueError):
        numbers = None
    if numbers is None or "loss" in numbers:  # which is measured anyway
        raise ConfigError(
            f"{owner}: compute_metrics must return numbers by name, such as {{'f1': 0.5}}, and "
            f"none named 'loss', but returned {values!r}"
        )
    return numbers


def _in_order(rows: Mapping[int, Array]) -> Array:
    """The rows in the order of the examples, padded on the right with `IGNORED`."""
    arrays = [rows[index] for index in sorted(rows)]
    if len({array.shape for array in arrays}) == 1:
        return np.stack(arrays)
    padded = np.full((len(arrays), max(map(len, arrays))), IGNORED)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return padded

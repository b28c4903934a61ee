"""One model measured at several ranks on the same examples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from prelort.errors import ConfigError
from prelort.metrics import scores
from prelort.metrics.generate import continuations, fit_prompt, pad_token
from prelort.tasks.interface import Batch, Example, Task

FROM_LOGITS = ("accuracy", "macro_f1")

AtRanks = Callable[[Sequence[int], int, int], AbstractContextManager[Any]]
"""Makes a model that of some ranks, for as many parts of a batch, of so many rows and tokens."""


@dataclass
class _Tally:
    """What one rank has gathered so far."""

    nll: float = 0.0  # a Python float is a float64
    weight: int = 0
    predictions: list[int] = field(default_factory=list)
    truth: list[int] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)


def evaluate(
    model: torch.nn.Module,
    task: Task,
    examples: Sequence[Example],
    ranks: Sequence[int],
    at_ranks: AtRanks,
    *,
    metrics: Sequence[str],
    tokenizer: Any,
    batch_size: int,
    max_new_tokens: int,
    max_generated: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
    at_once: int = 1,
) -> dict[int, dict[str, float]]:
    """The metrics, and always ``loss``, at each of ``ranks`` (0 is the untuned base).

    A forward pass measures up to ``at_once`` ranks: its batch has the same rows again for each of
    them, one rank after the other, and ``with at_ranks(some ranks, rows of each, length):`` must
    send every part through the model of its rank. Neither the order of the examples nor
    ``batch_size`` nor ``at_once`` matters but for rounding, except that ``rouge_l`` takes the first
    ``max_generated`` examples that have a prompt and a reference. Units: loss in nats per token
    (causal) or example, accuracy and macro_f1 in 0..1, rouge_l in 0..100. ``progress`` is called
    with the steps done and their number. The modules' training modes are restored.

    Raises `ConfigError` for a metric that the task does not allow and where nothing can be
    measured: no examples, nothing learnt in them, no references for ``rouge_l``.
    """
    _check(task, examples, metrics)
    if not ranks:
        return {}
    asked = _with_reference(examples)[:max_generated] if "rouge_l" in metrics else []
    if "rouge_l" in metrics and not asked:
        raise ConfigError("metric 'rouge_l' needs test examples with a prompt and a reference")
    batches = _batches(examples, [len(e.input_ids) for e in examples], batch_size)
    generated = _batches(asked, [e.prompt_length for e in asked], batch_size)
    tallies = {rank: _Tally() for rank in ranks}
    total = (len(batches) + len(generated)) * len(tallies)
    tick = _ticker(progress, total)
    parts = _Parts(ranks, at_once)
    with _evaluating(model), _logits(model, any(m in FROM_LOGITS for m in metrics)) as logits:

        def learn(batch: Batch, weight: int, part: Sequence[int]) -> None:
            rows, length = batch["input_ids"].shape
            several = {n: t.repeat(len(part), *[1] * (t.ndim - 1)) for n, t in batch.items()}
            logits.clear()
            with at_ranks(part, rows, length):
                losses = task.losses(model, several).double().view(len(part), rows)
            found = logits.pop().argmax(dim=-1).view(len(part), rows) if logits else None
            for index, rank in enumerate(part):
                tally = tallies[rank]
                tally.nll += float(losses[index].sum())
                tally.weight += weight
                if found is not None:
                    tally.predictions += found[index].tolist()
                    tally.truth += batch["labels"].tolist()
                tick()

        for members in batches:
            batch = task.collate([examples[i] for i in members], pad_token(tokenizer))
            weight = int(task.weight(batch))
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            parts.each(partial(learn, batch, weight))
    with _evaluating(model):

        def write(members: Sequence[int], prompts: list[list[int]], part: Sequence[int]) -> None:
            with at_ranks(part, len(prompts), 0):
                texts = continuations(
                    model,
                    tokenizer,
                    prompts * len(part),
                    max_new_tokens=max_new_tokens,
                    device=device,
                )
            for index, rank in enumerate(part):
                own = texts[index * len(prompts) : (index + 1) * len(prompts)]
                tallies[rank].texts.update(zip(members, own, strict=True))
                tick()

        for members in generated:
            prompts = [asked[i].input_ids[: asked[i].prompt_length] for i in members]
            prompts = [fit_prompt(model, prompt, max_new_tokens) for prompt in prompts]
            parts.each(partial(write, members, prompts))
    references = [example.reference for example in asked]
    return {rank: _summary(tally, metrics, references) for rank, tally in tallies.items()}


class _Parts:
    """The ranks that share a forward pass; half as many from when memory does not suffice."""

    def __init__(self, ranks: Sequence[int], at_once: int) -> None:
        self._ranks = ranks
        self._at_once = at_once

    def each(self, measure: Callable[[Sequence[int]], None]) -> None:
        """Call ``measure`` with part after part, until all ranks have been measured."""
        done = 0
        while done < len(self._ranks):
            part = self._ranks[done : done + self._at_once]
            try:
                measure(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self._at_once = len(part) // 2
                torch.cuda.empty_cache()
            else:
                done += len(part)


def ranks_at_once(device: torch.device) -> int:
    """How many ranks to measure in one forward pass, by default.

    On a GPU several, or as many as its memory holds: a small batch does not fill it. On a CPU one,
    where more bring nothing.
    """
    return 1 if device.type == "cpu" else 8


def _check(task: Task, examples: Sequence[Example], metrics: Sequence[str]) -> None:
    for metric in metrics:
        if metric not in task.allowed_metrics:
            allowed = ", ".join(task.allowed_metrics)
            raise ConfigError(
                f"metric {metric!r} is not defined for task {task.name!r}: allowed are {allowed}"
            )
        if metric in FROM_LOGITS and task.kind != "classification":
            raise ConfigError(f"metric {metric!r} needs a task that classifies, not {task.name!r}")
    if not examples:
        raise ConfigError("there are no test examples to evaluate on")


def _with_reference(examples: Sequence[Example]) -> list[Example]:
    return [e for e in examples if e.reference and e.prompt_length > 0]


def _batches(examples: Sequence[Example], lengths: list[int], size: int) -> list[list[int]]:
    """Indices in batches of like length, to save padding; the longest first, to fail early."""
    order = sorted(range(len(examples)), key=lambda i: -lengths[i])
    return [order[start : start + size] for start in range(0, len(order), size)]


def _ticker(progress: Callable[[int, int], None] | None, total: int) -> Callable[[], None]:
    """A function that counts its calls and reports them."""
    counter = itertools.count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(counter), total)

    return tick


def _summary(tally: _Tally, metrics: Sequence[str], references: list[str]) -> dict[str, float]:
    if tally.weight < 1:
        raise ConfigError("no test example has anything to learn: every label is ignored")
    values: dict[str, float] = {}
    for metric in metrics:
        if metric == "perplexity":
            values[metric] = scores.perplexity(tally.nll, tally.weight)
        elif metric == "accuracy":
            values[metric] = scores.accuracy(tally.predictions, tally.truth)
        elif metric == "macro_f1":
            values[metric] = scores.macro_f1(tally.predictions, tally.truth)
        elif metric == "rouge_l":
            ordered = [tally.texts[i] for i in range(len(references))]
            values[metric] = scores.rouge_l(ordered, references)
        else:
            raise ConfigError(f"metric {metric!r} is allowed by the task but unknown here")
    values["loss"] = tally.nll / tally.weight
    return values


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No gradients and eval mode; afterwards every module is back in the mode that it had."""
    # Not inference_mode: tensors made there (rotary caches) must not meet autograd later.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _logits(model: torch.nn.Module, wanted: bool) -> Iterator[list[torch.Tensor]]:
    """The list that receives the logits of each forward pass.

    They are overheard while the task computes its loss, which saves a second forward pass.
    """
    heard: list[torch.Tensor] = []

    def hear(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        heard.append(output.logits)

    handle = model.register_forward_hook(hear) if wanted else None
    try:
        yield heard
    finally:
        if handle is not None:
            handle.remove()

"""What is checked before anything is trained: that the base suits the task, and that it learns.

`check_model` needs shapes alone, so that a plan can make it without weights. `rehearse` runs the
model on a few real examples, on the base alone and with an adapter whose factors are all drawn, so
that every trained tensor has a gradient. Neither changes the model or the random state.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from heapq import nlargest
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prelort.adapters import Factors, LoraAdapter
from prelort.config import Config
from prelort.errors import ConfigError
from prelort.extensions import TASKS, calling
from prelort.methods import find
from prelort.models import base
from prelort.models.lora import ADAPTER, install, lora_layers, saved_module_places
from prelort.models.targets import last_parts, stacked
from prelort.tasks.classification import Classification
from prelort.tasks.interface import Batch, Example
from prelort.tasks.token_losses import check_parts
from prelort.training.private import ExampleGradients
from prelort.training.runtime import ModelRuntime, evaluation_mode, low_precision
from prelort.training.settings import LocalTraining

ROWS = 4
"""Examples of the trial batch, at most the batch size of training."""

SAMPLE = 100
"""Examples of a client, evenly spaced, whose tokens are counted."""

CUT = ("instruction", "chat", "classification")
"""Tasks that cut a text which is too long; plain text goes on in the next block."""

SOME_CUT = 1 / 10
"""The share of a client's examples that are cut from which on a warning says so."""

SOME_UNKNOWN, MOST_UNKNOWN = 1 / 20, 1 / 3
"""Shares of unknown tokens from which on there is a warning, and an error.

Not higher, since of the two tokens that SentencePiece makes of an unknown word one is known.
"""

STEPS = (3e-3, 1e-2, 3e-2)
"""Changes of weights along their gradient, relative to their norm: one must agree with it."""

AGREEMENT = 0.3
"""How far a difference of the loss may be from what the gradient says, relative to that."""


@dataclass(frozen=True, slots=True)
class Preflight:
    """What was found: the base's mean loss, and the adapted layers that the model does not use."""

    loss: float
    idle: tuple[str, ...] = ()


def check_model(config: Config, model: PreTrainedModel, kind: str) -> None:
    """Raise `ConfigError` for a base that cannot do the task; it may be on the meta device."""
    name = config.model.name
    base.check_kind(config.model, kind)
    longest, tokens = positions(model), config.data.max_length
    if longest is not None and tokens > longest:
        raise ConfigError(
            f"data.max_length = {tokens} is more than the {longest} positions of model.name = "
            f"{name!r}: use at most {longest}"
        )
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is None and isinstance(known, int) and tokens > known:
        warnings.warn(
            f"data.max_length = {tokens} is more than the {known} tokens for which model.name = "
            f"{name!r} is made: it may be poor at longer texts",
            stacklevel=2,
        )


def positions(model: PreTrainedModel) -> int | None:
    """The longest text for which there are learned positions; None without a table of them."""
    whole = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    inputs = base.token_table(model)
    found = []
    for table in model.modules():
        if not isinstance(table, nn.Embedding) or table is inputs:
            continue
        # RoBERTa and its kin count from the padding index on; OPT and BART add rows instead.
        offset = getattr(table, "offset", 0)
        reserved = offset or (0 if table.padding_idx is None else table.padding_idx + 1)
        if whole is not None and table.num_embeddings == whole + offset:
            found.append(table.num_embeddings - reserved)
    return min(found, default=None)


def check_examples(
    config: Config, tokenizer: Any, examples: Mapping[str, Sequence[Example]]
) -> None:
    """Warn of clients whose examples are cut, or have many tokens that the tokenizer does not know.

    ``examples``: of each client by its name. Raises `ConfigError` if a third of the tokens is
    unknown at every client: nothing can be learnt from such texts.
    """
    examples = {name: own[:: max(1, len(own) // SAMPLE)] for name, own in examples.items()}
    if config.task in CUT:
        longest = config.data.max_length
        cut = {
            name: sum(len(one.input_ids) >= longest for one in own) / len(own)
            for name, own in examples.items()
        }
        worst = max(cut, key=lambda client: cut[client])
        if cut[worst] > SOME_CUT:
            warnings.warn(
                f"data.max_length = {longest} tokens cuts {cut[worst]:.0%} of the examples of "
                f"client {worst!r}",
                stacklevel=3,
            )
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return  # tokenizers of bytes have no other, and name the end token
    special = {*tokenizer.all_special_ids} - {unknown}
    shares = {}
    for client, own in examples.items():
        counts = Counter(chain.from_iterable(example.input_ids for example in own))
        shares[client] = counts[unknown] / max(1, counts.total() - sum(counts[i] for i in special))
    worst = max(shares, key=lambda client: shares[client])
    said = (
        f"model.name = {config.model.name!r}: {shares[worst]:.0%} of the tokens of client "
        f"{worst!r} are unknown to its tokenizer ({tokenizer.unk_token!r}): use a model for the "
        "language and script of the texts"
    )
    if min(shares.values()) > MOST_UNKNOWN:
        raise ConfigError(said)
    if shares[worst] > SOME_UNKNOWN:
        warnings.warn(said, stacklevel=3)


def rehearse(
    config: Config, runtime: ModelRuntime, initial: LoraAdapter, examples: Sequence[Example]
) -> Preflight:
    """Try the model on some of the ``examples``. Raises `ConfigError` for what is wrong with it.

    In float32 the gradient of the first layers is also compared with differences of the loss along
    it: a backward pass that is cut or wrong anywhere shows there.
    """
    model, name = runtime.model, config.model.name
    inner: PreTrainedModel = model.get_base_model()
    _check_tokens(name, inner, runtime, examples)
    longest_first = nlargest(ROWS, examples, key=lambda example: len(example.input_ids))
    some = longest_first[: config.training.batch_size]
    task = runtime.task
    is_own = config.task not in TASKS
    # A classifier's losses are those of its scores, which is what its author has written.
    part = "scores()" if type(task).losses is Classification.losses else "losses()"
    with calling(f"task {type(task).__name__}", "collate() or weight()"):
        batch = task.collate(some, runtime.pad_id)
        batch = {key: value.to(runtime.device) for key, value in batch.items()}
        weight = max(1, task.weight(batch))
    tokens = (batch["input_ids"].shape[0], batch["input_ids"].shape[1])

    def loss(rank: int | Tensor | None = None) -> Tensor:
        with runtime.truncation.at(rank, tokens):
            with calling(f"task {type(task).__name__}", part) if is_own else nullcontext():
                losses = task.losses(model, batch)
            if losses.shape != tokens[:1]:
                raise ConfigError(
                    f"task {type(task).__name__}: {part} must return one loss for each "
                    f"of the {tokens[0]} examples, but returned shape {tuple(losses.shape)}"
                )
            return losses.double().sum() / weight

    probe = _probe(initial)
    with torch.random.fork_rng(), evaluation_mode(model), runtime.truncation.fused(model):
        try:
            install(model, probe)
            called = _Called(lora_layers(model))
            with torch.no_grad(), called:
                untuned = float(loss(0))
                _check_finite(name, inner, untuned)
                if is_own:
                    _check_scores(runtime, batch, tokens, untuned * weight)
                if task.kind == "causal":
                    _check_causal(name, runtime, some[0])
                    _check_parts(name, runtime, some[0])
            objective = getattr(find(config.method.name), "default_objective", "plain")
            if config.training.packing:
                runtime.check_packing()
            if config.privacy.of_examples:
                settings = LocalTraining.of(config.training)
                ExampleGradients(runtime, settings).check(longest_first)
            if (config.method.objective or objective) == "example" and not runtime.by_example():
                _cannot_truncate_examples(config)
            loss().backward()  # type: ignore[no-untyped-call]
            idle = _check_gradients(config, model, called.names, lambda: float(loss()))
            # Experts switch with the smallest change.
            if not low_precision(inner) and not stacked(inner):
                _check_agreement(name, model, lambda: float(loss()))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"model.name = {name!r} fails on a batch of {len(some)} examples of up to "
                f"{tokens[1]} tokens: {first_line}"
            ) from error
        finally:
            install(model, initial)
    return Preflight(untuned, idle)


def _check_scores(
    runtime: ModelRuntime, batch: Batch, tokens: tuple[int, int], expected: float
) -> None:
    """What is measured must be what is trained: a user may have written one of them only."""
    name = f"task {type(runtime.task).__name__}"
    with calling(name, "scores()"), runtime.truncation.at(0, tokens):
        losses, made = runtime.task.scores(runtime.model, batch)
        found, rows = float(losses.double().sum()), len(made)
    if rows != tokens[0] or not math.isclose(found, expected, rel_tol=0.01, abs_tol=1e-3):
        raise ConfigError(
            f"{name}: scores() must return the losses of losses(), whose sum is {expected:.4g} and "
            f"not {found:.4g}, and what was predicted for each example"
        )


def _cannot_truncate_examples(config: Config) -> None:
    """Refuse the objective ``example`` if it is configured, else say what replaces it."""
    name = config.model.name
    if config.method.objective is not None:
        raise ConfigError(
            f"method.objective = 'example' does not work with model.name = {name!r}, which cannot "
            "truncate each example by itself: use 'step' or 'mean'"
        )
    warnings.warn(
        f"model.name = {name!r} cannot truncate each example by itself: clients train under "
        "method.objective = 'step', with one truncation for all examples of a step",
        stacklevel=3,
    )


def _not_causal(name: str) -> ConfigError:
    return ConfigError(
        f"model.name = {name!r} is no causal language model: what it predicts for a token depends "
        "on later ones, so that its loss means nothing; use task = 'classification', or a causal "
        "model"
    )


def _check_tokens(
    name: str, model: PreTrainedModel, runtime: ModelRuntime, examples: Sequence[Example]
) -> None:
    """Every token must have a row in the embedding; an encoder-decoder needs its end token once."""
    rows = getattr(base.token_table(model), "num_embeddings", math.inf)
    largest = max((max(e.input_ids, default=0) for e in examples), default=0)
    if largest >= rows:
        token = runtime.tokenizer.convert_ids_to_tokens(largest) if runtime.tokenizer else ""
        raise ConfigError(
            f"model.name = {name!r}: the texts have token {largest} ({token!r}), but its embedding "
            f"has {rows} rows: resize the model's embedding, or use its own tokenizer"
        )
    if model.config.is_encoder_decoder:
        end = model.config.eos_token_id
        counts = {e.input_ids.count(end) for e in examples}
        if counts - {1}:
            token = runtime.tokenizer.convert_ids_to_tokens(end) if runtime.tokenizer else end
            raise ConfigError(
                f"model.name = {name!r} classifies by the state of its end token {token!r}, which "
                f"must be in every text once, and is in some {max(counts - {1})} times: remove it "
                "from the texts themselves"
            )


def _check_finite(name: str, model: nn.Module, loss: float) -> None:
    """Say of a base whose loss is no number whether its weights or its type are to blame."""
    if math.isfinite(loss):
        return
    for tensor, value in model.named_parameters():
        if value.is_floating_point() and not torch.isfinite(value).all():
            own = tensor.removesuffix(".base_layer.weight").removesuffix(".weight")
            raise ConfigError(
                f"model.name = {name!r}: the base model itself gives loss {loss}: its weights are "
                f"damaged, {own!r} has values that are not finite; load it again"
            )
    raise ConfigError(
        f"model.name = {name!r}: the base model itself gives loss {loss}, though its weights are "
        "finite: it overflows; use model.dtype = 'bfloat16' or 'float32'"
    )


def _check_causal(name: str, runtime: ModelRuntime, example: Example) -> None:
    """Another last token must not change what is predicted before it."""
    ids = example.input_ids
    other = next((i for i in ids if i != ids[-1]), None)
    if other is None:
        return
    both = torch.tensor([ids, [*ids[:-1], other]], device=runtime.device)
    with runtime.truncation.at(0, (2, len(ids))):
        each = [
            runtime.model(input_ids=row[None], attention_mask=torch.ones_like(row)[None])
            for row in both
        ]
    first, second = (out.logits[0, :-1].float() for out in each)
    rounding = 0.1 if low_precision(runtime.model) else 1e-3
    if float((first - second).norm()) > rounding * float((first - first.mean()).norm()):
        raise _not_causal(name)


def _check_parts(name: str, runtime: ModelRuntime, example: Example) -> None:
    """Logits of a part of the tokens must be those of all, else all are computed at once."""
    ids = torch.tensor([example.input_ids[:8]], device=runtime.device)
    with runtime.truncation.at(0, (1, ids.shape[1])):
        if check_parts(runtime.model, ids, tolerance=0.1 if low_precision(runtime.model) else 1e-3):
            return
    warnings.warn(
        f"model.name = {name!r} does not compute its logits token by token: those of a whole batch "
        "are in memory at once",
        stacklevel=3,
    )


def _check_gradients(
    config: Config, model: nn.Module, called: Iterable[str], loss: Callable[[], float]
) -> tuple[str, ...]:
    """Every tensor that learns must have a gradient; the layers that the model does not use."""
    idle: list[str] = []
    called = set(called)
    for name, layer in lora_layers(model).items():
        b = layer.lora_B[ADAPTER].weight
        gradients = [layer.lora_A[ADAPTER].weight.grad, b.grad]
        if name not in called or (b.grad is None and _is_without_effect(b, loss)):
            idle.append(name)
        else:
            _check_gradient(config, f"layer {name!r}", gradients)
    for name, (module, attribute) in saved_module_places(model).items():
        _check_gradient(config, f"tensor {name!r}", [getattr(module, attribute).grad])
    if not idle:
        return ()
    if config.lora.target_modules not in ("all-linear", ("all-linear",)):
        raise ConfigError(
            f"lora.target_modules: the model never uses layer {idle[0]!r} on text "
            f"({len(idle)} such layers), so it cannot learn: leave it out"
        )
    warnings.warn(
        f"the model uses {len(idle)} of its adapted layers on no text, so they stay as they are: "
        f"{', '.join(last_parts(idle))}",
        stacklevel=2,
    )
    return tuple(idle)


@torch.no_grad()
def _is_without_effect(weight: nn.Parameter, loss: Callable[[], float]) -> bool:
    """Whether the loss stays the same with other numbers: nobody reads what they make."""
    before, kept = loss(), weight.clone()
    weight.add_(1.0)
    after = loss()
    weight.copy_(kept)
    return math.isclose(before, after, rel_tol=1e-7)


def _check_gradient(config: Config, what: str, gradients: Sequence[Tensor | None]) -> None:
    for gradient in gradients:
        if gradient is None or not torch.isfinite(gradient).all():
            found = "no gradient" if gradient is None else "a gradient that is not finite"
            raise ConfigError(
                f"{what} is meant to learn and has {found}: the backward pass of model.name = "
                f"{config.model.name!r} with quantization = {config.model.quantization!r} and "
                f"dtype = {config.model.dtype!r} does not work on this device"
            )


def _check_agreement(name: str, model: nn.Module, loss: Callable[[], float]) -> None:
    """Compare the gradient of the first quarter of the layers with the loss around it."""
    layers = list(lora_layers(model).items())
    first = layers[: max(1, len(layers) // 4)]
    pairs = [(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight) for _, layer in first]
    moved = [(w, w.grad.clone()) for pair in pairs for w in pair if w.grad is not None]
    slope = math.sqrt(sum(float(g.double().square().sum()) for _, g in moved))
    size = math.sqrt(sum(float(w.detach().double().square().sum()) for w, _ in moved))
    if slope == 0:
        return
    ratios = []
    with torch.no_grad():
        for step in STEPS:
            distance, ends = step * size, []
            for times in (1, -2):
                for weight, gradient in moved:
                    weight.add_(gradient, alpha=times * distance / slope)
                ends.append(loss())
            for weight, gradient in moved:
                weight.add_(gradient, alpha=distance / slope)
            ratios.append((ends[0] - ends[1]) / (2 * distance * slope))
            if abs(ratios[-1] - 1) < AGREEMENT:
                return
    closest = min(ratios, key=lambda ratio: abs(ratio - 1))
    raise ConfigError(
        f"model.name = {name!r}: the gradient of layers {first[0][0]!r} to {first[-1][0]!r} is "
        f"wrong: along it the loss changes by {closest:.2g} times what it says; a part of the base "
        "has no right backward pass on this device (a quantised one on a CPU?)"
    )


def _probe(initial: LoraAdapter) -> LoraAdapter:
    """``initial`` at rank 2 at most, with B drawn too, so that A has a gradient."""
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: Factors(f.A, torch.empty(f.B.shape).normal_(std=0.02, generator=generator))
        for name, f in initial.prefix(min(2, initial.rank)).layers.items()
    }
    return replace(initial, layers=layers)


class _Called:
    """Which of the layers a forward pass calls, with at least one row."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self.names: set[str] = set()
        self._layers = layers
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name)))

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            if inputs[0].numel():
                self.names.add(name)

        return hook

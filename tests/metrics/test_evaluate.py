import json
import math
import random
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from prelort.errors import ConfigError
from prelort.metrics.evaluate import EvaluationSettings, evaluate
from prelort.metrics.scores import macro_f1, rouge_l
from prelort.tasks.causal_lm import CausalLM
from prelort.tasks.classification import Classification
from prelort.tasks.interface import IGNORED, Example
from prelort.training.processes import Processes
from prelort.training.runtime import ModelRuntime

PAD, END, VOCABULARY = 0, 1, 40
cheap = settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Tokenizer:
    pad_token_id = PAD
    eos_token_id = END

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(f"w{i}" for i in ids if i not in (PAD, END))


class Causal(CausalLM):
    metrics = ("perplexity", "rouge_l", "accuracy")

    def losses(self, model, batch):
        assert not torch.is_grad_enabled()
        assert not model.training
        return super().losses(model, batch)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=2,
        eos_token_id=END,
        initializer_range=0.6,  # far from uniform: a mistake shows in the perplexity
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=4,
        initializer_range=0.6,
        hidden_dropout_prob=0.5,  # outside eval mode the answers are random
    )
    return BertForSequenceClassification(config)


def ranked(model):
    """A stand-in for an adapter: at rank r the head is 1 + r / 4 times as sharp."""
    head = model.get_output_embeddings() or model.classifier

    @contextmanager
    def at_ranks(ranks, rows=0, length=0):
        (rank,) = ranks
        before = head.weight.data
        head.weight.data = before * (1 + rank / 4)
        try:
            yield
        finally:
            head.weight.data = before

    return at_ranks


def texts(count, seed=0):
    draw = random.Random(seed)
    made = []
    for number in range(count):
        ids = [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(4, 14))]
        prompt = draw.randint(1, 3)
        labels = [IGNORED] * prompt + ids[prompt:]
        made.append(Example(ids, labels, prompt, f"w{number} w7 w9"))
    return made


def sentences(count, seed=0):
    draw = random.Random(seed)
    return [
        Example(
            [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(2, 12))], draw.randrange(4)
        )
        for _ in range(count)
    ]


def measure(
    model, task, examples, ranks=(0, 2, 4), metrics=("perplexity",), size=4,
    tokenizer=None, at_ranks=None, **more,
):  # fmt: skip
    limits = {n: more.pop(n) for n in ("max_new_tokens", "max_generated") if n in more}
    settings = EvaluationSettings(metrics, size, **({"max_new_tokens": 5} | limits))
    tokenizer = tokenizer or Tokenizer()
    runtime = ModelRuntime(model, None, task, tokenizer.pad_token_id, tokenizer)
    return evaluate(runtime, examples, ranks, at_ranks or ranked(model), settings, **more)


def alone(model, example, rank):
    """Sum of the negative log-likelihood (float64) and tokens of one example, with no padding."""
    with torch.no_grad(), ranked(model)([rank]):
        logits = model.eval()(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    chosen = logits.log_softmax(-1)
    at = [t for t in range(1, len(example.labels)) if example.labels[t] != IGNORED]
    return -sum(float(chosen[t - 1, example.labels[t]]) for t in at), len(at)


def test_perplexity_and_loss_at_each_rank_against_one_example_at_a_time(llama):
    examples = texts(9)
    result = measure(llama, Causal(), examples)
    assert list(result) == [0, 2, 4]
    for rank, row in result.items():
        sums = [alone(llama, e, rank) for e in examples]
        loss = sum(nll for nll, _ in sums) / sum(n for _, n in sums)
        assert row == pytest.approx({"perplexity": math.exp(loss), "loss": loss}, rel=1e-5)
    assert result[0]["loss"] != pytest.approx(result[4]["loss"], rel=1e-2)


@cheap
@given(st.randoms(use_true_random=False), st.integers(1, 12))
def test_causal_metrics_do_not_depend_on_order_or_batch_size(llama, draw, size):
    examples = texts(7)
    options = {"ranks": (0, 4), "metrics": ("perplexity", "rouge_l"), "max_new_tokens": 3}
    expected = measure(llama, Causal(), examples, **options)
    shuffled = draw.sample(examples, len(examples))
    result = measure(llama, Causal(), shuffled, size=size, **options)
    for rank in expected:
        assert result[rank] == pytest.approx(expected[rank], rel=1e-5)


def test_classification_against_one_example_at_a_time(bert):
    examples = sentences(11)
    result = measure(bert, Classification(), examples, metrics=("macro_f1", "accuracy"))
    bert.eval()
    for rank, row in result.items():
        with torch.no_grad(), ranked(bert)([rank]):
            logits = [bert(input_ids=torch.tensor([e.input_ids])).logits[0] for e in examples]
        truth = [e.labels for e in examples]
        guesses = [int(one.argmax()) for one in logits]
        hits = sum(g == t for g, t in zip(guesses, truth, strict=True))
        loss = sum(-float(z.log_softmax(-1)[t]) for z, t in zip(logits, truth, strict=True)) / 11
        assert 0 < hits < 11
        expected = {"macro_f1": macro_f1(guesses, truth), "accuracy": hits / 11, "loss": loss}
        assert row == pytest.approx(expected, rel=1e-5)
        assert list(row) == ["macro_f1", "accuracy", "loss"]


def greedy(model, prompt, steps):
    """The plainest possible generation: no cache, no padding, no library."""
    ids = list(prompt)
    for _ in range(steps):
        best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best == END:
            break
        ids.append(best)
    return Tokenizer().decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("size", [1, 3, 20])
def test_rouge_l_is_that_of_greedy_text_from_the_prompt_alone(llama, size):
    # References are what the base itself says, so only the right generation scores 100.
    llama.eval()
    with torch.no_grad():
        examples = [
            Example(e.input_ids, e.labels, e.prompt_length, greedy(llama, p, 5) or "nothing")
            for e in texts(9)
            for p in [e.input_ids[: e.prompt_length]]
        ]
        with ranked(llama)([4]):
            sharper = [greedy(llama, e.input_ids[: e.prompt_length], 5) for e in examples]
    assert len({e.reference for e in examples}) > 3
    result = measure(llama, Causal(), examples, (0, 4), metrics=("rouge_l",), size=size)
    assert result[0]["rouge_l"] == pytest.approx(100)
    references = [e.reference for e in examples]
    assert result[4]["rouge_l"] == pytest.approx(rouge_l(sharper, references))


def test_generation_is_greedy_whatever_the_models_settings_are(llama):
    prompts = [[7], [9, 3]]
    llama.eval()
    with torch.no_grad():
        plain = [greedy(llama, prompt, 12) for prompt in prompts]
    examples = [
        Example([*p, 3], [IGNORED] * len(p) + [3], len(p), t)
        for p, t in zip(prompts, plain, strict=True)
    ]
    before = llama.generation_config
    llama.generation_config = GenerationConfig(
        do_sample=True, temperature=2.0, repetition_penalty=5.0, suppress_tokens=[4, 5, 6],
        no_repeat_ngram_size=1, min_new_tokens=3, eos_token_id=END,
    )  # fmt: skip
    own = llama.generation_config
    try:
        result = measure(llama, Causal(), examples, (0,), metrics=("rouge_l",), max_new_tokens=12)
        assert llama.generation_config is own
    finally:
        llama.generation_config = before
    assert result[0]["rouge_l"] == pytest.approx(100)


def test_rouge_l_stops_at_the_end_token_even_if_the_filler_is_a_word(llama):
    class WordAsFiller(Tokenizer):
        pad_token_id = 5

    prompts = [[7], [9, 3], [4, 4, 4]]
    llama.eval()
    with torch.no_grad():
        said = [greedy(llama, p, 12) for p in prompts]
    # Make the second prompt's third word the end of text: its row is filled up after two words.
    end = int(said[1].split()[2][1:])
    cut = [" ".join(text.split(f"w{end}")[0].split()) or "nothing" for text in said]
    examples = [
        Example([*p, 3], [IGNORED] * len(p) + [3], len(p), reference)
        for p, reference in zip(prompts, cut, strict=True)
        if reference != "nothing"
    ]
    before = llama.generation_config.eos_token_id
    llama.generation_config.eos_token_id = [END, end]
    try:
        result = measure(
            llama, Causal(), examples, (0,), metrics=("rouge_l",),
            tokenizer=WordAsFiller(), max_new_tokens=12,
        )  # fmt: skip
    finally:
        llama.generation_config.eos_token_id = before
    assert result[0]["rouge_l"] == pytest.approx(100)


def test_rouge_l_takes_the_first_examples_that_have_a_reference(llama):
    llama.eval()
    with torch.no_grad():
        said = [greedy(llama, e.input_ids[: e.prompt_length], 5) for e in texts(9)]
    examples = [replace(e, reference=text) for e, text in zip(texts(9), said, strict=True) if text]
    examples.insert(1, replace(examples[0], reference=""))
    examples[4:] = [replace(e, reference="nothing") for e in examples[4:]]

    def score(limit):
        options = {"ranks": (0,), "metrics": ("rouge_l",), "max_generated": limit}
        return measure(llama, Causal(), examples, **options)[0]["rouge_l"]

    assert score(3) == pytest.approx(100)
    assert score(4) == pytest.approx(75)


def test_modes_and_gradients_are_as_before_and_progress_is_told(llama):
    llama.train()
    llama.model.layers[0].eval()
    modes = [module.training for module in llama.modules()]
    told = []
    measure(
        llama, Causal(), texts(9), metrics=("perplexity", "rouge_l"),
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert [module.training for module in llama.modules()] == modes
    assert told == [(i, 18) for i in range(1, 19)]  # (3 batches + 3 of prompts) x 3 ranks
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert torch.is_grad_enabled()


def test_a_model_that_broke_has_an_infinite_perplexity(llama):
    class Huge(Causal):
        def losses(self, model, batch):
            return torch.full((len(batch["labels"]),), 1e30)

    assert measure(llama, Huge(), texts(2), (0,))[0]["perplexity"] == math.inf


@pytest.mark.parametrize("holds", [1, 2, 3])
def test_where_memory_does_not_suffice_fewer_ranks_share_a_pass(llama, holds):
    """And the results are as if each had one of its own."""
    sizes = []

    class Small(Causal):
        def losses(self, model, batch):
            sizes.append(len(batch["labels"]))
            if len(batch["labels"]) > 2 * holds:
                raise torch.OutOfMemoryError("full")
            return super().losses(model, batch)

    def at_ranks(ranks, rows, length):
        return nullcontext()

    options = {"at_ranks": at_ranks, "size": 2}
    found = measure(llama, Small(), texts(4), (0, 2, 4, 8), at_once=4, **options)
    alone = measure(llama, Causal(), texts(4), (0,), **options)
    assert list(found) == [0, 2, 4, 8]
    assert all(values == pytest.approx(alone[0]) for values in found.values())
    assert sizes[0] == 8
    assert sizes.count(2 * (1 if holds == 1 else 2)) >= 4


@pytest.mark.parametrize("task, count", [(Causal(), 5), (Causal(), 1), (Classification(), 5)])
def test_processes_share_the_examples_and_return_the_values_over_all_of_them(
    llama, bert, task, count
):
    """The first of two ends when it has given its part."""
    classifies = task.kind == "classification"
    model, examples = (bert, sentences(count)) if classifies else (llama, texts(count))
    metrics = ("accuracy", "macro_f1") if classifies else ("perplexity", "rouge_l")
    given, rows = {}, []

    class Two(Processes):
        def all_gather(self, data):
            given[self.index] = data
            if len(given) < self.count:
                raise InterruptedError
            return [*given.values()]

    def own(prediction):
        rows.append(len(prediction.predictions))
        made, labels = prediction.predictions, prediction.label_ids
        return {"sum": float(made[labels != IGNORED].sum() + labels.sum(where=labels != IGNORED))}

    def of(processes):
        settings = EvaluationSettings(metrics, 2, max_new_tokens=4)
        runtime = ModelRuntime(model, None, task, PAD, Tokenizer(), own, processes)
        return evaluate(runtime, examples, (0, 4), ranked(model), settings)

    alone = of(Processes())
    with pytest.raises(InterruptedError):
        of(Two(0, 2))
    together = of(Two(1, 2))
    assert rows == [count] * 4  # at each rank, alone and together
    assert [len(json.loads(own)[0][3]) for own in given.values()] == [
        count - count // 2,
        count // 2,
    ]
    for rank, values in alone.items():
        assert together[rank] == pytest.approx(values, rel=1e-5)


def test_what_cannot_be_measured_is_one_sentence(llama):
    with pytest.raises(ConfigError, match=r"'macro_f1'.*'causal-lm'.*perplexity, rouge_l"):
        measure(llama, Causal(), texts(2), metrics=("macro_f1",))
    with pytest.raises(ConfigError, match="'accuracy' needs a task that classifies"):
        measure(llama, Causal(), texts(2), metrics=("accuracy",))
    with pytest.raises(ConfigError, match="no test examples"):
        measure(llama, Causal(), [])
    with pytest.raises(ConfigError, match="anything to learn"):
        measure(llama, Causal(), [Example([3, 4, 5], [IGNORED] * 3)])
    with pytest.raises(ConfigError, match="'rouge_l' needs test examples with a prompt"):
        measure(llama, Causal(), [Example([3, 4], [3, 4])], metrics=("rouge_l",))

"""Every registered method as a real run: it finishes, its folders load, it can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import prelort
from prelort import tasks
from prelort.adapters import LoraAdapter, peft_folder
from prelort.config import Config
from prelort.data import federated
from prelort.events import ClientFinished, Event, RankChanged
from prelort.experiment import checkpoint
from prelort.experiment.result import RunResult
from prelort.federation.personal import PersonalStore
from prelort.methods import REGISTRY, Client, build, trait
from run_files import assert_same_run, files_of

Make = Callable[..., Config]
Find = Callable[[str], RunResult]

ONE_RANK_FOR_ALL = {"fedit"}
"""Its clients have one rank."""

OPTIONS = {
    "hetlora": {"gamma": 0.75, "penalty": 1.0},
    "fedrora": {"magnitude_rate_ratio": 3.0},
}
"""So that clients prune themselves, and magnitudes do not explode, within so few steps."""

PERSONAL = {name for name, method in REGISTRY.items() if trait(method, "personal")}
"""There is no global model: nothing is exported, and only clients can measure."""

OWN_FACTORS = {"fedsa-lora"}
"""Clients keep B and the head for themselves."""

WHOLE = {
    *("fed-plora", "flora", "florist", "fedex-lora", "fedmomentum"),
    *("homogeneous-min", "homogeneous-max"),
}
"""Every client uses the whole global function, whatever its rank; of the others a client of rank r
uses the global function of rank r."""

SKETCHES = {"fslora"}
"""A client of a low rank uses a random sketch, which is the global function of no rank."""

KINDS = ["prelort", "fedex-lora", "flora", "fedsa-lora", "fedrora", "rolora", "hetlora"]
"""Of each kind of message one: prefixes, a fold, seeded factors, factors of one's own, ..."""

every = pytest.mark.parametrize("name", REGISTRY)


def every_but(names: set[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name in REGISTRY if name not in names])


def config_of(make_config: Make, name: str, **changes: Any) -> Config:
    """Two rounds of three of six clients, everybody measures at the end.

    Ranks are mixed, and after the first round one client's grows and two clients' shrink. Under
    rslora, where a method allows it, a slot counts by how many there are, so that nothing is right
    by chance.
    """
    rule = "constant" if REGISTRY[name].one_scale else "rslora"
    values: dict[str, Any] = {
        "method": {"name": name, "options": {name: OPTIONS.get(name, {})}},
        "federation": {"rounds": 2, "clients_per_round": 3},
        "ranks": {"mix": "2, 2, 4, 4, 8, 8", "schedule": {"2": "8, 2, 4, 2, 2, 8"}},
        "training": {"learning_rate": 3e-2, "local_steps": 1},
        "lora": {"dropout": 0.1, "scale_rule": rule, "scale": 4.0 if rule == "rslora" else 2.0},
        "evaluation": {"at_clients": True},
    }
    if name in ONE_RANK_FOR_ALL:
        values["ranks"] = {"mix": "4*1"}
    return make_config(**(values | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_config: Make) -> Find:
    """The run of a method that nothing disturbed, made once."""
    found: dict[str, RunResult] = {}

    def find(name: str) -> RunResult:
        if name not in found:
            folder = tmp_path_factory.mktemp(name) / "run"
            found[name] = prelort.run(config_of(make_config, name), folder)
        return found[name]

    return find


@every
def test_a_run_finishes_with_finite_numbers_everywhere(finished: Find, name: str) -> None:
    result = finished(name)
    history = result.history
    assert history.finished
    assert list(history.rounds) == [1, 2]
    for record in history.rounds.values():
        assert (len(record.replies), record.failures) == (3, {})
        losses = [record.loss, *(reply.loss for reply in record.replies.values())]
        assert all(loss is not None and 0 < loss < 100 for loss in losses)
    for tensor, values in result.global_adapter.tensors().items():
        assert bool(values.isfinite().all()), tensor
    changed = [event.reason for event in history.incidents if isinstance(event, RankChanged)]
    assert changed.count("the server's allocation") == (0 if name in ONE_RANK_FOR_ALL else 3)
    assert ("the client's offer" in changed) == (name == "hetlora")
    levels = (4,) if name in ONE_RANK_FOR_ALL else (2, 4, 8)
    assert result.levels == levels
    assert set(result.metrics) >= (set() if name in PERSONAL else set(levels))
    for metrics in result.metrics.values():
        assert math.isfinite(metrics["perplexity"])


@dataclass(frozen=True)
class TestRows:
    """Each client's test rows, and all of them, in one batch: the mean loss is that of all tokens.

    Hugging Face's own loss, not the one of this project.
    """

    batches: dict[str, dict[str, Tensor]]
    everyones: dict[str, Tensor]

    __test__ = False


@pytest.fixture(scope="module")
def test_rows(make_config: Make, tokenizer: Any) -> TestRows:
    config = make_config()
    task = tasks.get(config.task)
    rows = federated.load(config)

    def batch(some: Any) -> dict[str, Tensor]:
        examples = task.encode(some, tokenizer, config.data, ())
        return dict(task.collate(examples, tokenizer.pad_token_id))

    return TestRows({client.name: batch(client.test) for client in rows.clients}, batch(rows.test))


def by_plain_peft(
    base: Path, folders: dict[Any, Path], batches: dict[Any, Any]
) -> dict[Any, float]:
    """Perplexities: key -> that of the folder of the key, on the batch of the key."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = {}
    for key, folder in folders.items():
        adapted = PeftModel.from_pretrained(model, folder).eval()
        with torch.no_grad():
            found[key] = math.exp(float(adapted(**batches[key]).loss))
        model = adapted.unload()
    return found


def perplexities(base: Path, run: Path, batch: dict[str, Tensor]) -> dict[int, float]:
    """Rank -> what plain PEFT gives with the folder of that rank."""
    folders = {int(p.name.removeprefix("rank-")): p for p in (run / "adapters").iterdir()}
    return by_plain_peft(base, folders, dict.fromkeys(folders, batch))


@every_but(PERSONAL)
def test_plain_peft_gives_with_every_folder_what_was_measured(
    finished: Find, name: str, tiny_llama: Path, test_rows: TestRows
) -> None:
    result = finished(name)
    found = perplexities(tiny_llama, result.path, test_rows.everyones)
    assert found == pytest.approx(
        {rank: values["perplexity"] for rank, values in result.metrics.items()}, rel=1e-4
    )
    assert all(abs(value / result.base["perplexity"] - 1) > 1e-3 for value in found.values())


@pytest.mark.parametrize(
    "lora",
    [
        {"scale_rule": "constant", "scale": 2.0},
        {"rank_pattern": {"k_proj": 3}},
        {"target_modules": ["q_proj", "up_proj"]},
    ],
    ids=["constant scale", "rank pattern", "some modules"],
)
def test_plain_peft_gives_what_was_measured_whatever_is_adapted(
    tmp_path: Path,
    make_config: Make,
    tiny_llama: Path,
    test_rows: TestRows,
    lora: dict[str, Any],
) -> None:
    # A rate at which the adapter changes the function a lot.
    config = make_config(lora=lora, training={"learning_rate": 5e-2})
    result = prelort.run(config, tmp_path / "run")
    found = perplexities(tiny_llama, result.path, test_rows.everyones)
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.no_grad():
        found[0] = math.exp(float(base(**test_rows.everyones).loss))
    metrics = {0: result.base, **result.metrics}
    assert found == pytest.approx({r: v["perplexity"] for r, v in metrics.items()}, rel=1e-5)
    assert len({round(value, 2) for value in found.values()}) == 4  # four functions, not one


@every_but(SKETCHES)
def test_plain_peft_gives_at_a_client_what_it_measured(
    tmp_path: Path,
    make_config: Make,
    finished: Find,
    name: str,
    tiny_llama: Path,
    test_rows: TestRows,
) -> None:
    """The global function, that of the client's rank, the shared A with the client's own B, or what
    the server has for the client alone."""
    result = finished(name)
    measured = result.history.client_evaluations[2].clients
    state = checkpoint.load(result.path / "checkpoints" / "00002").state
    method = build(config_of(make_config, name).method, 0)
    template = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    own = PersonalStore(result.path / "personal")
    folders = {}
    for client, facts in measured.items():
        adapter = method.global_adapter(state, None if name in WHOLE else facts.rank)
        if name == "fedrora":
            adapter = method.broadcast(state, Client(client, facts.rank, 1)).trainable
        if name in OWN_FACTORS:
            tensors = adapter.tensors()
            for key, kept in own.load(client, before=2).items():
                assert key.endswith("lora_B.weight")
                both = min(kept.shape[1], facts.rank)  # it may have grown or shrunk since
                tensors[key] = torch.zeros_like(tensors[key])
                tensors[key][:, :both] = kept[:, :both]
            adapter = LoraAdapter.from_tensors(tensors, adapter.scale)
        folders[client] = tmp_path / client
        peft_folder.save(adapter, folders[client], template)
    assert by_plain_peft(tiny_llama, folders, test_rows.batches) == pytest.approx(
        {client: facts.metrics["perplexity"] for client, facts in measured.items()},
        rel=1e-4,
    )


class Killed(Exception):
    pass


def killed_and_resumed(config: Config, run: Path) -> RunResult:
    """A run that ends when the second client of round 2 has answered, and is resumed."""
    trained = 0

    def kill(event: Event) -> None:
        nonlocal trained
        trained += isinstance(event, ClientFinished) and event.round == 2
        if trained == 2:
            raise Killed

    with pytest.raises(Killed):
        prelort.run(config, run, listeners=[kill])
    assert not (run / "adapters").exists()
    return prelort.run(config, run, resume=True)


@every
def test_killed_in_the_second_round_and_resumed_is_as_if_never_killed(
    tmp_path: Path, make_config: Make, finished: Find, name: str
) -> None:
    """Adapters, events, the server's memory and what clients keep for themselves, bit for bit."""
    expected = finished(name)
    result = killed_and_resumed(config_of(make_config, name), tmp_path / "run")
    assert_same_run(result.path, expected.path)
    assert files_of(result.path / "personal") == files_of(expected.path / "personal")
    assert bool(files_of(result.path / "personal")) == (name in OWN_FACTORS)
    for number in ("00001", "00002"):
        file = f"checkpoints/{number}/state.safetensors"
        first, second = load_file(result.path / file), load_file(expected.path / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("name", KINDS)
def test_a_round_in_int8_comes_near_the_exact_one(
    tmp_path: Path, make_config: Make, finished: Find, name: str
) -> None:
    """Adapters down and changes up; the first round is that of the run in float32."""
    config = config_of(
        make_config,
        name,
        federation={"rounds": 1, "clients_per_round": 3, "wire_dtype": "int8"},
        evaluation={"diagnostics": False},
    )
    result = prelort.run(config, tmp_path / "run")

    record, exact = result.history.rounds[1], finished(name).history.rounds[1].stats
    assert record.failures == {}
    rounded = record.stats
    assert rounded is not None
    assert exact is not None
    assert rounded.loss == pytest.approx(exact.loss, rel=1e-2)
    assert rounded.bytes_up < 0.8 * exact.bytes_up  # names weigh much in so small a model
    one = checkpoint.load(result.path / "checkpoints" / "00001").state.adapter.tensors()
    other = checkpoint.load(finished(name).path / "checkpoints" / "00001").state.adapter.tensors()
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in other.items()}
    assert all(bool(tensor.isfinite().all()) for tensor in one.values())


@pytest.mark.parametrize("name", ["prelort", "fedsa-lora"])
def test_a_run_in_int8_is_resumed_to_the_same_bits(
    tmp_path: Path, make_config: Make, name: str
) -> None:
    federation = {"rounds": 2, "clients_per_round": 3, "wire_dtype": "int8"}
    config = config_of(make_config, name, federation=federation, evaluation={})
    expected = prelort.run(config, tmp_path / "whole")
    result = killed_and_resumed(config, tmp_path / "run")
    assert_same_run(result.path, expected.path)


# Other models


@pytest.mark.parametrize("name", [name for name in KINDS if name not in PERSONAL])
def test_transposed_layers(
    tmp_path: Path, make_config: Make, tiny_gpt2: Path, test_rows: TestRows, name: str
) -> None:
    """GPT-2's Conv1D."""
    config = config_of(
        make_config,
        name,
        model={"name": str(tiny_gpt2)},
        federation={"rounds": 1, "clients_per_round": 6},
        evaluation={},
    )
    result = prelort.run(config, tmp_path / "run")
    assert perplexities(tiny_gpt2, result.path, test_rows.everyones) == pytest.approx(
        {rank: values["perplexity"] for rank, values in result.metrics.items()}, rel=1e-4
    )


@every
def test_a_classifier_and_its_head(
    tmp_path: Path, make_config: Make, tiny_bert: Path, tokenizer: Any, name: str
) -> None:
    """The head is trained in full by everyone; it is in every folder, or with its client."""
    config = config_of(
        make_config,
        name,
        task="classification",
        model={"name": str(tiny_bert)},
        lora={"dropout": 0.1},
        federation={"rounds": 1, "clients_per_round": 3},
        evaluation={},
    )
    result = prelort.run(config, tmp_path / "run")

    before = load_file(result.path / "checkpoints" / "00000" / "state.safetensors")
    heads = {key: before[f"adapter:{key}"] for key in result.global_adapter.modules_to_save}
    assert heads
    moved = [
        not torch.equal(result.global_adapter.modules_to_save[key], head)
        for key, head in heads.items()
    ]
    if name in OWN_FACTORS:
        assert not any(moved)
        kept = [load_file(path) for path in (result.path / "personal").rglob("*.safetensors")]
        assert len(kept) == 3
        for own in kept:
            assert own.keys() >= heads.keys()
            assert not any(torch.equal(own[key], head) for key, head in heads.items())
        return
    assert all(moved)
    rows, task = federated.load(config), tasks.get(config.task)
    examples = task.encode(rows.test, tokenizer, config.data, rows.labels)
    batch = dict(task.collate(examples, tokenizer.pad_token_id))
    for rank, values in result.metrics.items():
        torch.manual_seed(rank)  # a head that is drawn anew would differ
        model: Any = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
        folder = result.path / "adapters" / f"rank-{rank}"
        with torch.no_grad():
            found = PeftModel.from_pretrained(model, folder).eval()(**batch)
        assert float(found.loss) == pytest.approx(values["loss"], rel=1e-5)
        right = (found.logits.argmax(1) == batch["labels"]).float().mean()
        assert float(right) == pytest.approx(values["accuracy"])

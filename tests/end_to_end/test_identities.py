"""Laws that whole runs obey, against plain PEFT written out by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import prelort
from backends import in_this_process
from prelort import tasks
from prelort.config import Config
from prelort.data import federated
from prelort.events import Checkpointed, ClientFinished, Event
from prelort.tasks.interface import Example
from random_adapters import same_bits
from run_files import assert_same_run, events_of

Make = Callable[..., Config]
ONE_CLIENT = {"by": "iid", "clients": 1}


def examples_of(config: Config, tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """The only client's training examples, and the test examples."""
    rows = federated.load(config)
    task = tasks.get(config.task)
    (client,) = rows.clients
    train = task.encode(client.train, tokenizer, config.data, rows.labels)
    return train, task.encode(rows.test, tokenizer, config.data, rows.labels)


def as_tensors(examples: list[Example], pad: int) -> dict[str, Tensor]:
    """A padded batch with Hugging Face's own labels."""
    longest = max(len(e.input_ids) for e in examples)
    ids = torch.full((len(examples), longest), pad)
    labels = torch.full((len(examples), longest), -100)
    mask = torch.zeros((len(examples), longest), dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        labels[row, :length] = torch.tensor(example.labels)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trained_by_hand(
    base: Path,
    start: Path,
    examples: list[Example],
    *,
    rank: int,
    steps: int,
    batch_size: int,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    pad: int,
) -> dict[str, Tensor]:
    """Plain PEFT, Hugging Face's loss, batches in the data's order, one optimiser throughout."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    initial = load_file(start / "state.safetensors")
    state = {f"base_model.model.{n.removeprefix('adapter:')}": t for n, t in initial.items()}
    assert set_peft_model_state_dict(model, state).unexpected_keys == []
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == sum(t.numel() for t in initial.values())
    stepper = optimizer(parameters)
    model.train()
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    for step in range(steps):
        loss = model(**as_tensors(batches[step % len(batches)], pad)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        stepper.step()
        stepper.zero_grad()
    return {
        name.replace(".default", ""): p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


class TestOneClientIsPlainPeft:
    @pytest.mark.parametrize(
        "name, rounds, steps, optimizer",
        [
            ("adamw", 1, 5, lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0)),
            # Without momentum SGD remembers nothing, so rounds are as if there were none.
            ("sgd", 3, 2, lambda p: torch.optim.SGD(p, lr=0.5)),
        ],
        ids=["AdamW", "SGD over three rounds"],
    )
    @pytest.mark.parametrize("method", ["prelort", "fedit"])
    def test_same_weights(
        self,
        tmp_path: Path,
        make_config: Make,
        tiny_llama: Path,
        tokenizer: Any,
        method: str,
        name: str,
        rounds: int,
        steps: int,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        config = make_config(
            partition=ONE_CLIENT,
            ranks={"mix": "8"},
            federation={"rounds": rounds, "clients_per_round": 1},
            method={"name": method, "objective": "plain"},
            training={
                "local_steps": steps,
                "batch_size": 5,
                "optimizer": name,
                "learning_rate": 1e-2 if name == "adamw" else 0.5,
                "schedule": "constant",
                "shuffle": False,
            },
        )
        start = tmp_path / "start"

        def keep_the_start(event: Event) -> None:
            if isinstance(event, Checkpointed) and event.round == 0:
                shutil.copytree(tmp_path / "run" / "checkpoints" / "00000", start)

        prelort.run(config, tmp_path / "run", listeners=[keep_the_start])
        train, _ = examples_of(config, tokenizer)
        expected = trained_by_hand(
            tiny_llama,
            start,
            train,
            rank=8,
            steps=rounds * steps,
            batch_size=5,
            optimizer=optimizer,
            pad=tokenizer.pad_token_id,
        )
        found = load_file(tmp_path / "run" / "adapters" / "rank-8" / "adapter_model.safetensors")
        before = load_file(start / "state.safetensors")

        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.allclose(found[key], tensor, rtol=0, atol=1e-6), key
        moved = max(
            float((found[f"base_model.model.{n.removeprefix('adapter:')}"] - t).abs().max())
            for n, t in before.items()
        )
        assert moved > 1e-3  # the training did something


class TestEqualClients:
    def write(self, path: Path, clients: int, text_file: Path) -> Path:
        """The rows of one site, held by so many clients."""
        rows = [json.loads(line) for line in text_file.read_text().splitlines()][:10]
        copies = [{**row, "client": f"site-{k}"} for k in range(clients) for row in rows]
        path.write_text("\n".join(map(json.dumps, copies)))
        return path

    @pytest.mark.parametrize("method, clients", [("prelort", 5), ("zero-padding", 3), ("fedit", 2)])
    def test_of_equal_data_are_one_client(
        self, tmp_path: Path, make_config: Make, text_file: Path, method: str, clients: int
    ) -> None:
        results = []
        for count in (1, clients):
            source = self.write(tmp_path / f"{count}.jsonl", count, text_file)
            config = make_config(
                data={"source": str(source), "test": str(text_file)},
                ranks={"mix": "4*1"},
                federation={"rounds": 2, "clients_per_round": count},
                method={"name": method, "objective": "plain"},
                training={"shuffle": False},
            )
            results.append(prelort.run(config, tmp_path / f"run-{count}"))

        assert same_bits(results[0].global_adapter, results[1].global_adapter)
        assert results[0].metrics == results[1].metrics


class TestDeterminism:
    def test_the_same_run_twice_is_the_same_and_another_seed_another(
        self, tmp_path: Path, make_config: Make
    ) -> None:
        """Whatever the state of the global generators, which stay as they were."""
        config = make_config(lora={"dropout": 0.2}, evaluation={"every": 1})
        torch.manual_seed(1)
        one = prelort.run(config, tmp_path / "one")
        found = torch.rand(3)
        torch.manual_seed(1)
        assert torch.equal(torch.rand(3), found)
        assert not torch.are_deterministic_algorithms_enabled()
        two = prelort.run(config, tmp_path / "two")
        assert one.metrics == two.metrics
        assert_same_run(tmp_path / "one", tmp_path / "two")
        other = prelort.run(config.model_copy(update={"seed": 2}), tmp_path / "other")
        assert not same_bits(one.global_adapter, other.global_adapter)

    def test_the_order_in_which_clients_are_listed_does_not_matter(
        self, tmp_path: Path, make_config: Make
    ) -> None:
        config = make_config(lora={"dropout": 0.2})
        prelort.run(config, tmp_path / "as-listed")
        turned = in_this_process(order=(3, 5, 0, 2, 1, 4))
        prelort.run(config, tmp_path / "turned", backend=turned)
        assert_same_run(tmp_path / "turned", tmp_path / "as-listed")


def test_truncations_that_are_named_are_those_of_mixed_clients(
    make_config: Make, tmp_path: Path
) -> None:
    """A client of the highest rank cannot tell whether others have the ranks it cuts to."""
    one_of_each = make_config(
        ranks={"mix": "8, 8, 8, 8, 2, 4", "assign": "in-order"},
        federation={"rounds": 1, "clients_per_round": 6},
        method={"name": "prelort", "objective": "mean"},
    )
    all_alike = make_config(
        ranks={"mix": "8*1.0"},
        federation={"rounds": 1, "clients_per_round": 6},
        method={"name": "prelort", "objective": "mean", "truncations": [4, 2]},
    )
    mixed = prelort.run(one_of_each, tmp_path / "mixed")
    alike = prelort.run(all_alike, tmp_path / "alike")
    losses = []
    for folder in (tmp_path / "mixed", tmp_path / "alike"):
        replies = [event for event in events_of(folder) if isinstance(event, ClientFinished)]
        losses.append({reply.client: reply.loss for reply in replies})
    names = [f"site-{index}" for index in range(4)]
    assert [losses[0][name] for name in names] == [losses[1][name] for name in names]
    assert sorted(alike.metrics) == sorted(mixed.metrics) == [2, 4, 8]
    exported = {path.name for path in (tmp_path / "alike" / "adapters").iterdir()}
    assert exported == {"rank-2", "rank-4", "rank-8"}

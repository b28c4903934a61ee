"""Every defence against every attack: accuracy, and how often a backdoor opens.

    python benchmarks/studies/prepare.py ... (AG News and MiniLM, see there)
    python benchmarks/studies/robustness.py [--seeds 3]

Twenty clients share 4000 headlines of AG News evenly. MiniLM's mean embedding is computed once; on
it a frozen random layer with LoRA (8 clients of rank 8, 12 of rank 16) and a trained head classify.
Method, rules and aggregation are the package's own; only the model is smaller than usual, so that
some hundred runs take minutes. All attackers have rank 16, whose ranks 9 to 16 have the fewest
holders. The defences expect 20 % attackers, the default, and in a last row the 30 % that there are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from prelort import methods
from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.adapters.initial import fresh
from prelort.config import MethodConfig, RobustnessConfig
from prelort.federation.sampling import count_of
from prelort.methods import Client, Method, ServerState, Update
from prelort.robustness.aggregator import RobustAggregator
from prelort.robustness.attacks import ATTACKS, attacked, scaling
from prelort.seeds import torch_generator

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import machine, report

PREPARED = Path("runs/studies")
RANKS = [8] * 8 + [16] * 12
ROWS, TESTS, HIDDEN = 200, 1000, 128
ROUNDS, STEPS, BATCH, RATE = 12, 10, 32, 2e-3
SHARES = ((0.0, 0.2), (0.1, 0.2), (0.2, 0.2), (0.3, 0.2), (0.3, 0.3))
"""The share of attackers that there are, and that the defence expects."""
DEFENCES = get_args(RobustnessConfig.model_fields["rule"].annotation)
POISONS = ("label flip", "backdoor")
ATTACK_NAMES = (*ATTACKS, "top ranks", *POISONS)
TRIGGER, TARGET = "cf cf ", 0


class Data:
    """MiniLM's embeddings [rows, 384] of the headlines, with and without the trigger."""

    def __init__(self, prepared: Path) -> None:
        folder = prepared / "data" / "ag_news"
        every, test = rows_of(folder / "train.jsonl"), rows_of(folder / "test.jsonl")[:TESTS]
        order = torch.randperm(len(every), generator=torch_generator(0, "rows"))
        train = [every[index] for index in order[: ROWS * len(RANKS)].tolist()]
        names = sorted({row["label"] for row in train})
        self.classes = len(names)
        self.labels = torch.tensor([names.index(row["label"]) for row in train])
        self.test_labels = torch.tensor([names.index(row["label"]) for row in test])
        embed = Embedder(prepared / "models" / "all-MiniLM-L6-v2")
        self.plain = embed([row["text"] for row in train])
        self.triggered = embed([TRIGGER + row["text"] for row in train])
        self.test = embed([row["text"] for row in test])
        self.test_triggered = embed([TRIGGER + row["text"] for row in test])

    def of_clients(self, poison: str, attackers: int) -> tuple[Tensor, Tensor]:
        """Features [clients, rows, 384] and labels [clients, rows]; the last clients attack."""
        features = self.plain.reshape(len(RANKS), ROWS, -1).clone()
        labels = self.labels.reshape(len(RANKS), ROWS).clone()
        bad = slice(len(RANKS) - attackers, len(RANKS))
        if poison == "label flip":
            labels[bad] = self.classes - 1 - labels[bad]
        if poison == "backdoor":
            half = ROWS // 2
            features[bad, :half] = self.triggered.reshape(features.shape)[bad, :half]
            labels[bad, :half] = TARGET
        return features, labels


def rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


class Embedder:
    """The mean of MiniLM's last hidden states, scaled to unit variance."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[texts, 384]"""
        means = []
        for start in range(0, len(texts), 100):
            batch = self.tokenizer(
                list(texts[start : start + 100]),
                padding=True,
                truncation=True,
                max_length=24,
                return_tensors="pt",
            )
            mask = batch["attention_mask"].unsqueeze(-1)
            hidden = self.model(**batch).last_hidden_state * mask
            means.append(F.normalize(hidden.sum(dim=1) / mask.sum(dim=1), dim=1))
        return torch.cat(means) * means[0].shape[1] ** 0.5


def logits(base: Tensor, scale: float, a: Tensor, b: Tensor, head: Tensor, x: Tensor) -> Tensor:
    """Of clients side by side: [clients, rows, classes]; ranks are padded with zeros."""
    hidden = x @ base.T + scale * (x @ a.mT) @ b.mT
    return F.relu(hidden) @ head.mT


def trained(
    sent: Sequence[LoraAdapter], base: Tensor, x: Tensor, y: Tensor, seed: int
) -> list[LoraAdapter]:
    """Each client's adapter after its steps of Adam."""
    rank = max(adapter.rank for adapter in sent)
    layers = [adapter.layers["hidden"] for adapter in sent]
    # Where A and B are both zero so are their gradients: padding stays zero.
    a = torch.stack([F.pad(f.A, (0, 0, 0, rank - f.rank)) for f in layers]).requires_grad_()
    b = torch.stack([F.pad(f.B, (0, rank - f.rank)) for f in layers]).requires_grad_()
    head = torch.stack([one.modules_to_save["head"] for one in sent]).requires_grad_()
    optimizer = torch.optim.Adam([a, b, head], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    clients = torch.arange(len(sent))[:, None]
    for _ in range(STEPS):
        rows = torch.randint(ROWS, (len(sent), BATCH), generator=generator)
        found = logits(base, sent[0].scale(rank), a, b, head, x[clients, rows])
        loss = F.cross_entropy(found.flatten(0, 1), y[clients, rows].flatten())
        optimizer.zero_grad()
        (loss * len(sent)).backward()
        optimizer.step()
    return [
        LoraAdapter(
            {"hidden": Factors(a[k, : f.rank].detach(), b[k, :, : f.rank].detach())},
            sent[k].scale,
            {"head": head[k].detach()},
        )
        for k, f in enumerate(layers)
    ]


def run(
    data: Data, attack: str, share: float, expected: float, rule: str, seed: int
) -> tuple[float, float]:
    """Accuracy and the backdoor's success of the global adapter, in %."""
    method: Method = methods.build(MethodConfig(name="prelort", objective="plain"), seed)
    attackers, allowed = (count_of(part, len(RANKS)) if part else 0 for part in (share, expected))
    clients = [Client(f"client-{k}", rank, ROWS) for k, rank in enumerate(RANKS)]
    generator = torch_generator(seed, "base")
    width = data.plain.shape[1]
    base = torch.randn(HIDDEN, width, generator=generator) / width**0.5
    empty = Factors(torch.zeros(max(RANKS), width), torch.zeros(HIDDEN, max(RANKS)))
    head = {"head": torch.zeros(data.classes, HIDDEN)}
    start = fresh(LoraAdapter({"hidden": empty}, ScaleRule("constant", 2.0), head), seed)
    state = ServerState(start, levels=tuple(sorted(set(RANKS))))
    x, y = data.of_clients(attack, attackers)
    for number in range(ROUNDS):
        sent = [method.broadcast(state, client).trainable for client in clients]
        adapters = trained(sent, base, x, y, seed * ROUNDS + number)
        updates = [Update(c, a, ROWS) for c, a in zip(clients, adapters, strict=True)]
        if attackers and attack not in POISONS:
            how, above = (scaling, RANKS[0]) if attack == "top ranks" else (ATTACKS[attack], -1)
            bad = attacked(how, updates[-attackers:], method, state, seed, above)
            updates[-attackers:] = bad
        defended = method.aggregator(state)
        if rule != "none":
            defended = RobustAggregator(rule, method, state, allowed, clip_uncovered=False)
        for update in updates:
            defended.add(update)
        state = replace(defended.result(), levels=state.levels)
    return measured(data, base, state.adapter)


def measured(data: Data, base: Tensor, adapter: LoraAdapter) -> tuple[float, float]:
    """Accuracy, and the share of other classes' rows that the trigger turns into the target."""
    factors, head = adapter.layers["hidden"], adapter.modules_to_save["head"]

    def classes(x: Tensor) -> Tensor:
        found = logits(base, adapter.scale(factors.rank), factors.A, factors.B, head, x)
        return found.argmax(dim=-1)

    right = classes(data.test) == data.test_labels
    opened = classes(data.test_triggered)[data.test_labels != TARGET] == TARGET
    return 100 * float(right.float().mean()), 100 * float(opened.float().mean())


def main() -> None:
    """Print the table and write it to ``benchmarks/results/robustness.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prepared", type=Path, default=PREPARED)
    arguments = parser.parse_args()
    data = Data(arguments.prepared)
    rows = []
    for attack in ATTACK_NAMES:
        for share, expected in SHARES:
            if share == 0 and attack != "backdoor":
                continue  # without attackers all attacks are the same
            row = {"attack": attack if share else "none", "attackers": f"{share:.0%}"}
            row["expected"] = f"{expected:.0%}"
            for rule in DEFENCES:
                values = [
                    run(data, attack, share, expected, rule, seed)
                    for seed in range(arguments.seeds)
                ]
                accuracy, opened = map(statistics.mean, zip(*values, strict=True))
                row[rule] = f"{accuracy:.1f}"
                if attack == "backdoor":
                    row[rule] += f" / {opened:.0f}"
            rows.append(row)
            print(*row.values(), sep=" | ", flush=True)
    title = "Accuracy in % (/ success of the backdoor in %)"
    report("robustness", title, rows, {"seeds": arguments.seeds, **machine()})


if __name__ == "__main__":
    main()

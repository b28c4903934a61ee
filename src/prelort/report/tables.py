"""Runs side by side: a metric at every rank prefix, its area, and what the run cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from prelort.errors import PrelortError
from prelort.metrics.scores import aurac
from prelort.report.events import (
    Event,
    at_clients,
    base_row,
    diagnostics,
    final_evaluation,
    metrics_of,
    shortfall,
    totals,
)
from prelort.report.wording import Wording, human_bytes, human_seconds, listed, plain, wording

BASE = "untuned base"

Runs = Mapping[str, Sequence[Event]]
"""A run's name (mostly its method) to its events."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of numbers: a head of two parts, and a text per row, the best ones marked."""

    over: str
    under: str
    texts: list[str]
    best: list[bool]


@dataclass(frozen=True, slots=True)
class Block:
    """One metric's table, before it is drawn."""

    title: str
    names: list[str]
    columns: list[Column]
    notes: list[str]


def comparison_table(runs: Runs, metric: str | None = None) -> Table:
    """The runs as a table for the terminal; with several metrics, one table under the other.

    Rows: the untuned base, then each run. Columns: the metric at every rank prefix of the last
    evaluation, its area under the rank curve (AURAC), bytes and time. The best of a column is
    bold where its rows differ. Raises `PrelortError` for a metric that no run measured.
    """
    tables = [drawn(block) for block in blocks(runs, metric)]
    if len(tables) == 1:
        return tables[0]
    stack = Table.grid()
    stack.add_row(Group(*tables))
    return stack


def comparison_markdown(runs: Runs, metric: str | None = None) -> str:
    """What `comparison_table` says, as Markdown; one table per metric under a heading each."""
    return "\n".join(written(block) for block in blocks(runs, metric))


def diagnostics_table(runs: Runs) -> Table:
    """What each run's last round did to the products, for the terminal.

    Raises `PrelortError` where no run was diagnosed.
    """
    return drawn(_diagnostics_block(runs))


def diagnostics_markdown(runs: Runs) -> str:
    """What `diagnostics_table` says, as Markdown."""
    return written(_diagnostics_block(runs))


def blocks(runs: Runs, metric: str | None = None) -> list[Block]:
    """The tables' contents, one for each metric asked for."""
    measured = metrics_of(runs)
    if metric is None:
        names = measured or ["loss"]
        own = [_clients_block(runs, name) for name in names]
        return [*(_block(runs, name) for name in names), *(b for b in own if b is not None)]
    everything = {*measured, *(["loss"] if measured else [])}
    if metric not in everything:
        known = listed(sorted(everything)) or "nothing so far"
        raise PrelortError(f"metric {metric!r} was not measured: there is {known}")
    return [_block(runs, metric)]


def _block(runs: Runs, metric: str) -> Block:
    words = wording(metric)
    finals = {name: final_evaluation(events) for name, events in runs.items()}
    curves = {name: final.by_rank(metric) if final else {} for name, final in finals.items()}
    ranks = sorted({rank for curve in curves.values() for rank in curve})
    shared = shared_ranks(list(curves.values()))
    bases = [row[metric] for row in map(base_row, runs.values()) if metric in row]
    base = bases[0] if bases else None

    columns = [
        scored(words, f"rank {rank}", [base, *(curve.get(rank) for curve in curves.values())])
        for rank in ranks
    ]
    areas = [area_over(curve, shared) for curve in curves.values()]
    columns.append(scored(words, "AURAC", [base, *areas]))
    spent = [totals(events) for events in runs.values()]
    for over, under, show, costs in (
        ("bytes ↓", "up", human_bytes, [spend.bytes_up for spend in spent]),
        ("bytes ↓", "down", human_bytes, [spend.bytes_down for spend in spent]),
        ("time ↓", "", human_seconds, [spend.seconds for spend in spent]),
    ):
        pairs = zip(costs, spent, strict=True)
        texts = ["–", *(show(cost) if spend.rounds else "–" for cost, spend in pairs)]
        # A run that stopped early is cheap for no merit.
        rivals = [c if spend.finished else None for c, spend in zip(costs, spent, strict=True)]
        columns.append(Column(over, under, texts, best_rows([None, *rivals], texts, False)))

    early = {name: shortfall(events) for name, events in runs.items()}
    names = [BASE, *(plain(name) + (" *" if early[name] else "") for name in runs)]
    notes = [f"* {plain(name)}: {why}." for name, why in early.items() if why]
    if ranks and shared != ranks:
        over = ("ranks " if len(shared) > 1 else "rank ") + listed(shared) if shared else "no rank"
        notes.append(f"AURAC over {over}, because not every run was measured at every rank.")
    # Rounding differs between batch sizes and machines; another model or test set differs more.
    if any(not math.isclose(other, bases[0], rel_tol=1e-3) for other in bases):
        notes.append(
            "The runs' untuned bases differ: they do not share a model or test data,"
            " and the base shown is the first one's."
        )
    title = f"{words.title} by rank prefix of the global adapter, {words.direction}"
    return Block(title, names, columns, notes)


def _clients_block(runs: Runs, metric: str) -> Block | None:
    """What clients measured on their own rows, each at its own rank; None if none did."""
    words = wording(metric)
    found = {
        name: {c: m for c, m in at_clients(events).items() if metric in m.metrics}
        for name, events in runs.items()
    }
    found = {name: clients for name, clients in found.items() if clients}
    if not found:
        return None
    ranks = sorted({m.rank for clients in found.values() for m in clients.values()})
    values = {name: [m.metrics[metric] for m in own.values()] for name, own in found.items()}
    worst = min if words.higher_is_better else max
    columns = [
        scored(words, "mean", [statistics.fmean(own) for own in values.values()]),
        scored(words, "worst", [worst(own) for own in values.values()]),
    ]
    for rank in ranks:
        at = [[m.metrics[metric] for m in o.values() if m.rank == rank] for o in found.values()]
        means = [statistics.fmean(some) if some else None for some in at]
        columns.append(scored(words, f"rank {rank}", means))
    title = f"{words.title} at the clients, on their own rows and at their own rank, "
    note = "Means over clients, each of which counts the same."
    return Block(title + words.direction, [plain(name) for name in found], columns, [note])


def _diagnostics_block(runs: Runs) -> Block:
    """A row for each run that was diagnosed, of its last round."""
    found = {name: diagnostics(events) for name, events in runs.items()}
    last = {name: (max(rounds), rounds[max(rounds)]) for name, rounds in found.items() if rounds}
    if not last:
        raise PrelortError("no run was diagnosed (evaluation.diagnostics), so there is no table")
    rows = [numbers for _, numbers in last.values()]
    columns = [
        _numbers(over, under, [_at(numbers, *path) for numbers in rows])
        for over, under, path in (
            ("noise of", "averaging", ("aggregation_noise",)),
            ("noise of", "start", ("initialization_noise", "mean")),
            ("client", "drift", ("client_drift", "mean")),
            ("client", "spread", ("client_dispersion",)),
            ("cut to", "lowest", ("truncation_noise", 0)),
            ("best", "cut", ("least_truncation_noise", 0)),
            ("eff.", "rank", ("effective_rank",)),
            ("tail", "kept", ("tail_kept", -1)),
        )
    ]
    rounds = listed(sorted({at for at, _ in last.values()}))
    counts = {f"{n['layers']['measured']} of {n['layers']['of']}" for n in rows}
    notes = [
        "Norms relative to the global product (noise of averaging, spread: to the clients' mean). "
        "Cut: noise at the lowest rank, and the least possible. Tail: the highest segment.",
        f"After round {rounds}, over {' or '.join(sorted(counts))} layers.",
    ]
    return Block("Diagnostics of the last round", [plain(name) for name in last], columns, notes)


def _at(numbers: Mapping[str, Any], key: str, inner: str | int | None = None) -> float | None:
    """A number by its key, or by its place among the rank levels; None where it lacks."""
    value = numbers.get(key)
    if isinstance(inner, str):
        return (value or {}).get(inner)
    if isinstance(inner, int):
        return list(value.values())[inner] if value else None
    return value


def _numbers(over: str, under: str, values: Sequence[float | None]) -> Column:
    """Two digits are enough to compare; none is best, as these are no merits."""
    texts = ["–" if value is None else f"{value:.2g}" for value in values]
    return Column(over, under, texts, [False] * len(texts))


def scored(
    words: Wording,
    under: str,
    values: Sequence[float | None],
    texts: Sequence[str] | None = None,
) -> Column:
    """A column of a metric's values, as ``texts`` if they say more; the best values marked."""
    texts = [words.show(value) for value in values] if texts is None else list(texts)
    best = best_rows(values, texts, words.higher_is_better)
    return Column(f"{words.short} {words.arrow}", under, texts, best)


def shared_ranks(curves: Sequence[Mapping[int, float]]) -> list[int]:
    """The ranks that all runs have, leaving aside runs that have no prefixes (a single rank)."""
    wide = [set(curve) for curve in curves if len(curve) > 1] or [set(c) for c in curves if c]
    return sorted(set.intersection(*wide)) if wide else []


def area_over(curve: Mapping[int, float], ranks: Sequence[int]) -> float | None:
    """Over the ranks shared: areas over different ranks cannot be compared."""
    if not ranks or not set(ranks) <= set(curve):
        return None
    return aurac({rank: curve[rank] for rank in ranks})


def best_rows(values: Sequence[float | None], texts: Sequence[str], highest: bool) -> list[bool]:
    """Which rows to mark: those that read like the best one, unless every number reads alike."""
    numbers = {i: v for i, v in enumerate(values) if v is not None}
    finite = {i: v for i, v in numbers.items() if math.isfinite(v)}
    if not finite or len({texts[i] for i in numbers}) < 2:
        return [False] * len(texts)
    winner = (max if highest else min)(finite, key=finite.__getitem__)
    return [i in finite and texts[i] == texts[winner] for i in range(len(texts))]


def drawn(block: Block) -> Table:
    """A block for the terminal."""
    # Narrow enough for four ranks and 80 columns.
    table = Table(
        title=Text(block.title),
        title_justify="left",
        title_style="bold",
        caption=Text("\n".join(block.notes)) if block.notes else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for column in block.columns:
        head = Text(f"{column.over}\n{column.under}".rstrip())
        table.add_column(head, justify="right", no_wrap=True)
    for row, name in enumerate(block.names):
        cells = [Text(c.texts[row], style="bold" if c.best[row] else "") for c in block.columns]
        table.add_row(Text(name), *cells)
    return table


def written(block: Block) -> str:
    """A block as Markdown."""
    heads = [f"{c.over} {c.under}".rstrip() for c in block.columns]
    lines = [f"**{block.title}**", "", _row(["", *heads])]
    lines.append("|---|" + "---:|" * len(heads))
    for row, name in enumerate(block.names):
        cells = [f"**{c.texts[row]}**" if c.best[row] else c.texts[row] for c in block.columns]
        lines.append(_row([name.replace("|", "\\|"), *cells]))
    for note in block.notes:
        lines += ["", note.replace("*", "\\*")]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"

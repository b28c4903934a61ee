"""The tables of a study: means and spread, paired differences, costs, and what has no result."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from prelort.report.compared.grid import AT_CLIENTS, AURAC, Cell, Grid, Place
from prelort.report.compared.spread import (
    CONFIDENCE,
    Difference,
    Spread,
    difference,
    spread,
    warning_of,
)
from prelort.report.events import shortfall, started, totals
from prelort.report.tables import BASE, Block, Column, best_rows, drawn, scored, written
from prelort.report.wording import (
    Wording,
    capital,
    human_bytes,
    human_seconds,
    listed,
    plain,
    wording,
)


def terminal(grid: Grid) -> Group:
    """The first metric's tables for the terminal, and the cells without a result."""
    found: dict[str, list[str]] = {}
    for cell in grid.cells:
        if not cell.finished:
            found.setdefault(": ".join(filter(None, [cell.status, _why(cell)])), []).append(
                _name(cell)
            )
    lines = [Text(f"{_first(names)} {reason}", "yellow") for reason, names in found.items()]
    return Group(*(drawn(block) for block in headline(grid)), *lines)


def markdown(grid: Grid, title: str) -> str:
    """All tables, a heading for each setting."""
    lines = [f"# {plain(title)}", ""]
    lines += [f"{key}: {plain(value)}  " for key, value in grid.facts.items()]
    for setting in grid.settings:
        found = of_setting(grid, setting)
        if found:
            lines += ["", f"## {plain(setting) or 'Results'}", "", "\n".join(map(written, found))]
    over = of_all(grid)
    if over:
        lines += ["", "## All settings", "", "\n".join(map(written, over))]
    left = unfinished(grid)
    if left:
        lines += ["", "## Without a result", "", "\n".join(map(written, left))]
    return "\n".join(lines).rstrip() + "\n"


def headline(grid: Grid) -> list[Block]:
    """The first metric's results, differences and costs, setting by setting."""
    metrics = grid.metrics()[:1]
    found = [
        block
        for setting in grid.settings
        for block in of_setting(grid, setting, metrics)
        if grid.finished(setting)
    ]
    return [*found, *of_all(grid, metrics)]


def of_setting(grid: Grid, setting: str, metrics: Sequence[str] | None = None) -> list[Block]:
    """The tables of one setting; none before its first cell is finished."""
    if not grid.finished(setting):
        return []
    names = grid.metrics() if metrics is None else metrics
    blocks = [block for name in names for block in _of_metric(grid, setting, wording(name))]
    return [*blocks, _costs(grid, setting)]


def of_all(grid: Grid, metrics: Sequence[str] | None = None) -> list[Block]:
    """The differences over all settings; none where there are not several."""
    if len(grid.settings) < 2:
        return []
    names = grid.metrics() if metrics is None else metrics
    return [_over_settings(grid, wording(name)) for name in names]


def unfinished(grid: Grid) -> list[Block]:
    """The cells without a result, and why; none where all are finished."""
    cells = [cell for cell in grid.cells if not cell.finished]
    if not cells:
        return []
    states, whys = [str(cell.status) for cell in cells], [_why(cell) or "–" for cell in cells]
    none = [False] * len(cells)
    columns = [Column("status", "", states, none), Column("why", "", whys, none)]
    count = f"{len(cells)} of {len(grid.cells)} cells"
    names = [_name(cell) for cell in cells]
    return [Block(f"Cells without a result: {count}", names, columns, [])]


def _name(cell: Cell) -> str:
    setting = [cell.setting] if cell.setting else []
    return plain(", ".join([*setting, cell.method, f"seed {cell.seed}"]))


def _first(names: Sequence[str]) -> str:
    """The first of some cells, and how many more there are."""
    return names[0] + (f" (and {_count(len(names) - 1, 'other')})" if len(names) > 1 else "")


def _why(cell: Cell) -> str:
    """Why a cell has no result; empty where there is nothing to say."""
    if cell.status == "stopped":
        rounds = started(cell.events).get("rounds", "?")
        return f"after round {totals(cell.events).rounds} of {rounds}"
    return plain(cell.reason)


def mean_text(words: Wording, found: Spread | None) -> str:
    """``44.4 ± 0.3``; without the deviation where there is one value only."""
    if found is None:
        return "–"
    text = words.show(found.mean)
    if found.deviation is None or not math.isfinite(found.mean):
        return text
    return f"{text} ± {found.deviation * words.factor:.{_digits(found.mean * words.factor)}f}"


def difference_text(words: Wording, found: Difference | None) -> str:
    """``+1.25 [+0.40, +2.10]``."""
    if found is None:
        return "–"
    mean = found.mean * words.factor
    if not math.isfinite(mean):
        return str(mean)
    if found.low is None or found.high is None:
        return f"{mean:+.{_digits(mean)}f}"
    ends = [end * words.factor for end in (found.low, found.high)]
    digits = _digits(max(map(abs, [mean, *ends])))
    return f"{mean:+.{digits}f} [{ends[0]:+.{digits}f}, {ends[1]:+.{digits}f}]"


def _digits(value: float) -> int:
    """Digits behind the point, as `Wording.show` has them."""
    return 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2


def _of_metric(grid: Grid, setting: str, words: Wording) -> list[Block]:
    places = grid.places(setting, words.metric)
    blocks = [_results(grid, setting, words, places)]
    if len(grid.methods) > 1:
        blocks.append(_differences(grid, setting, words, places))
    return blocks


def _results(grid: Grid, setting: str, words: Wording, places: Sequence[Place]) -> Block:
    untuned = spread(list(grid.base(setting, words.metric).values()))
    columns = []
    for at in places:
        found = [None if at == AT_CLIENTS else untuned]
        for method in grid.methods:
            found.append(spread(list(grid.values(setting, method, words.metric, at).values())))
        values = [None if one is None else one.mean for one in found]
        columns.append(scored(words, _place(at), values, [mean_text(words, one) for one in found]))
    fewer = _fewer(grid, setting)
    names = [BASE, *(plain(method) + (" *" if method in fewer else "") for method in grid.methods)]
    title = (
        f"{_head(setting, words)} by rank prefix of the global adapter, mean ± standard deviation "
        f"over {_count(len(grid.seeds), 'seed')}, {words.direction}"
    )
    notes = [*fewer.values(), *_remarks(grid, setting, words)]
    if any(any(column.best) for column in columns):
        notes.insert(0, "Bold: the best mean, whatever the spread.")
    if AT_CLIENTS in places:
        notes.append("At clients: mean over clients, each on its own rows and at its own rank.")
    return Block(title, names, columns, notes)


def _differences(grid: Grid, setting: str, words: Wording, places: Sequence[Place]) -> Block:
    rivals = [method for method in grid.methods if method != grid.reference]
    columns, counts = [], set()
    for at in places:
        found = []
        for method in rivals:
            pairs = list(grid.pairs(setting, method, words.metric, at).values())
            found.append(difference(pairs))
            counts.add(len(pairs))
        columns.append(_untold(_place(at), [difference_text(words, one) for one in found]))
    title = f"{_head(setting, words)}: difference to {plain(grid.reference)}, paired by seed"
    return Block(title, [plain(name) for name in rivals], columns, _how(words, grid, counts))


def _over_settings(grid: Grid, words: Wording) -> Block:
    rivals = [method for method in grid.methods if method != grid.reference]
    columns = []
    for setting in grid.settings:
        pairs = [grid.pairs(setting, method, words.metric, AURAC) for method in rivals]
        texts = [difference_text(words, difference(list(one.values()))) for one in pairs]
        columns.append(_untold(plain(setting), texts))
    means = [list(grid.pairs_of_all(method, words.metric, AURAC).values()) for method in rivals]
    texts = [difference_text(words, difference(one)) for one in means]
    columns.append(_untold("all settings", texts))
    title = f"{capital(words.title)}, AURAC: difference to {plain(grid.reference)}, by setting"
    notes = _how(words, grid, {len(one) for one in means})
    notes.append(
        "All settings: for each seed the mean over the settings, then the interval over seeds."
    )
    return Block(title, [plain(name) for name in rivals], columns, notes)


def _costs(grid: Grid, setting: str) -> Block:
    found = [grid.costs(setting, method) for method in grid.methods]
    columns = []
    for over, under, values, show in (
        ("bytes ↓", "up", [c.bytes_up if c else None for c in found], human_bytes),
        ("bytes ↓", "down", [c.bytes_down if c else None for c in found], human_bytes),
        ("passes ↓", "", [c.passes if c else None for c in found], _number),
        ("training ↓", "", [c.train_seconds if c else None for c in found], human_seconds),
        ("whole run ↓", "", [c.seconds if c else None for c in found], human_seconds),
    ):
        texts = [show(value) for value in values]
        columns.append(Column(over, under, texts, best_rows(values, texts, False)))
    title = f"{plain(setting)}: cost of a run" if setting else "Cost of a run"
    notes = [
        "Passes: forward passes of a batch in training, each with its backward pass. Training: "
        "seconds of all clients, one after the other. Times depend on what else the machine did."
    ]
    return Block(
        f"{title}, mean over seeds", [plain(name) for name in grid.methods], columns, notes
    )


def _remarks(grid: Grid, setting: str, words: Wording) -> list[str]:
    notes = []
    ranks, shared = grid.ranks(setting, words.metric), grid.shared_ranks(setting, words.metric)
    if shared != ranks:
        over = f"ranks {listed(shared)}" if shared else "no rank"
        notes.append(f"AURAC over {over}, because not every run was measured at every rank.")
    local = [
        m for m in grid.methods if any(not c.curve(words.metric) for c in grid.finished(setting, m))
    ]
    for method in local:
        short = next(shortfall(cell.events) for cell in grid.finished(setting, method))
        notes.append(f"{plain(method)}: {short or 'not measured'}.")
    unlike = grid.unlike(setting)
    if unlike:
        notes.append(
            f"{capital(listed(map(plain, unlike)))} did not train on the same clients' batches "
            f"as {plain(grid.reference)}: clients failed, or an override changed that."
        )
    return notes


def _fewer(grid: Grid, setting: str) -> dict[str, str]:
    """Method to a note, where it has a result for some of the seeds only."""
    counts = {method: len(grid.finished(setting, method)) for method in grid.methods}
    return {
        method: f"* {plain(method)}: {count} of {_count(len(grid.seeds), 'seed')}."
        for method, count in counts.items()
        if count < len(grid.seeds)
    }


def _how(words: Wording, grid: Grid, counts: set[int]) -> list[str]:
    """How to read differences."""
    worse = "worse" if not words.higher_is_better else "better"
    reference = plain(grid.reference)
    notes = [
        f"The method less {reference} with the same seed: above 0 the method is {worse}. In "
        f"brackets the {CONFIDENCE:.0%} percentile bootstrap interval of the mean."
    ]
    fewest = min((count for count in counts if count), default=0)
    return [*notes, *filter(None, [warning_of(fewest)])]


def _head(setting: str, words: Wording) -> str:
    return f"{plain(setting)}: {words.title}" if setting else capital(words.title)


def _place(at: Place) -> str:
    return f"rank {at}" if isinstance(at, int) else at


def _untold(under: str, texts: Sequence[str]) -> Column:
    """A column in which no row is best."""
    return Column("difference", under, list(texts), [False] * len(texts))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"

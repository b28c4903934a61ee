"""Pictures of runs: the metric over rank prefixes, and how it got there.

matplotlib is imported inside the functions and drawn through `Figure` with the Agg canvas: the
command line starts without it, and no global pyplot state or display is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prelort.errors import PrelortError
from prelort.report.axes import (
    GREY,
    finish,
    has_room,
    rank_axis,
    round_axis,
    size_axis,
    style,
    value_axis,
    wants_log,
)
from prelort.report.events import (
    Event,
    base_row,
    diagnostics,
    evaluations,
    final_evaluation,
    metrics_of,
    shortfall,
    started,
    train_losses,
)
from prelort.report.wording import Wording, capital, listed, plain, wording

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runs = Mapping[str, Sequence[Event]]
Curve = dict[int, float]
LEGEND_COLUMNS = 4


def rank_curves(runs: Runs, path: Path | str, metric: str | None = None) -> Path:
    """Write the picture of `rank_figure` as a PNG and return its path.

    Raises `PrelortError` where nothing was measured or the file cannot be written.
    """
    return save(rank_figure(runs, metric), path)


def diagnostic_curves(runs: Runs, path: Path | str) -> Path:
    """Write the picture of `diagnostic_figure` as a PNG and return its path.

    Raises `PrelortError` where nothing was diagnosed or the file cannot be written.
    """
    return save(diagnostic_figure(runs), path)


def save(figure: Figure, path: Path | str) -> Path:
    """Write a figure as a PNG and return its path; raises `PrelortError` where that fails."""
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise PrelortError(f"picture {str(path)!r} cannot be written: {error.strerror}") from None
    return Path(path)


def rank_figure(runs: Runs, metric: str | None = None) -> Figure:
    """The metric at every rank prefix (left) and the way there (right), 10.5 inches wide.

    The right panel is the metric at the highest and lowest prefix by round where a run was
    measured more than twice, else the training loss by round. ``metric`` defaults to the first
    that was measured. Raises `PrelortError` where nothing was measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    name = metric if metric is not None else next(iter(metrics_of(runs)), "")
    words = wording(name)
    finals = {run: final_evaluation(events) for run, events in runs.items()}
    curves = {run: final.by_rank(name) if final else {} for run, final in finals.items()}
    if not any(curves.values()):
        what = f"metric {metric!r}" if metric else "a metric"
        raise PrelortError(f"no run has measured {what}, so there is nothing to draw")
    labels = {run: _label(run, runs[run], curves[run]) for run in runs}
    bases = [row[name] for row in map(base_row, runs.values()) if name in row]

    legend_rows = math.ceil((len(runs) + len(bases[:1])) / LEGEND_COLUMNS)
    layout = ConstrainedLayoutEngine(wspace=0.06)
    figure = Figure(figsize=(10.5, 4.4 + 0.25 * legend_rows), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_ranks(left, curves, labels, bases[0] if bases else None, words)
    history = {run: _history(events, name) for run, events in runs.items()}
    if any(len(curve) > 2 for ends in history.values() for curve in ends.values()):
        _draw_history(right, history, words)
    else:
        _draw_losses(right, runs)
    figure.suptitle(_setting(runs), fontsize=10, color=GREY)
    # One legend for both panels, below them, where it cannot cover a curve.
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(LEGEND_COLUMNS, len(runs) + 1),
        frameon=False,
    )
    return figure


def diagnostic_figure(runs: Runs) -> Figure:
    """What the rounds did to the products (docs/diagnostics.md), 13.5 inches wide.

    By round: noise of aggregation, of truncation (at the ends of the levels that lose anything),
    drift, effective rank. After the last round: noise and energy by rank. Raises `PrelortError`
    where no run was diagnosed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    found = {run: diagnostics(events) for run, events in runs.items()}
    shown = {run: rounds for run, rounds in found.items() if rounds}
    if not shown:
        raise PrelortError("no run was diagnosed, so there is nothing to draw")
    # A run keeps the look that it has in the other picture.
    looks = {run: style(index) for index, run in enumerate(runs)}
    layout = ConstrainedLayoutEngine(wspace=0.05, hspace=0.06)
    height = 7.4 + 0.25 * math.ceil(len(shown) / LEGEND_COLUMNS)
    figure = Figure(figsize=(13.5, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3).flat
    _draw_sizes(next(panels), shown, looks, _number("aggregation_noise"), "relative norm")
    finish(figure.axes[0], "Aggregation noise")
    _draw_truncation(next(panels), shown, looks)
    _draw_sizes(next(panels), shown, looks, _number("client_drift", "mean"), "relative norm")
    finish(figure.axes[2], "Client drift, mean over clients")
    _draw_sizes(next(panels), shown, looks, _number("effective_rank"), "rank")
    finish(figure.axes[3], "Effective rank, mean over layers")
    _draw_cuts(next(panels), shown, looks)
    _draw_slots(next(panels), shown, looks)
    numbers = [at for rounds in shown.values() for at in rounds]
    margin = max(0.5, 0.04 * (max(numbers) - min(numbers)))
    for axes in figure.axes[:4]:  # alike, though there is no drift in the first round
        axes.set_xlim(min(numbers) - margin, max(numbers) + margin)
    figure.suptitle(_setting(runs) + _sample(shown), fontsize=10, color=GREY)
    figure.legend(
        [figure.axes[0].plot([], [], **looks[run])[0] for run in shown],
        [plain(run) for run in shown],
        loc="outside lower center",
        ncols=min(LEGEND_COLUMNS, len(shown)),
        frameon=False,
    )
    return figure


Rounds = Mapping[int, Mapping[str, Any]]
Looks = Mapping[str, dict[str, Any]]


def _number(key: str, inner: str | None = None) -> Callable[[Mapping[str, Any]], float | None]:
    """One number of a round's diagnostics; None where it lacks."""

    def read(numbers: Mapping[str, Any]) -> float | None:
        value = numbers.get(key)
        return value if inner is None else (value or {}).get(inner)

    return read


def _by_round(rounds: Rounds, read: Callable[[Mapping[str, Any]], float | None]) -> Curve:
    values = {at: read(numbers) for at, numbers in sorted(rounds.items())}
    return {at: value for at, value in values.items() if value is not None}


def _draw_sizes(
    axes: Any,
    shown: Mapping[str, Rounds],
    looks: Looks,
    read: Callable[[Mapping[str, Any]], float | None],
    label: str,
) -> None:
    """One number by round; runs for which it is 0 throughout are named instead."""
    curves = {run: _by_round(rounds, read) for run, rounds in shown.items()}
    nothing = [plain(run) for run, curve in curves.items() if curve and not any(curve.values())]
    for run, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), **looks[run] | _along(len(curve)))
    size_axis(axes, [value for curve in curves.values() for value in curve.values()], label)
    names = listed(nothing) if len(nothing) < 3 else f"{len(nothing)} runs"
    round_axis(axes, f"0 throughout: {names}" if nothing else "")


def _draw_truncation(axes: Any, shown: Mapping[str, Rounds], looks: Looks) -> None:
    """Solid at the lowest level, dotted at the highest one where anything is lost."""
    values: list[float] = []
    ranks: dict[str, set[int]] = {"-": set(), ":": set()}
    for run, rounds in shown.items():
        named = {n for numbers in rounds.values() for n in numbers["truncation_noise"]}
        levels = sorted(map(int, named))
        curves = {n: _by_round(rounds, _number("truncation_noise", str(n))) for n in levels}
        losing = [n for n, curve in curves.items() if any(curve.values())]
        for rank in dict.fromkeys([*losing[:1], *losing[-1:]]):
            line = "-" if rank == losing[0] else ":"
            ranks[line].add(rank)
            curve = curves[rank]
            look = looks[run] | _along(len(curve)) | {"linestyle": line}
            axes.plot(list(curve), list(curve.values()), **look)
            values += curve.values()
    lines = (("-", "solid"), (":", "dotted"))
    remarks = [f"{name}: rank {listed(sorted(ranks[line]))}" for line, name in lines if ranks[line]]
    size_axis(axes, values, "relative norm")
    round_axis(axes, ", ".join(remarks))
    finish(axes, "Truncation noise")


def _draw_cuts(axes: Any, shown: Mapping[str, Rounds], looks: Looks) -> None:
    """The last round's truncation noise at each rank; dotted the least possible."""
    values: list[float] = []
    ranks: set[int] = set()
    for run, rounds in shown.items():
        numbers = rounds[max(rounds)]
        for key, line in (("truncation_noise", "-"), ("least_truncation_noise", ":")):
            curve = {int(n): value for n, value in numbers[key].items() if value is not None}
            look = looks[run] | {"linestyle": line}
            if line == ":":
                look |= {"marker": "", "linewidth": 1.4}
            axes.plot(list(curve), list(curve.values()), **look)
            values += curve.values()
            ranks |= curve.keys()
    size_axis(axes, values, "relative norm")
    if ranks:
        rank_axis(axes, sorted(ranks))
    axes.set_xlabel("rank (log scale); dotted: the best cut there is")
    finish(axes, "Truncation noise by rank, last round")


def _draw_slots(axes: Any, shown: Mapping[str, Rounds], looks: Looks) -> None:
    """The last round's energy of each slot."""
    values: list[float] = []
    for run, rounds in shown.items():
        energies = [e for e in rounds[max(rounds)]["slot_energy"] if e is not None]
        look = looks[run] | _along(len(energies))
        axes.plot(range(1, len(energies) + 1), energies, **look)
        values += energies
    size_axis(axes, values, "norm of the slot's product")
    round_axis(axes)
    axes.set_xlabel("slot of the global adapter")
    finish(axes, "Size of each slot, last round")


def _sample(shown: Mapping[str, Rounds]) -> str:
    """A remark where not all layers were measured."""
    counts = {
        (numbers["layers"]["measured"], numbers["layers"]["of"])
        for rounds in shown.values()
        for numbers in rounds.values()
    }
    fewest, of = min(counts)
    return f"; each round measured on {fewest} of {of} layers" if fewest < of else ""


def _draw_ranks(
    axes: Any,
    curves: Mapping[str, Curve],
    labels: Mapping[str, str],
    base: float | None,
    words: Wording,
) -> None:
    values: list[float] = []
    for index, (run, curve) in enumerate(curves.items()):
        shown = _shown(curve, words)
        axes.plot(list(shown), list(shown.values()), label=labels[run], **style(index))
        values += shown.values()
    if base is not None:
        at, text = base * words.factor, f"untuned base: {words.show(base)}"
        if has_room(values, at, wants_log(values, words)):
            axes.axhline(at, color=GREY, linestyle=(0, (5, 3)), linewidth=1.4, label=text)
            values.append(at)
        else:
            axes.plot([], [], " ", label=f"{text} (off the scale)")
    rank_axis(axes, sorted({rank for curve in curves.values() for rank in curve}))
    value_axis(axes, values, words)
    finish(axes, f"{capital(words.name)} at each rank prefix of the global adapter")


def _draw_history(axes: Any, history: Mapping[str, Mapping[int, Curve]], words: Wording) -> None:
    values: list[float] = []
    ranks: dict[str, set[int]] = {"-": set(), ":": set()}
    for index, ends in enumerate(history.values()):
        for rank, curve in ends.items():
            shown = _shown(curve, words)
            line = "-" if rank == max(ends) else ":"
            ranks[line].add(rank)
            look = style(index) | _along(len(shown)) | {"linestyle": line}
            axes.plot(list(shown), list(shown.values()), **look)
            values += shown.values()
    remarks = [
        f"{name}: " + (f"rank {next(iter(ranks[line]))}" if len(ranks[line]) == 1 else end)
        for line, name, end in (("-", "solid", "highest rank"), (":", "dotted", "lowest rank"))
        if ranks[line]
    ]
    round_axis(axes, ", ".join(remarks))
    value_axis(axes, values, words)
    finish(axes, f"{capital(words.name)} by round")


def _draw_losses(axes: Any, runs: Runs) -> None:
    for index, events in enumerate(runs.values()):
        losses = {at: loss for at, loss in train_losses(events).items() if math.isfinite(loss)}
        axes.plot(list(losses), list(losses.values()), **style(index) | _along(len(losses)))
    round_axis(axes)
    tasks = {started(events).get("task") for events in runs.values()}
    axes.set_ylabel(f"nats per {'example' if tasks == {'classification'} else 'token'}")
    finish(axes, "Training loss by round, mean over the clients")


def _along(points: int) -> dict[str, Any]:
    """Small markers on a line over rounds, and none where they would run together."""
    return {"markersize": 4 if points <= 30 else 0}


def _history(events: Sequence[Event], metric: str) -> dict[int, Curve]:
    """Highest and lowest rank to (round to value)."""
    found = [(e.round, e.by_rank(metric)) for e in evaluations(events)]
    ranks = {rank for _, curve in found for rank in curve}
    ends = dict.fromkeys([max(ranks), min(ranks)]) if ranks else {}
    return {rank: {at: curve[rank] for at, curve in found if rank in curve} for rank in ends}


def _shown(curve: Curve, words: Wording) -> Curve:
    """The finite values in the unit that is shown."""
    return {at: value * words.factor for at, value in curve.items() if math.isfinite(value)}


def _label(run: str, events: Sequence[Event], curve: Curve) -> str:
    remarks = [shortfall(events)] if shortfall(events) else []
    if any(not math.isfinite(value) for value in curve.values()):
        remarks.append("diverged")
    return plain(run) + (f" ({', '.join(remarks)})" if remarks else "")


def _setting(runs: Runs) -> str:
    """What all runs have in common: 'causal-lm, 16 clients, 12 rounds, seed 0'."""
    starts = [started(events) for events in runs.values()]
    texts = {"task": "{}", "clients": "{} clients", "rounds": "{} rounds", "seed": "seed {}"}
    parts = []
    for key, text in texts.items():
        found = {start.get(key) for start in starts}
        if len(found) == 1 and found != {None}:
            parts.append(text.format(found.pop()))
    return ", ".join(parts)

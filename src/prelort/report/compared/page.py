"""A study as one page of HTML that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prelort.report.axes import COLOURS, has_room, wants_log
from prelort.report.charts import Chart, Series, line_chart
from prelort.report.compared.grid import Grid
from prelort.report.compared.spread import spread
from prelort.report.compared.tables import of_all, of_setting, unfinished
from prelort.report.page import environment
from prelort.report.tables import Block
from prelort.report.wording import Wording, capital, plain, wording

MOST_BANDS = 3
"""With more methods their bands would cover each other."""


@dataclass(frozen=True, slots=True)
class Part:
    """One setting as the page shows it."""

    name: str
    tables: list[Block]
    charts: list[Chart]


def render(grid: Grid, title: str, study: str, versions: Mapping[str, str]) -> str:
    """The page of a study; ``study`` is its TOML. Every text of theirs is escaped."""
    done = sum(cell.finished for cell in grid.cells)
    count = len(grid.cells)
    return (
        environment()
        .get_template("study.html")
        .render(
            title=plain(title),
            status=f"finished: {count} cells"
            if done == count
            else f"{done} of {count} cells finished",
            finished=done == count,
            facts=[(key, plain(value)) for key, value in grid.facts.items()],
            parts=[_part(grid, setting) for setting in grid.settings if grid.finished(setting)],
            overall=of_all(grid) if done else [],
            unfinished=unfinished(grid),
            study="\n".join(map(plain, study.strip().splitlines())),
            versions=[(plain(name), plain(text)) for name, text in versions.items()],
            colours=COLOURS,
        )
    )


def _part(grid: Grid, setting: str) -> Part:
    charts = []
    for words in map(wording, grid.metrics()):
        charts += [_by_rank(grid, setting, words), _by_round(grid, setting, words)]
    charts.append(_losses(grid, setting))
    tables = of_setting(grid, setting)
    return Part(plain(setting) or "Results", tables, [chart for chart in charts if chart])


def _by_rank(grid: Grid, setting: str, words: Wording) -> Chart | None:
    ranks = grid.ranks(setting, words.metric)
    curves = [
        {rank: list(grid.values(setting, m, words.metric, rank).values()) for rank in ranks}
        for m in grid.methods
    ]
    base = spread(list(grid.base(setting, words.metric).values()))
    title = f"{capital(words.name)} at each rank prefix"
    return _measured(grid, title, curves, words, base.mean if base else None, True)


def _by_round(grid: Grid, setting: str, words: Wording) -> Chart | None:
    curves = [grid.history(setting, m, words.metric) for m in grid.methods]
    if not any(len(curve) > 1 for curve in curves):
        return None
    title = f"{capital(words.name)} by round at the highest rank"
    return _measured(grid, title, curves, words, None, False)


def _measured(
    grid: Grid,
    title: str,
    curves: Sequence[Mapping[int, Sequence[float]]],
    words: Wording,
    base: float | None,
    by_rank: bool,
) -> Chart | None:
    lines = _lines(grid, curves, words)
    values = [y for line in lines for y in line.points.values() if math.isfinite(y)]
    log = wants_log(values, words) and min(values) > 0
    reference = None
    if base is not None and has_room(values, base * words.factor, log):
        reference = (f"untuned base {words.show(base)}", base * words.factor)
    return line_chart(
        title,
        f"{words.title}, {words.direction}; {_meaning(grid)}",
        lines,
        x_label="rank prefix in use" if by_rank else "round",
        log_x=by_rank,
        log_y=log,
        show=lambda value: words.show(value / words.factor),
        reference=reference,
    )


def _losses(grid: Grid, setting: str) -> Chart | None:
    words = wording("loss")
    curves = [grid.losses(setting, method) for method in grid.methods]
    return line_chart(
        "Training loss by round",
        f"nats, mean over clients; {_meaning(grid)}",
        _lines(grid, curves, words),
        show=words.show,
    )


def _meaning(grid: Grid) -> str:
    band = ", band: one standard deviation" if len(grid.methods) <= MOST_BANDS else ""
    return f"line: mean over {len(grid.seeds)} seeds{band}"


def _lines(
    grid: Grid, curves: Sequence[Mapping[int, Sequence[float]]], words: Wording
) -> list[Series]:
    lines = []
    for look, (method, curve) in enumerate(zip(grid.methods, curves, strict=True)):
        found = {at: spread([v * words.factor for v in values]) for at, values in curve.items()}
        means = {float(at): one.mean for at, one in found.items() if one is not None}
        apart = {float(at): one.deviation for at, one in found.items() if one and one.deviation}
        if len(grid.methods) > MOST_BANDS:
            apart = {}
        low = {at: means[at] - apart.get(at, 0.0) for at in means} if apart else {}
        high = {at: means[at] + apart.get(at, 0.0) for at in means} if apart else {}
        lines.append(Series(plain(method), means, look, low, high))
    return lines

"""A run or a study as one page of HTML that needs nothing else: tables, charts, incidents."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from prelort.history import RunHistory
from prelort.report import tables
from prelort.report.formatting import human_bytes, human_seconds, listing, plain
from prelort.report.incidents import Incident, incidents, waits_for
from prelort.report.results import CellResult, Results
from prelort.report.tables import ResultTable

if TYPE_CHECKING:
    import altair as alt

MAX_CELLS = 12
"""Cells of a study with a section of their own."""

MAX_INCIDENTS = 400
CHART_HEIGHT, LEGEND_COLUMNS = 250, 3


@dataclass(slots=True)
class Charts:
    """The specifications of all charts; the page refers to them by number."""

    specifications: list[dict[str, Any]] = field(default_factory=list)

    def add(self, charts: Iterable[alt.LayerChart | None]) -> list[int]:
        """The numbers of these charts; there is none for None."""
        import altair as alt

        from prelort.report.drawing import specification

        numbers = []
        for chart in charts:
            if chart is not None:
                stepped = isinstance(chart.height, alt.Step)
                sized = chart if stepped else chart.properties(height=CHART_HEIGHT)
                fitted = sized.properties(
                    width="container",
                    autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
                )
                numbers.append(len(self.specifications))
                self.specifications.append(specification(fitted, LEGEND_COLUMNS))
        return numbers


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: tables, then charts."""

    name: str
    tables: list[ResultTable]
    charts: list[int]


@dataclass(frozen=True, slots=True)
class CellSection:
    """One run on the page."""

    name: str
    status: str
    finished: bool
    waiting: str
    facts: list[tuple[str, str]]
    charts: list[int]
    clients: list[ResultTable]
    client_charts: list[int]
    phases: list[ResultTable]
    incidents: list[Incident]
    more_incidents: int
    notes: list[str]


def render(results: Results) -> str:
    """The page. Every text is escaped, and nothing is fetched to show it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    charts = Charts()
    sections = [
        _setting(results, setting, charts)
        for setting in results.settings
        if results.counted(setting)
    ]
    overall = tables.of_all_settings(results)
    sections += [Section("All settings", overall, [])] if overall else []
    missing = tables.unfinished(results) if len(results.cells) > 1 else []
    sections += [Section("Without a result", missing, [])] if missing else []
    cells = results.cells if len(results.cells) <= MAX_CELLS else []
    finished = sum(cell.history.finished for cell in results.cells)
    environment = Environment(
        loader=PackageLoader("prelort.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [_cell(results, cell, charts) for cell in cells]
    script = _script()
    return environment.get_template("page.html").render(
        title=plain(results.title),
        status=f"{finished} of {len(results.cells)} runs finished",
        finished=finished == len(results.cells),
        facts=[(key, plain(value)) for key, value in results.facts.items()],
        sections=sections,
        cells=shown,
        configuration="\n".join(map(plain, results.configuration.strip().splitlines())),
        versions=[(plain(name), plain(text)) for name, text in results.versions.items()],
        style=_asset("style.css"),
        specifications=json.dumps(charts.specifications, allow_nan=False).replace("<", "\\u003c"),
        script=script if charts.specifications else "",
        hash=_hash(script),
    )


def _setting(results: Results, setting: str, charts: Charts) -> Section:
    from prelort.report import charts as build

    shown: list[Any] = []
    for metric in results.metrics:
        shown += [f(results, setting, metric)
                  for f in (build.by_rank, build.by_round, build.differences,
                            build.client_metrics)]  # fmt: skip
    shown += [build.training_loss(results, setting), *build.diagnostics(results, setting)]
    found = [*tables.of_setting(results, setting), *tables.diagnostics(results, setting)]
    return Section(plain(setting) or "Results", found, charts.add(shown))


def _cell(results: Results, cell: CellResult, charts: Charts) -> CellSection:
    from prelort.report import charts as build

    alone = Results([cell], cell.method, metric=results.metric)
    history, setting = cell.history, cell.setting
    shown: list[Any] = [build.traffic(alone), build.time_by_phase(alone)]
    if len(results.cells) > 1:  # of a single run the results have them
        rounds = [build.by_round(alone, setting, metric) for metric in alone.metrics]
        shown = [*rounds, build.training_loss(alone, setting), *shown]
    found = incidents(history.incidents)
    return CellSection(
        name=cell.name,
        status=_status(cell),
        finished=history.finished,
        waiting=waits_for(history.waiting) if history.waiting else "",
        facts=_facts(cell),
        charts=charts.add(shown),
        clients=tables.clients(alone),
        client_charts=charts.add([build.client_losses(alone)]),
        phases=tables.phases(alone),
        incidents=found[:MAX_INCIDENTS],
        more_incidents=len(found[MAX_INCIDENTS:]),
        notes=_notes(history),
    )


def _status(cell: CellResult) -> str:
    if cell.history.finished:
        return f"finished after {cell.history.done} rounds"
    if cell.status == "not started":
        return "not started"
    return f"{cell.status}: {cell.explanation}"


def _facts(cell: CellResult) -> list[tuple[str, str]]:
    history, config = cell.history, cell.config
    facts: dict[str, Any] = {
        "method": cell.method,
        "model": _value(config, "model", "name"),
        "data": _value(config, "data", "source"),
        "seed": cell.seed,
    }
    if (started := history.started) is not None:
        asked = _value(config, "federation", "clients_per_round")
        share = f"{asked:.0%}" if isinstance(asked, float) else asked
        facts |= {
            "task": started.task,
            "rounds": f"{history.done} of {started.rounds}",
            "clients": f"{started.clients}" + ("" if asked is None else f", {share} a round"),
            "ranks": listing(started.levels),
        }
    if history.done:
        facts |= {
            "bytes up": human_bytes(history.bytes_up),
            "bytes down": human_bytes(history.bytes_down),
            "time": human_seconds(sum(history.seconds.values())),
        }
    return [(key, plain(value)) for key, value in facts.items() if value is not None]


def _value(config: Mapping[str, Any], section: str, key: str) -> Any:
    inner = config.get(section)
    return inner.get(key) if isinstance(inner, Mapping) else None


def _notes(history: RunHistory) -> list[str]:
    samples = history.final.samples if history.final else None
    if not samples:
        return []
    ranks = [
        f"{one.examples} examples at rank {rank}" for rank, one in sorted(samples.items()) if rank
    ]
    return [f"The clients evaluated the prefixes on their own test examples ({', '.join(ranks)})."]


@cache
def _script() -> str:
    """Vega, Vega-Lite and Vega-Embed with the page's own code, as one script."""
    import vl_convert

    return str(vl_convert.javascript_bundle(_asset("page.js")))


@cache
def _asset(name: str) -> str:
    return files("prelort.report").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """The script's source expression of a Content-Security-Policy: no other script can run."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"

"""A run or a study as one self-contained HTML page: tables, charts, incidents."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prelort.report import tables
from prelort.report.formatting import human_bytes, human_seconds, listing, plain
from prelort.report.guarantees import guarantees
from prelort.report.incidents import incidents, waits_for
from prelort.report.results import CellResult, Results

MAX_CELLS = 12
"""Cells of a study with a section of their own."""

MAX_INCIDENTS = 400
CHART_HEIGHT = 250


def render(results: Results, place: Path = Path()) -> str:
    """The page. Every text is escaped, and nothing is fetched to show it.

    ``place``: the folder that it will be in, from which its links lead to the adapters.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("prelort.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    finished = sum(cell.history.finished for cell in results.cells)
    sections = _sections(results)
    cells = results.cells if len(results.cells) <= MAX_CELLS else []
    runs = [_cell(results, cell, place) for cell in cells]
    specifications: list[dict[str, Any]] = []
    for part in (*sections, *runs):  # the page refers to a chart by its number
        for key in ("charts", "client_charts") if "client_charts" in part else ("charts",):
            first, charts = len(specifications), part[key]
            specifications += charts
            part[key] = range(first, len(specifications))
    script = _script()
    return environment.get_template("page.html").render(
        title=plain(results.title),
        status=f"{finished} of {len(results.cells)} runs finished",
        finished=finished == len(results.cells),
        facts=_facts({**results.facts, "started": _started(*results.cells)}),
        sections=sections,
        cells=runs,
        configuration="\n".join(map(plain, results.configuration.strip().splitlines())),
        versions=_facts(results.versions),
        style=_asset("style.css"),
        specifications=json.dumps(specifications, allow_nan=False).replace("<", "\\u003c"),
        script=script if specifications else "",
        hash=_hash(script),
    )


def _sections(results: Results) -> list[dict[str, Any]]:
    """A section for each setting, and those about all of them."""
    from prelort.report import charts

    sections = []
    for setting in filter(results.counted, results.settings):
        built: list[Any] = [
            build(results, setting, metric)
            for metric in results.metrics
            for build in (charts.by_rank, charts.by_round, charts.differences,
                          charts.client_metrics)
        ]  # fmt: skip
        built += [charts.training_loss(results, setting), *charts.diagnostics(results, setting)]
        of_setting = [
            *tables.of_setting(results, setting),
            *tables.holders(results, setting),
            *tables.diagnostics(results, setting),
        ]
        section = {"name": plain(setting) or "Results", "summary": tables.summary(results, setting)}
        sections.append({**section, "tables": of_setting, "charts": _specifications(built)})
    overall = tables.of_all_settings(results)
    missing = tables.unfinished(results) if len(results.cells) > 1 else []
    for name, rest in (("All settings", overall), ("Without a result", missing)):
        if rest:
            sections.append({"name": name, "summary": "", "tables": rest, "charts": []})
    return sections


def _cell(results: Results, cell: CellResult, place: Path) -> dict[str, Any]:
    """One run on the page."""
    from prelort.report import charts

    alone = Results([cell], cell.method, metric=results.metric)
    history, setting = cell.history, cell.setting
    built: list[Any] = [charts.traffic(alone), charts.time_by_phase(alone)]
    if len(results.cells) > 1:  # the results section has those of a single run
        rounds = [charts.by_round(alone, setting, metric) for metric in alone.metrics]
        built = [*rounds, charts.training_loss(alone, setting), *built]
    all_incidents = incidents(history.incidents)
    status = f"{cell.status}: {cell.explanation}" if cell.explanation else cell.status
    samples = (history.final.samples if history.final else None) or {}
    ranks = [f"{one.examples} examples at rank {rank}" for rank, one in sorted(samples.items())
             if rank]  # fmt: skip
    return {
        "name": cell.name,
        "status": f"finished after {history.done} rounds" if history.finished else status,
        "finished": history.finished,
        "waiting": waits_for(history.waiting) if history.waiting else "",
        "facts": _facts(_facts_of(cell)),
        "guarantees": guarantees(cell.config, history),
        "adapters": _adapters(results.folder, cell, place),
        "charts": _specifications(built),
        "clients": tables.clients(alone),
        "client_charts": _specifications([charts.client_losses(alone)]),
        "phases": tables.phases(alone),
        "incidents": all_incidents[:MAX_INCIDENTS],
        "more_incidents": len(all_incidents[MAX_INCIDENTS:]),
        "measured": f"The clients evaluated the prefixes on their own test examples "
        f"({', '.join(ranks)})." if ranks else "",
    }  # fmt: skip


def _facts_of(cell: CellResult) -> dict[str, Any]:
    history, config = cell.history, cell.config
    facts: dict[str, Any] = {
        "method": cell.method,
        "model": config.get("model", {}).get("name"),
        "data": config.get("data", {}).get("source"),
        "seed": cell.seed,
    }
    if (started := history.started) is not None:
        sampled = config.get("federation", {}).get("clients_per_round")
        share = f"{sampled:.0%}" if isinstance(sampled, float) else sampled
        facts |= {
            "started": _started(cell),
            "task": started.task,
            "rounds": f"{history.done} of {started.rounds}",
            "clients": f"{started.clients}" + ("" if sampled is None else f", {share} a round"),
            "ranks": listing(started.levels),
        }
    if history.done:
        facts |= {
            "bytes up": human_bytes(history.bytes_up),
            "bytes down": human_bytes(history.bytes_down),
            "time": human_seconds(sum(history.seconds.values())),
        }
    if history.epsilon is not None:
        delta = config["privacy"]["delta"]
        facts["privacy spent"] = f"epsilon = {history.epsilon:.3g}, delta = {delta:g}"
    return facts


def _started(*cells: CellResult) -> str | None:
    """When the first of the runs was started."""
    times = [cell.history.started.time for cell in cells if cell.history.started is not None]
    return f"{min(times):%Y-%m-%d %H:%M} UTC" if times else None


def _adapters(study: Path, cell: CellResult, place: Path) -> list[tuple[int, str]]:
    """The ranks of the run's adapters, and the links to their folders."""
    if cell.folder is None:
        return []
    folders = {
        int(folder.name.removeprefix("rank-")): folder
        for folder in (study / cell.folder / "adapters").glob("rank-*")
    }
    return [
        (rank, quote(Path(os.path.relpath(folder, place)).as_posix()) + "/")
        for rank, folder in sorted(folders.items())
    ]


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(plain(key), plain(value)) for key, value in facts.items() if value is not None]


def _specifications(charts: Iterable[Any]) -> list[dict[str, Any]]:
    """The charts that are not None, as wide as the page."""
    import altair as alt

    from prelort.report.drawing import specification

    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    return [
        specification(
            chart.properties(
                width="container",
                autosize=fit,
                height=chart.height if isinstance(chart.height, alt.Step) else CHART_HEIGHT,
            )
        )
        for chart in charts
        if chart is not None
    ]


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

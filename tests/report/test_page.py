import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import page_events
import pytest

from prelort.errors import ConfigError
from prelort.experiment.page import write_page
from prelort.report.happened import KNOWN, incidents, ranges
from prelort.report.page import Source, render, view

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Checks that every element is closed in its turn, and keeps what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, text):
        if text.strip():
            self.texts.append(text.strip())

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(events, **more):
    return Page(render([Source("prelort", events, **more)], "first"))


@pytest.mark.parametrize("metric", ["macro_f1", "rouge_l"])
def test_a_metric_whose_key_is_not_its_name_has_its_curves(make_run, metric):
    shown = [
        len(page_of(make_run("prelort", {2: 0.4, 8: 0.5}, metric=name, every=1)).of("figure"))
        for name in (metric, "accuracy")
    ]
    assert shown[0] == shown[1] > 0


def test_of_a_run_has_its_facts_tables_and_curves(make_run):
    config = {"model": {"name": "embedded"}, "federation": {"clients_per_round": 5}}
    events = make_run("prelort", {2: 27.0, 16: 21.0}, every=1)
    found = page_of(events, config=config, config_text="seed = 0\n", versions={"torch": "2.13.0"})
    facts = dict(view(Source("prelort", events, config)).facts)
    assert facts == {
        "method": "prelort", "model": "embedded", "task": "causal-lm", "rounds": "12 of 12",
        "clients": "16, 5 a round", "ranks": "2 and 16", "seed": "0",
        "bytes up": "60 kB", "bytes down": "90 kB", "time": "30 s",
    }  # fmt: skip
    for text in ("finished after 12 rounds", "untuned base", "21.0", "seed = 0", "2.13.0"):
        assert text in found.texts
    labels = [svg["aria-label"] for svg in found.of("svg") if svg.get("role") == "img"]
    (by_round,) = (one for one in labels if one.startswith("Perplexity by round, at each"))
    assert "rank 16: 700.0 at round 0, 21.0 at round 12" in by_round
    assert any("rank 2, round 12: 27.0" in text for text in found.texts)  # said when pointed at
    assert any("11 more clients have not been asked" in text for text in found.texts)


def test_of_several_runs_compares_them(two_runs):
    text = render([Source(name, events) for name, events in two_runs.items()], "first")
    found = Page(text)
    assert [t for t in found.texts if t in two_runs].count("prelort") >= 3
    assert sum(tag == "section" for tag, _ in found.tags) == 2
    assert render([Source(n, e) for n, e in two_runs.items()], "first") == text


def test_needs_nothing_from_elsewhere(two_runs):
    text = render([Source(name, events) for name, events in two_runs.items()], "first")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "img", "iframe", "object", "a", "base")
        assert attributes.get("href", "data:,") == "data:,"
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)


def test_everything_from_the_run_is_escaped():
    config = page_events.SCRIPT
    versions = {config: config}
    source = Source(config, page_events.troubled(), {"model": {"name": config}}, config, versions)
    text = render([source, source], config)
    found = Page(text)
    assert not found.of("script")
    assert not found.of("img")
    assert "<script" not in text.lower()
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert found.texts.count(config) > 8  # shown as it is, as text
    assert any("{{ 7 * 7 }} &amp;" in one for one in found.texts)


def test_tells_who_failed_and_why():
    rows = {(one.what, one.client): one for one in incidents(page_events.troubled())}
    assert rows["refused", "old-site"].reason == "has another base"
    assert rows["left out", page_events.SCRIPT].when == "1–3"
    assert len(rows["left out", page_events.SCRIPT].reason) < 450
    assert rows["left out", "clinic-south"].reason == "did not answer"
    assert rows["rank changed", "clinic-north"].reason == "from rank 2 to 4: the client's offer"
    assert rows["not measured", "b"].times == 3
    assert rows["not diagnosed", ""].reason == "no memory"
    assert rows["joined", "late-comer"].reason == "with rank 4"
    assert rows["went away", "clinic-south"].when == "4"
    assert rows["round repeated", ""].reason == "attempt 2: too few replies"
    assert rows["waited", ""].reason.startswith("needs 2 clients; present: clinic-north; missing: ")
    assert {one.what for one in rows.values() if one.bad} == {
        "refused", "left out", "not measured", "not diagnosed", "round repeated",
    }  # fmt: skip


def test_of_an_unfinished_run_says_where_it_stands():
    shown = view(Source("prelort", page_events.troubled()))
    assert shown.status == "unfinished: 3 of 6 rounds done"
    assert shown.waiting.endswith("until 2026-11-21T12:00:00+00:00")
    assert shown.notes == [
        "The prefixes were measured at the clients, on their own rows (last: 120 examples at rank "
        "2, 40 examples at rank 8).",
        "Kinds of events that this page does not know: something-new.",
    ]
    lines = {line.name: line for line in shown.clients}
    assert lines["clinic-north"].rank == "2 → 4"
    assert lines["clinic-north"].own == ["50.0"]
    failed = lines[page_events.SCRIPT]
    assert (failed.asked, failed.answered, failed.failed) == (3, 0, 3)
    assert shown.never_asked == 1


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8])
def test_stands_wherever_the_run_does(count, make_run):
    page_of(page_events.troubled()[:count])
    page_of(make_run("prelort", {4: 20.0}, rounds=1)[: count + 1])


def test_what_a_resumed_run_took_back_is_not_told():
    events = page_events.troubled()
    back = [*events, {"event": "resumed", "round": 1}]
    assert [one.when for one in incidents(back) if one.client == page_events.SCRIPT] == ["1"]
    assert incidents(back)[-1].what == "resumed"


def test_unknown_events_change_nothing_else(make_run):
    events = make_run("prelort", {2: 27.0, 16: 21.0})
    strange = [{"event": "telemetry", "round": "x", "clients": None, "loss": "high", "rank": [1]}]
    strange.append({"event": "resumed", "round": 12})
    plainly, strangely = (view(Source("p", e)) for e in (events, [*events, *strange]))
    assert strangely.charts == plainly.charts
    assert strangely.clients == plainly.clients
    assert strangely.notes == ["Kinds of events that this page does not know: telemetry."]


def test_a_large_run_stays_small_and_legible():
    source = Source("prelort", page_events.large())
    text = render([source], "large")
    assert len(text.encode()) < 1_000_000  # docs/watching.md says so
    shown = view(source)
    loss = next(chart for chart in shown.charts if chart.title.startswith("Training loss"))
    assert len(loss.lines) == 5  # by rank, not by client
    assert all(line.band and not line.marked and len(line.dots) <= 61 for line in loss.lines)
    assert sum(len(row.cells) for row in shown.losses.rows) <= 4000
    assert shown.losses.any_failed
    assert shown.losses.notes == ["Each cell is the mean of 13 rounds."]
    assert len(shown.incidents) + shown.more_incidents < 500


def test_the_documentation_has_every_event():
    text = (Path(__file__).parents[2] / "docs" / "watching.md").read_text()
    for kind in KNOWN:
        assert f"`{kind}`" in text, kind


def test_ranges():
    assert ranges([]) == ""
    assert ranges([4, 2, 1, 6, 7, 8, 2]) == "1, 2, 4, 6–8"


@pytest.fixture
def folder(tmp_path):
    def make(name, events):
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "config.toml").write_text('[method]\nname = "prelort"\n')
        (path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
        return path

    return make


class TestWritten:
    def test_into_the_folder_or_elsewhere(self, folder, make_run, tmp_path):
        run = folder("run", make_run("prelort", {2: 27.0}))
        assert write_page(run) == run / "report.html"
        assert (
            write_page(run, tmp_path / "page.html").read_text() == (run / "report.html").read_text()
        )

    def test_of_several_those_that_have_begun(self, folder, make_run, tmp_path):
        folder("runs/prelort", make_run("prelort", {2: 27.0}))
        (tmp_path / "runs" / "methods.json").write_text('["prelort", "zero-padding"]')
        assert "finished after 12 rounds" in write_page(tmp_path / "runs").read_text()

    def test_before_the_first_event(self, folder):
        run = folder("run", [])
        (run / "metrics.jsonl").unlink()
        assert "no round has begun" in write_page(run).read_text()

    def test_refuses_what_is_no_run(self, tmp_path):
        with pytest.raises(ConfigError, match=r"holds no run: config\.toml is missing"):
            write_page(tmp_path)

    def test_refuses_where_it_cannot_write(self, folder, tmp_path):
        with pytest.raises(ConfigError, match="cannot be written"):
            write_page(folder("run", []), tmp_path / "nowhere" / "page.html")


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to load the page")
def test_loads_in_a_browser_without_complaints(folder, tmp_path):
    page = write_page(folder("run", page_events.troubled()))
    picture = tmp_path / "page.png"
    ended = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--hide-scrollbars", "--window-size=800,1200", f"--user-data-dir={tmp_path / 'user'}",
            "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--screenshot={picture}", Path(page).as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in ended.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000  # something is drawn

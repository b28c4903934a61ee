"""The page: whole, escaped, self-contained; for runs in every state and for studies."""

import html.parser
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from results_of import TWO, runs, study

from histories import HOSTILE, large_events, round_diagnostics, run_history, troubled_events
from prelort.history import RunHistory
from prelort.report.page import MAX_CELLS, render
from prelort.report.results import CellResult, Results

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Checks that every element is closed in its turn, and keeps tags, texts and scripts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.charts = json.loads(self.scripts[0]) if self.scripts else []
        self.titles = [chart["title"]["text"] for chart in self.charts]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, text):
        if text.strip():
            (self.scripts if self.open[-1] == "script" else self.texts).append(text.strip())


def troubled():
    history = RunHistory.of(troubled_events())
    cell = CellResult("", HOSTILE, 3, history, config={"model": {"name": HOSTILE}})
    return Results(
        [cell], HOSTILE, HOSTILE, versions={HOSTILE: HOSTILE}, configuration=f"a = '{HOSTILE}'"
    )


def test_of_a_run_has_facts_tables_charts_clients_and_configuration():
    results = runs(prelort=run_history(every=1, own={"json": 3.0}, diagnostics=round_diagnostics))
    cell = replace(results.cells[0], config={"model": {"name": "embedded"}})
    page = Page(render(replace(
        results, cells=[cell], title="first", configuration="seed = 0\n", versions={"torch": "2.1"}
    )))  # fmt: skip
    started = f"{cell.history.started.time:%Y-%m-%d %H:%M} UTC"
    for text in ("first", started, "Who holds what", "finished after 4 rounds", "untuned base",
                 "21.0", "embedded", "seed = 0", "2.1", "asyncio", "Incidents",
                 "Diagnostics of the last round"):  # fmt: skip
        assert text in page.texts
    assert page.titles == [
        "Perplexity at each rank prefix", "Perplexity by round, each rank",
        "Perplexity of each client", "Training loss by round", "Aggregation noise",
        "Client drift, mean over clients", "Effective rank, mean over layers",
        "Truncation noise, lowest rank", "Truncation noise by rank", "Size of each rank dimension",
        "Bytes by round", "Time by round", "Training loss by client and round",
    ]  # fmt: skip
    places = [tag[1]["data-chart"] for tag in page.tags if "data-chart" in tag[1]]
    assert sorted(map(int, places)) == list(range(13))


def test_fetches_nothing_and_runs_no_script_but_its_own():
    text = render(troubled())
    page = Page(text)
    policy = next(t["content"] for _, t in page.tags if t.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/]{43}='$", policy)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 2  # the data and the code
    for tag, attributes in page.tags:
        assert tag not in ("img", "iframe", "object", "a", "base")
        assert attributes.get("href", "data:,") == "data:,"
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?:|@import|url\(", re.sub(r"(?s)<script.*?</script>", "", text))
    assert not any("url" in json.dumps(chart["datasets"]) for chart in page.charts)


def test_texts_from_outside_are_shown_as_text():
    text = render(troubled())
    page = Page(text)
    assert HOSTILE not in text.replace(json.dumps(HOSTILE), "")
    assert HOSTILE in page.texts
    assert any(HOSTILE in json.dumps(chart) for chart in page.charts)  # but escaped in the page
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "49" not in page.texts
    assert any('"><img src=x onerror=alert(2)>' in one for one in page.texts)


def test_of_an_unfinished_run_says_where_it_is_and_what_it_waits_for():
    page = Page(render(troubled()))
    assert "unfinished: after round 3 of 6" in page.texts
    assert any(text.startswith("Waiting for 1 more client") for text in page.texts)
    assert any("120 examples at rank 2" in text for text in page.texts)
    assert any("2 more clients not sampled" in text for text in page.texts)
    for incident in ("failed", "refused", "rank changed", "repeated", "waiting"):
        assert incident in page.texts


@pytest.mark.parametrize("count", range(0, len(troubled_events()), 3))
def test_stands_wherever_a_run_is(count):
    history = RunHistory.of(troubled_events()[:count])
    page = Page(render(Results([CellResult("", "prelort", 0, history)], "prelort", "x")))
    assert page.texts


def test_links_to_the_adapters_from_where_it_is(tmp_path):
    study = tmp_path / "my study"
    for rank in (16, 4):
        (study / "prelort" / "adapters" / f"rank-{rank}").mkdir(parents=True)
    cell = CellResult("", "prelort", 0, run_history(), folder=Path("prelort"))
    page = Page(render(Results([cell], "prelort", "x", folder=study), tmp_path))
    links = [tag[1]["href"] for tag in page.tags if tag[0] == "a"]
    assert links == [f"my%20study/prelort/adapters/rank-{rank}/" for rank in (4, 16)]


def test_of_several_runs_compares_them_and_has_a_section_for_each():
    results = runs(prelort=run_history(every=1), flora=run_history(stop=2, every=1))
    page = Page(render(results))
    assert "1 of 2 runs finished" in page.texts
    assert [text for text in page.texts if text.startswith(("prelort, seed", "flora, seed"))] == [
        "flora, seed 0", "prelort, seed 0: finished after 4 rounds",
        "flora, seed 0: unfinished: after round 2 of 4",
    ]  # fmt: skip
    assert page.titles.count("Perplexity by round, each rank") == 2
    assert page.titles.count("Perplexity by round, highest rank") == 1


def test_of_a_study_has_settings_and_differences_but_not_dozens_of_runs():
    results = study(TWO, ("iid", "skewed", "by <topic>"))
    assert len(results.cells) > MAX_CELLS
    page = Page(render(results))
    for text in (
        "iid",
        "skewed",
        "by <topic>",
        "All settings",
        "18 of 18 runs finished",
        "started",
    ):
        assert text in page.texts
    assert page.titles.count("Difference in AURAC, paired by seed") == 3
    sentence = "prelort has the best mean perplexity over the ranks (AURAC 27.3)."
    assert page.texts.count(sentence) == 3
    assert page.texts.index(sentence) < page.texts.index("untuned base")
    first = page.tags.index(("div", {"class": "chart", "data-chart": "0"}))
    assert first < [tag for tag, _ in page.tags].index("table")
    assert "Incidents" not in page.texts


def test_of_failed_runs_says_why():
    failed = [CellResult("", name, 0, RunHistory(), reason="no memory") for name in ("a", "b")]
    page = Page(render(Results(failed, "a", "perplexity")))
    assert "Without a result: 2 of 2 runs" in page.texts
    assert page.texts.count("no memory") == 2


def test_a_large_run_stays_small():
    results = Results([CellResult("", "prelort", 0, RunHistory.of(large_events()))], "prelort")
    text = render(results)
    assert len(text) < 2.6e6
    assert any("failed" in one for one in Page(text).texts)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_draws_its_charts_in_a_browser_without_a_network(tmp_path):
    page = tmp_path / "report.html"
    page.write_text(render(troubled()), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu",
               "--virtual-time-budget=9000", "--host-resolver-rules=MAP * ~NOTFOUND",
               "--enable-logging=stderr", "--dump-dom",
               f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    charts = len(Page(page.read_text(encoding="utf-8")).charts)
    assert done.stdout.count('class="marks"') == charts > 0
    assert "Refused to" not in done.stderr
    assert "Uncaught" not in done.stderr


CLIENTS = {"epsilon": 4.0, "delta": 1e-5, "unit": "client", "min_holders": 3}
TESTED = {"data": {"test": "test.csv"}}


@pytest.mark.parametrize(
    "config, spent, given, not_given",
    [
        ({"privacy": CLIENTS} | TESTED, 3.5,
         ["(3.5, 1e-05)-differential privacy of the budget of 4 for each client", "but the server"],
         ["losses: all on this page", "their budgets add up"]),
        ({"privacy": {**CLIENTS, "secure_aggregation": True}} | TESTED, 3.5,
         ["the server too", "sums of the replies of 3 clients or more"], ["that deviates"]),
        ({"privacy": {**CLIENTS, "unit": "example"}}, 3.5,
         ["for each training example"], ["in common", "measured on the clients' rows"]),
        ({"privacy": {**CLIENTS, "secure_aggregation": True}} | TESTED, None,
         ["sums of the replies"], ["they are exact"]),
        ({"privacy": {**CLIENTS, "secure_aggregation": True, "hide_ranks": True}} | TESTED, None,
         ["how many clients hold each rank dimension"], ["absent when the run was started again"]),
        ({"robustness": {"rule": "krum"}}, None, ["the rule 'krum' worked"], ["too few holders"]),
    ],
    ids=["clients", "clients, masked", "examples", "masked", "hidden ranks", "robust"],
)  # fmt: skip
def test_says_what_was_guaranteed_and_what_was_not(config, spent, given, not_given):
    results = runs(prelort=run_history(epsilon=spent))
    page = Page(render(replace(results, cells=[replace(results.cells[0], config=config)])))
    kept, rest = page.texts.index("Guaranteed"), page.texts.index("Not guaranteed")
    end = page.texts.index("Results")
    for sentences, found in ((given, page.texts[kept:rest]), (not_given, page.texts[rest:end])):
        for sentence in sentences:
            assert sentence in " ".join(found)
    assert ("measured on the clients' rows" in " ".join(page.texts[rest:end])) == (
        spent is not None and "data" not in config
    )


def test_without_protection_it_promises_nothing():
    assert "Guaranteed" not in Page(render(runs(prelort=run_history()))).texts

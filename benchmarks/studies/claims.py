"""Check what the pages say about who wins against the kept results.

    python benchmarks/studies/claims.py

In README.md, docs/results and docs/methods a paragraph or list item that names a winner (`WINNER`)
has a comment with its claims, one a line:

  <!-- claim:
  claim-python | SETTING | METRIC | PLACES | prelort-sorted > prelort; flexlora -->

PLACES are ranks, or AURAC; SETTING is empty if the study has none. The claim holds if at each place

  A > B; C     A is better than each of them: the 95 % interval of the differences, paired by seed,
               is above zero
  A >= B; C    the mean of A is at least as good
  A = B; C     the interval contains zero
  A rises      the mean of A is better at each rank than at the one before

`*` stands for all other rows but the homogeneous references.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pandas as pd
import tables

from prelort.metrics.scores import HIGHER_IS_BETTER, aurac
from prelort.report.results import AURAC, interval, last_round

PAGES = ("README.md", "docs/results/*.md", "docs/methods/*.md")
CLAIM = re.compile(r"<!-- claim:(.*?)-->", re.DOTALL)
WINNER = re.compile(
    r"\b(wins|winner|beats|ahead of|first of|improves with every rank|(?<!no )better than"
    r"|better still|(is|are|has|gives) the best(?! (rank-r )?approximation))\b"
)
PARAGRAPH = re.compile(r"\n(?=\s*\n|\s*- )")
HOLDS: dict[str, Callable[[float, float, float], bool]] = {
    ">=": lambda mean, low, high: mean >= 0,
    ">": lambda mean, low, high: low > 0,
    "=": lambda mean, low, high: low <= 0 <= high,
}
"""By the mean gain of A over B and the ends of its interval."""


class Kept:
    """The final values of a study's methods in one setting and metric."""

    def __init__(self, study: str, setting: str, metric: str) -> None:
        path = tables.RESULTS / "studies" / study / "measurements.csv"
        frame = pd.read_csv(path, dtype={"rank": str}, keep_default_na=False)
        chosen = (frame["setting"] == setting) & (frame["metric"] == metric)
        frame = last_round(frame[chosen & (frame["rank"] != "base")])
        self._values = frame.pivot(index=["method", "rank"], columns="seed", values="value")
        self._sign = 1 if HIGHER_IS_BETTER[metric] else -1

    def others(self, method: str) -> list[str]:
        """The methods that ``*`` stands for beside this one."""
        names = self._values.index.unique("method")
        return [one for one in names if one != method and not one.startswith("homogeneous")]

    def gain(self, method: str, other: str, place: str) -> tuple[float, float, float]:
        """By how much ``method`` is better, and the interval. Raises `KeyError` for no value."""
        own, its = self._values.loc[method], self._values.loc[other]
        if place == AURAC:
            shared = own.index.intersection(its.index)
            own, its = (area(values.loc[shared]) for values in (own, its))
        else:
            own, its = own.loc[place], its.loc[place]
        return interval((self._sign * (own - its)).dropna().tolist())

    def rises(self, method: str, places: list[str]) -> bool:
        """Whether the mean is better at each place than at the one before."""
        means = self._values.loc[method].loc[places].mean(axis="columns")
        return bool((self._sign * means.diff().dropna() > 0).all())


def area(values: pd.DataFrame) -> pd.Series:
    """Seed -> the area under the rank curve, of a row per rank and a column per seed."""
    return values.apply(lambda seed: aurac({int(rank): value for rank, value in seed.items()}))


def wrong(claim: str) -> Iterator[str]:
    """What of a claim the kept results do not support: a sentence each."""
    study, setting, metric, at, statement = (part.strip() for part in claim.split("|"))
    kept, places = Kept(study, setting, metric), at.split()
    if statement.endswith(" rises"):
        if len(places) < 2:
            raise ValueError("it needs two ranks or more")
        if not kept.rises(statement.removesuffix(" rises"), places):
            yield f"{study}: {statement} does not hold"
        return
    method, relation, named = re.split(r" (>=|>|=) ", statement)
    others = kept.others(method) if named == "*" else [one.strip() for one in named.split(";")]
    if not (places and others):
        raise ValueError("it compares nothing")
    for place in places:
        for other in others:
            mean, low, high = kept.gain(method, other, place)
            if not HOLDS[relation](mean, low, high):
                found = f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]"
                yield f"{study} at {place}: {method} {relation} {other} does not hold, gain {found}"


def problems(text: str) -> Iterator[str]:
    """Claims of a page that do not hold, and paragraphs that name a winner without a claim."""
    for paragraph in PARAGRAPH.split(text):
        claims = [line for body in CLAIM.findall(paragraph) for line in body.strip().splitlines()]
        text = " ".join(paragraph.split())
        winner = WINNER.search(text)
        if winner and not claims and not text.startswith(("#", "|")):
            yield f"{winner[0]!r} has no claim: {text[:90]}"
        for claim in claims:
            try:
                yield from wrong(claim)
            except (KeyError, ValueError, OSError) as error:
                yield f"{claim.strip()!r} cannot be checked: {error}"


def in_pages() -> list[str]:
    """The problems of all pages."""
    return [
        f"{path.relative_to(tables.ROOT)}: {problem}"
        for page in PAGES
        for path in sorted(tables.ROOT.glob(page))
        for problem in problems(path.read_text(encoding="utf-8"))
    ]


def main() -> None:
    if found := in_pages():
        raise SystemExit("\n".join(found))
    print("all claims hold")


if __name__ == "__main__":
    main()

"""How numbers, metrics and texts are formatted: the same in tables, charts, pages and progress."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from prelort.metrics.scores import higher_is_better


@dataclass(frozen=True, slots=True)
class MetricFormat:
    """A metric's names, unit (displayed value = stored value * factor) and axis.

    ``metric`` is its key in results and events, ``name`` its name for readers. An axis is
    logarithmic if one value is more than ``log_ratio`` times another, and linear ones may begin at
    0.
    """

    metric: str
    name: str
    short: str
    higher_is_better: bool
    factor: float = 1.0
    unit: str = ""
    log_ratio: float | None = None
    from_zero: bool = False

    @property
    def direction(self) -> str:
        """'higher is better' or 'lower is better'."""
        return "higher is better" if self.higher_is_better else "lower is better"

    @property
    def arrow(self) -> str:
        """An arrow that points to the better values."""
        return "↑" if self.higher_is_better else "↓"

    @property
    def title(self) -> str:
        """The name with its unit, as on an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def show(self, value: float | None) -> str:
        """The stored value as text with about four significant digits; a dash for None."""
        if value is None:
            return "–"
        shown = value * self.factor
        if not math.isfinite(shown):
            return str(shown)
        if abs(shown) >= 1e6 or 0 < abs(shown) < 0.1:
            return f"{shown:.2g}"
        return f"{shown:.{0 if abs(shown) >= 1000 else 1 if abs(shown) >= 10 else 2}f}"


_FORMATS = {
    "accuracy": ("accuracy", "acc", 100.0, "%", None),
    "macro_f1": ("macro-F1", "F1", 100.0, "%", None),
    "perplexity": ("perplexity", "ppl", 1.0, "", 4.0),
    "rouge_l": ("ROUGE-L", "R-L", 1.0, "0–100", None),
    "loss": ("loss", "loss", 1.0, "nats", 20.0),
}


def metric_format(metric: str) -> MetricFormat:
    """The format of a metric; an unknown one keeps its own name."""
    unknown = (plain(metric), plain(metric), 1.0, "", None)
    name, short, factor, unit, log_ratio = _FORMATS.get(metric, unknown)
    return MetricFormat(metric, name, short, higher_is_better(metric), factor, unit, log_ratio)


def human_bytes(count: float | None) -> str:
    """A number of bytes in decimal units: ``1.23 MB``."""
    if count is None:
        return "–"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def human_seconds(seconds: float | None) -> str:
    """A duration in words: ``0.42 s``, ``31 s``, ``2 min 05 s``, ``3 h 20 min``."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def clock_time(seconds: float) -> str:
    """A duration as on a stop-watch: ``0:07``, ``12:34``, ``1:02:03``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def plain(text: object) -> str:
    """One line of printable characters: names from outside must not control the terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def capital(text: str) -> str:
    """The text with a capital at its beginning, the rest as it is."""
    return text[:1].upper() + text[1:]


def listing(items: Iterable[object]) -> str:
    """``a, b and c``."""
    words = [str(item) for item in items]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def plural(number: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers, consecutive ones as a range: ``1, 3–5``."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}{'–' if b > a + 1 else ', '}{b}" for a, b in spans)

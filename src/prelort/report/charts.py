"""Charts of the page as places on a canvas: pure geometry, drawn by ``templates/chart.svg``.

Our own small charts, not matplotlib's: their colours follow the reader's light or dark scheme,
their points say their values when pointed at, and a run of 500 rounds stays small. Coordinates are
SVG's: units of the canvas, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from prelort.report.axes import COLOURS

WIDTH, HEIGHT = 440.0, 268.0
TOP, RIGHT, BOTTOM = 10.0, 14.0, 40.0
CHARACTER = 7.0
"""Width of a digit in the labels of the ticks."""

MARKED = 30
"""A line of more points has no markers, which would run together."""

POINTED = 60
"""So many points of a line, at most, say their value when pointed at."""

SHAPES = (
    "M4.2 0A4.2 4.2 0 1 1 -4.2 0A4.2 4.2 0 1 1 4.2 0Z",
    "M-3.7 -3.7H3.7V3.7H-3.7Z",
    "M0 -5L4 0L0 5L-4 0Z",
    "M0 -4.6L4.4 3.4H-4.4Z",
    "M0 4.6L4.4 -3.4H-4.4Z",
    "M-1.5 -4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
    "M-4 -4L4 4M4 -4L-4 4",
)
"""The markers of the pictures (o s D ^ v P X), around 0."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line to be drawn: x -> y, perhaps with a band between ``low`` and ``high``."""

    name: str
    points: Mapping[float, float]
    look: int = 0
    low: Mapping[float, float] = field(default_factory=dict)
    high: Mapping[float, float] = field(default_factory=dict)
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """A place on an axis, and what is written there."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Dot:
    """A point that says its value."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """A series in its place. ``shape`` is the path of its markers around 0."""

    name: str
    colour: int
    hollow: bool
    shape: str
    dashed: bool
    path: str
    band: str
    marked: bool
    dots: list[Dot]


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of lines, ready to be drawn. ``summary`` says in words what it shows."""

    title: str
    subtitle: str
    x_label: str
    left: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Drawn]
    reference: Tick | None
    notes: list[str]
    summary: str
    width: float = WIDTH
    height: float = HEIGHT
    top: float = TOP
    right: float = WIDTH - RIGHT
    bottom: float = HEIGHT - BOTTOM


def line_chart(
    title: str,
    subtitle: str,
    series: Sequence[Series],
    *,
    x_label: str = "round",
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
    show: Callable[[float], str] = lambda value: f"{value:.4g}",
    tick: Callable[[float], str] = lambda value: f"{value:g}",
    reference: tuple[str, float] | None = None,
) -> Chart | None:
    """The chart of these lines; None where there is no finite point to draw.

    ``show`` words a value, ``tick`` one on the axis. ``log_x`` is log2 with a tick at every x.
    ``reference`` is a dashed level with its name.
    """
    finite = [_finite(one, log_y) for one in series]
    places = sorted({x for one in finite for x in one.points})
    values = [
        y for one in finite for part in (one.points, one.low, one.high) for y in part.values()
    ]
    if not values:
        return None
    values += [reference[1]] if reference else []
    y_axis = _Axis.of_values(values, log_y, from_zero, HEIGHT - BOTTOM, TOP, tick)
    left = 12 + CHARACTER * max(len(one.label) for one in y_axis.ticks)
    x_axis = _Axis.of_places(places, log_x, left, WIDTH - RIGHT)
    lost = sum(len(a.points) - len(b.points) for a, b in zip(series, finite, strict=True))
    return Chart(
        title=title,
        subtitle=subtitle + (", log scale" if log_y else ""),
        x_label=x_label,
        left=round(left, 1),
        x_ticks=x_axis.ticks,
        y_ticks=y_axis.ticks,
        lines=[_drawn(one, x_axis, y_axis, x_label, show) for one in finite if one.points],
        reference=Tick(y_axis.place(reference[1]), reference[0]) if reference else None,
        notes=[f"{lost} values that are not finite are not drawn."] if lost else [],
        summary="; ".join(_in_words(one, x_label, show) for one in finite if one.points),
    )


@dataclass(frozen=True, slots=True)
class _Axis:
    """From a value to its place on the canvas, and the ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: list[Tick]

    def place(self, value: float) -> float:
        """Where a value is."""
        return _place(value, self.low, self.high, self.start, self.end, self.log)

    @classmethod
    def of_values(
        cls,
        values: Sequence[float],
        log: bool,
        from_zero: bool,
        start: float,
        end: float,
        word: Callable[[float], str],
    ) -> _Axis:
        low, high = min(values), max(values)
        if log:
            room = (high / low) ** 0.06 if high > low else 1.1
            low, high = low / room, high * room
            at = _log_ticks(low, high)
        else:
            room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
            low, high = 0.0 if from_zero else low - room, high + room
            at = linear_ticks(low, high)
        ticks = [Tick(_place(v, low, high, start, end, log), word(v)) for v in at]
        return cls(low, high, start, end, log, ticks)

    @classmethod
    def of_places(cls, places: Sequence[float], log: bool, start: float, end: float) -> _Axis:
        low, high = places[0], places[-1]
        if log:
            low, high = low / 2**0.25, high * 2**0.25
            at = list(places)
        elif high > low:
            at = [x for x in linear_ticks(low, high, 6) if x == int(x)]
        else:
            low, high, at = low - 1, high + 1, [low]
        ticks: list[Tick] = []
        for x in at:
            new = Tick(_place(x, low, high, start, end, log), f"{x:g}")
            if not ticks or new.at - ticks[-1].at > CHARACTER * (len(new.label) + 1):
                ticks.append(new)
        return cls(low, high, start, end, log, ticks)


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About ``wanted`` round numbers from ``low`` to ``high`` (which must be greater)."""
    rough = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(n * step, digits) for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        at = [float(f"{m}e{n}") for n in decades for m in steps if low <= float(f"{m}e{n}") <= high]
        if len(at) >= 4:
            return at[:: math.ceil(len(at) / 8)]
    return at if len(at) > 1 else linear_ticks(low, high)


def _place(v: float, low: float, high: float, start: float, end: float, log: bool) -> float:
    share = math.log(v / low) / math.log(high / low) if log else (v - low) / (high - low)
    return round(start + share * (end - start), 1)


def _finite(series: Series, log: bool) -> Series:
    def kept(points: Mapping[float, float]) -> dict[float, float]:
        return {x: y for x, y in sorted(points.items()) if math.isfinite(y) and (y > 0 or not log)}

    low, high = kept(series.low), kept(series.high)
    return Series(series.name, kept(series.points), series.look, low, high, series.dashed)


def _drawn(
    one: Series, x_axis: _Axis, y_axis: _Axis, x_label: str, show: Callable[[float], str]
) -> Drawn:
    def at(points: Mapping[float, float]) -> list[tuple[float, float]]:
        return [(x_axis.place(x), y_axis.place(y)) for x, y in points.items()]

    items = list(one.points.items())
    step = math.ceil(len(items) / POINTED)
    pointed = dict.fromkeys([*range(0, len(items), step), len(items) - 1])
    noun = x_label.split()[0]
    dots = []
    for x, y in (items[index] for index in pointed):
        text = f"{one.name}, {noun} {x:g}: {show(y)}"
        if x in one.low and x in one.high and one.low[x] < one.high[x]:
            text += f" ({show(one.low[x])} to {show(one.high[x])})"
        dots.append(Dot(x_axis.place(x), y_axis.place(y), text))
    back = dict(sorted(one.low.items(), reverse=True))
    return Drawn(
        name=one.name,
        colour=one.look % len(COLOURS),
        hollow=one.look >= len(COLOURS),
        shape=SHAPES[one.look % len(SHAPES)],
        dashed=one.dashed,
        path=_path(at(one.points)),
        band=_path([*at(one.high), *at(back)]) + "Z" if one.high and back else "",
        marked=len(items) <= MARKED,
        dots=dots,
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _in_words(one: Series, x_label: str, show: Callable[[float], str]) -> str:
    (first, begin), (last, end) = min(one.points.items()), max(one.points.items())
    noun = x_label.split()[0]
    if first == last:
        return f"{one.name}: {show(begin)} at {noun} {first:g}"
    return f"{one.name}: {show(begin)} at {noun} {first:g}, {show(end)} at {noun} {last:g}"

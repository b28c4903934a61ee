"""Prompts from templates, without the gaps that empty columns leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter

from prelort.errors import ConfigError


def fields(template: str) -> tuple[str, ...]:
    """The columns named in braces, in their order, each once.

    Raises `ConfigError` for braces that do not match, are empty, or hold more than a name.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise _refused(template, str(error)) from None
    named: list[str] = []
    for _, name, specification, conversion in parts:
        if name is None:
            continue
        if not name or specification or conversion:
            raise _refused(template, "braces hold the name of a column and nothing else")
        named.append(name)
    return tuple(dict.fromkeys(named))


def render(template: str, values: Mapping[str, str]) -> str:
    """The template with its columns filled in.

    A line whose columns are all empty goes, together with a heading directly above it (a line
    without columns that ends in a colon); of the gaps around it the larger stays, or at the end
    of the template the last. Only the template's lines go, never lines of a column's own text.
    """
    lines = template.split("\n")
    gone = _gone(lines, values)
    kept: list[str] = []
    gaps = [0]  # runs of blank lines since the last kept line, cut by lines that are gone
    for number, line in enumerate(lines):
        if number in gone:
            gaps.append(0)
        elif not line.strip():
            gaps[-1] += 1
        else:
            at_start = not kept and len(gaps) > 1
            kept += [""] * (0 if at_start else max(gaps)) + [_fill(line, values)]
            gaps = [0]
    return "\n".join([*kept, *[""] * gaps[-1]])


def _gone(lines: Sequence[str], values: Mapping[str, str]) -> set[int]:
    """The numbers of the lines that say nothing."""
    gone: set[int] = set()
    for number, line in enumerate(lines):
        named = fields(line)
        if named and not any(values[name].strip() for name in named):
            gone.add(number)
            above = lines[number - 1].rstrip() if number else ""
            if above.endswith(":") and not fields(above):
                gone.add(number - 1)
    return gone


def _fill(line: str, values: Mapping[str, str]) -> str:
    # Not str.format: it would take the dot of a column called 'a.b' for an attribute.
    filled = ""
    for literal, name, _, _ in Formatter().parse(line):
        filled += literal + ("" if name is None else values[name])
    return filled


def _refused(template: str, reason: str) -> ConfigError:
    return ConfigError(f"data.prompt_template = {template!r} is not allowed: {reason}")

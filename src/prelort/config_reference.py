"""Every key of the configuration with its default, from the schema itself."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from prelort.config import Config, Section

BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def reference() -> str:
    """A file with every key at its default; what it means and what is allowed in comments.

    A key that is not set by default is commented out.
    """
    return "\n".join(_section(Config, "")).strip() + "\n"


def _section(section: type[Section], name: str) -> Iterator[str]:
    facts = section.model_json_schema()["properties"]
    inner: dict[str, type[Section]] = {}
    if name:
        yield from ("", f"[{name}]", f"# {section.__doc__}")
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            inner[key] = field.annotation
            continue
        allowed = _allowed(facts[key])
        comment = f"{field.description} ({allowed})" if allowed else f"{field.description}"
        default = field.get_default(call_default_factory=True)
        yield ""
        yield from textwrap.wrap(comment, 98, initial_indent="# ", subsequent_indent="# ")
        # For all values that are defaults JSON is TOML.
        yield f"{key} = {json.dumps(default)}" if default is not None else f"# {key} ="
    for key, own in inner.items():
        yield from _section(own, key)


def _allowed(facts: Mapping[str, Any]) -> str:
    """What a value must be, beyond its type, by JSON schema."""
    if "anyOf" in facts:
        return " or ".join(filter(None, map(_allowed, facts["anyOf"])))
    if "enum" in facts:
        return ", ".join(map(json.dumps, facts["enum"]))
    if "const" in facts:
        return json.dumps(facts["const"])
    if facts.get("type") == "array":
        inner = _allowed(facts["items"])
        return f"list of {inner}" if inner else ""
    bounds = [f"{word} {facts[bound]:g}" for bound, word in BOUNDS.items() if bound in facts]
    return ", ".join(bounds)

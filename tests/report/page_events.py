"""Runs made up for the page: everything that can go wrong, and a large one."""

from __future__ import annotations

from typing import Any

SCRIPT = "<script>alert(1)</script>"
REASON = '"><img src=x onerror=alert(2)>\u202e {{ 7 * 7 }} &amp; \x1b[31m' + "long " * 200


def troubled() -> list[dict[str, Any]]:
    """Three rounds of six, still waiting; hostile names and reasons; kinds nobody knows."""
    names = ["clinic-north", SCRIPT, "clinic-south"]
    events: list[dict[str, Any]] = [
        {"event": "client_refused", "round": 0, "client": "old-site", "reason": "has another base"},
        {"event": "run_started", "round": 0, "method": "prelort", "task": "classification",
         "seed": 3, "rounds": 6, "clients": 5, "levels": [2, 4, 8]},
        {"event": "evaluated", "round": 0, "base": {"accuracy": 0.21, "loss": 1.9},
         "prefixes": {"2": {"accuracy": 0.21}, "8": {"accuracy": 0.21}}, "seconds": 0.5},
        {"event": "client_joined", "round": 1, "client": "late-comer", "rank": 4},
    ]  # fmt: skip
    for number in (1, 2, 3):
        events.append({"event": "round_started", "round": number, "clients": names})
        for place, name in enumerate(names):
            rank = 2 * 2**place
            if name == SCRIPT or (number == 2 and place == 2):
                reason = REASON if name == SCRIPT else "did not answer"
                events.append({"event": "client_failed", "round": number, "client": name,
                               "rank": rank, "reason": reason})  # fmt: skip
            else:
                events.append({"event": "client_finished", "round": number, "client": name,
                               "rank": rank, "loss": None if number == 3 and place == 2
                               else 2.0 / number + place, "examples": 40, "steps": 5,
                               "seconds": 0.5, "bytes_up": 1000})  # fmt: skip
        events += [
            {"event": "aggregated", "round": number, "replies": 2, "failed": 1, "loss": 2 / number,
             "bytes_up": 2000, "bytes_down": 3600, "diagnostics": {"failed": "no memory"},
             "seconds": {"train": 1.2, "aggregate": 0.01, "diagnose": 0.0, "total": 1.21}},
            {"event": "evaluated", "round": number, "where": "clients",
             "examples": {"2": 120, "8": 40}, "seconds": 0.4,
             "prefixes": {"2": {"accuracy": 0.3 + number / 10}, "8": {"accuracy": 0.5}}},
            {"event": "evaluated_at_clients", "round": number, "failed": {"b": "no rows"},
             "clients": {names[0]: {"rank": 2, "examples": 9, "metrics": {"accuracy": 0.5}}}},
        ]  # fmt: skip
    return [
        *events,
        {"event": "rank_changed", "round": 3, "client": names[0], "from": 2, "to": 4,
         "reason": "the client's offer"},
        {"event": "round_repeated", "round": 4, "attempt": 2, "reason": "too few replies"},
        {"event": "client_left", "round": 4, "client": "clinic-south"},
        {"event": "something-new", "round": 4, "clients": 7, "prefixes": "x", "reason": ["y"]},
        {"event": "waiting", "round": 4, "present": ["clinic-north"], "missing": [SCRIPT],
         "needed": 2, "until": "2026-11-21T12:00:00+00:00"},
    ]  # fmt: skip


def large(clients: int = 100, rounds: int = 500) -> list[dict[str, Any]]:
    """A run in which every client takes part in every round, and some of them fail."""
    events: list[dict[str, Any]] = [
        {"event": "run_started", "round": 0, "method": "prelort", "task": "causal-lm", "seed": 0,
         "rounds": rounds, "clients": clients, "levels": [2, 4, 8, 16, 32]},
        {"event": "evaluated", "round": 0, "base": {"perplexity": 150.0}, "prefixes": {}},
    ]  # fmt: skip
    names = [f"hospital-{index:03d}" for index in range(clients)]
    for number in range(1, rounds + 1):
        events.append({"event": "round_started", "round": number, "clients": names})
        for index, name in enumerate(names):
            rank, jitter = 2 ** (1 + index % 5), ((index * 7919 + number * 104729) % 1000) / 1000
            if jitter > 0.995:
                events.append({"event": "client_failed", "round": number, "client": name,
                               "rank": rank, "reason": f"timed out after {jitter} s"})  # fmt: skip
            else:
                loss = 2 + 3 * 0.99**number + 0.3 * jitter - 0.01 * rank
                events.append({"event": "client_finished", "round": number, "client": name,
                               "rank": rank, "loss": loss, "examples": 100 + index, "steps": 8,
                               "seconds": jitter, "bytes_up": 1000 * rank})  # fmt: skip
        events += [
            {"event": "aggregated", "round": number, "replies": clients, "failed": 0,
             "loss": 2 + 3 * 0.99**number, "bytes_up": 10**6, "bytes_down": 10**6,
             "seconds": {"train": 9.0, "aggregate": 0.2, "total": 9.2}},
            {"event": "evaluated", "round": number, "seconds": 1.0, "prefixes":
             {str(r): {"perplexity": 20 + 100 * 0.98**number - r / 4} for r in (2, 4, 8, 16, 32)}},
        ]  # fmt: skip
    return [*events, {"event": "run_finished", "round": rounds, "seconds": 5100.0,
                      "bytes_up": 10**6 * rounds, "bytes_down": 10**6 * rounds}]  # fmt: skip

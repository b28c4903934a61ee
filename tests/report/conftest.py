import pytest


def run_events(method, finals, *, base=700.0, rounds=12, metric="perplexity", every=0, seed=0):
    """A run's events: ``finals`` maps rank to the metric after the last round."""

    def evaluated(number, more=None):
        share = (number / rounds) ** 0.35
        rows = {
            str(rank): {metric: base ** (1 - share) * final**share, "loss": 7 - 4 * share}
            for rank, final in finals.items()
        }
        return {
            "event": "evaluated",
            "round": number,
            "prefixes": rows,
            "seconds": 0.5,
            **(more or {}),
        }

    levels = sorted(finals)
    events = [
        {
            "event": "run_started", "method": method, "rounds": rounds, "clients": 16,
            "levels": levels, "task": "causal-lm", "seed": seed,
        },
        evaluated(0, {"base": {metric: base, "loss": 6.55}}),
    ]  # fmt: skip
    clients = ["asyncio", "email", "json", "unittest", "xml"]
    for number in range(1, rounds + 1):
        loss = 3.0 + 3.2 * 0.7**number + (0.08 if method == "zero-padding" else 0.0)
        events.append({"event": "round_started", "round": number, "clients": clients})
        for index, client in enumerate(clients):
            events.append(
                {
                    "event": "client_finished", "round": number, "client": client,
                    "rank": levels[index % len(levels)], "loss": loss + index / 10,
                    "examples": 100 + index, "steps": 8, "seconds": 0.4,
                    "bytes_up": 1000, "bytes_down": 1500,
                }
            )  # fmt: skip
        events.append(
            {
                "event": "aggregated", "round": number, "replies": 5, "failed": 0, "loss": loss,
                "bytes_up": 5000, "bytes_down": 7500,
                "seconds": {"train": 2.0, "aggregate": 0.1, "total": 2.1},
            }
        )  # fmt: skip
        if number == rounds or (every and number % every == 0):
            events.append(evaluated(number))
        events.append({"event": "checkpointed", "round": number})
    events.append(
        {
            "event": "run_finished", "round": rounds, "seconds": 30.1,
            "bytes_up": 5000 * rounds, "bytes_down": 7500 * rounds,
        }
    )  # fmt: skip
    return events


@pytest.fixture(scope="session")
def make_run():
    return run_events


@pytest.fixture
def two_runs():
    return {
        "prelort": run_events("prelort", {2: 27.0, 4: 24.0, 8: 22.0, 16: 21.0}),
        "zero-padding": run_events("zero-padding", {2: 26.2, 4: 26.1, 8: 26.1, 16: 26.1}),
    }

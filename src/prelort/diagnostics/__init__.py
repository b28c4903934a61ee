"""What a round did to the products: noise, drift and energy of ranks; nothing here changes a run.

`observer` is the one entry point. The loop calls what it returns once for each round, and gets a
`prelort.methods.interface.RoundObserver`:

    observe = diagnostics.observer(config)  # None where there is nothing to measure
    round_observer = observe(method, state, clients)  # before the round
    round_observer.add(sent, update)  # for each reply that counts
    round_observer.result(after)  # the numbers of the round's event
    round_observer.seconds  # the time it took
"""

from __future__ import annotations

from prelort.config import Config
from prelort.diagnostics.observer import SafeCollector
from prelort.methods import find, trait
from prelort.methods.averaging import weighting
from prelort.methods.interface import Observe


def observer(config: Config) -> Observe | None:
    """Measures rounds from their method, the state before them and the clients asked.

    None where ``evaluation.diagnostics`` is off, and where clients keep their own factors: there is
    no global product to compare with.
    """
    if not config.evaluation.diagnostics or trait(find(config.method.name), "personal"):
        return None
    weight = weighting(config.method.weights)
    return lambda method, state, clients: SafeCollector(method, state, clients, weight, config.seed)

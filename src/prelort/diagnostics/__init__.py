"""Diagnostics of a round's products: noise, drift, energy of ranks. They never change a run.

`observer` is the entry point. The loop calls its result once for each round, and gets a
`prelort.methods.interface.RoundObserver`:

    observe = diagnostics.observer(config)  # None where there is nothing to measure
    round_observer = observe(method, state, clients)  # before the round
    round_observer.add(sent, update)  # for each reply that counts
    round_observer.result(after)  # the numbers of the round's event
    round_observer.seconds  # the time it took
"""

from __future__ import annotations

from functools import partial

from prelort.config import Config
from prelort.diagnostics.collector import Collector
from prelort.diagnostics.observer import SafeCollector, Unavailable
from prelort.methods import find, trait
from prelort.methods.averaging import weighting
from prelort.methods.interface import Observe


def observer(config: Config) -> Observe | None:
    """A function that starts to observe a round of a method, a state and clients.

    None if ``evaluation.diagnostics`` is off, if clients keep personal factors (then there is no
    global product to compare with), or under privacy of clients, which single replies evade.
    """
    personal = trait(find(config.method.name), "personal")
    if not config.evaluation.diagnostics or personal or config.privacy.of_clients:
        return None
    if config.privacy.secure_aggregation:
        reason = "secure aggregation gives sums, no single reply whose product could be measured"
        return lambda method, state, clients: Unavailable(reason)
    weight = weighting(config.method.weights)
    return lambda method, state, clients: SafeCollector(
        partial(Collector, method, state, clients, weight, config.seed)
    )

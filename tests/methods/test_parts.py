"""Methods whose clients train something else than parts of one adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from prelort.config import MethodConfig
from prelort.errors import ConfigError
from prelort.federation.secure_round import check_clients
from prelort.methods import Client, Method
from prelort.methods.interface import Broadcast, ServerState
from prelort.methods.prelort import PreLort
from prelort.privacy.mean import check_method
from prelort.robustness import coverage
from rounds import clients_of, untrained

Check = Callable[[Method, ServerState, Sequence[Client]], object]
CHECKS: dict[str, Check] = {
    "privacy.secure_aggregation": lambda *of: check_clients(3, *of),
    "privacy.epsilon": check_method,
    "robustness.rule": lambda *of: coverage.check("median", *of, cohort=7, attackers=2),
}


class OwnSign(PreLort):
    """Gives one client the other sign of B, which at the beginning is zero."""

    name = "own-sign"

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        part = state.adapter.prefix(client.rank)
        return Broadcast(part.scaled(-1.0) if client.name == "site-3" else part)


@pytest.mark.parametrize("switch", CHECKS)
def test_what_needs_changes_of_one_adapter_refuses_others_before_training(switch: str) -> None:
    state, clients = untrained(), clients_of([2, 2, 2, 2, 8, 8, 8], [5] * 7)
    config, check = MethodConfig(weights="uniform"), CHECKS[switch]
    check(PreLort(config, 0), state, clients)
    with pytest.raises(ConfigError, match=f"{switch} is not possible with method 'own-sign' here"):
        check(OwnSign(config, 0), state, clients)

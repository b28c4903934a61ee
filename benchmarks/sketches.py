"""Could methods that average products use secure aggregation? Sums of linear sketches, tried.

FlexLoRA's server needs M = sum_k p_k s B_k A_k of each layer, of which the clients could send
sketches of their changes D_k instead: Y = D W1 [d_out, k] and Z = W2 D [l, d_in] with l = 2 k + 1
and W1, W2 drawn from a common seed. Sums of sketches are sketches of the sum, from which D is
restored as Q (W2 Q)^+ Z with Q the orthonormal basis of Y (Tropp, Yurtsever, Udell and Cevher 2017,
SIAM J. Matrix Anal. Appl. 38), and then M is cut to the rank R = 16 of the adapter.

`error`: |M - restored M of rank R| over |M - M of rank R|, the least possible; median and largest
over the layers of real rounds of the embedded model. `bytes`: of masked sketches (8 a value) over
those of a client's factors (4 a value), at ranks 2 and 16.

    python benchmarks/sketches.py [--short]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import local_app, machine, report
from torch import Tensor

from prelort import methods
from prelort.config import load
from prelort.experiment.assemble import assemble
from prelort.experiment.deterministic import deterministic
from prelort.federation.in_process import InProcessGrid
from prelort.federation.server import Server
from prelort.federation.transport import Transport
from prelort.methods.interface import Broadcast, ServerState, Update

RANK = 16
WIDTHS = (8, 16, 32, 64)

Changes = dict[str, tuple[Tensor, Tensor]]
"""Layer -> the global product before a round, and the mean change, float64 [d_out, d_in]."""


class Kept:
    """A round's observer that keeps the mean change of the products."""

    seconds = 0.0

    def __init__(self, rounds: list[Changes], state: ServerState) -> None:
        self.total, self.sums, self.rounds, self.state = 0.0, {}, rounds, state

    def add(self, sent: Broadcast, update: Update) -> None:
        """Add one reply."""
        self.total += update.examples
        for name, after in update.adapter.layers.items():
            before, scale = self.state.adapter.layers[name], update.adapter.scale
            change = scale(after.rank) * after.B.double() @ after.A.double()
            change -= self.state.adapter.scale(before.rank) * before.B.double() @ before.A.double()
            self.sums[name] = self.sums.get(name, 0) + update.examples * change

    def result(self, after: ServerState) -> dict[str, Any]:
        """Keep the round's."""
        old = {
            name: self.state.adapter.scale(f.rank) * f.B.double() @ f.A.double()
            for name, f in self.state.adapter.layers.items()
        }
        self.rounds.append({name: (old[name], s / self.total) for name, s in self.sums.items()})
        return {}


def real_rounds(count: int) -> list[Changes]:
    """Rounds of FlexLoRA on the embedded data."""
    config = load(None, ["method.name=flexlora", f"federation.rounds={count}", "threads=1"])
    rounds: list[Changes] = []
    with tempfile.TemporaryDirectory() as folder, deterministic(1):
        assembly = assemble(config, Path(folder))
        clients = assembly.clients
        grid = InProcessGrid(local_app(clients), [{"partition-id": i} for i in range(len(clients))])
        server = Server(
            config,
            Transport(grid, 1),
            assembly.runtime.spec,
            lambda event: None,
            observe=lambda method, state, cohort: Kept(rounds, state),
        )
        method = methods.build(config.method, config.seed)
        state = server.connect(method, ServerState(assembly.initial))
        for number in range(1, count + 1):
            state, _ = server.train(method, state, number)
    return rounds


def restored(change: Tensor, width: int) -> Tensor:
    """A matrix [d_out, d_in] from its sketches of this width."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = change.shape
    right = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    left = torch.randn(2 * width + 1, rows, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(change @ right).Q
    return basis @ torch.linalg.lstsq(left @ basis, left @ change).solution


def cut(matrix: Tensor) -> Tensor:
    """The best approximation of rank R."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ v[:RANK]


def row(rounds: list[Changes], width: int) -> dict[str, Any]:
    errors, sketch, factors = [], 0, 0
    for layers in rounds:
        for old, change in layers.values():
            whole = old + change
            least = (whole - cut(whole)).norm()
            errors.append(float((whole - cut(old + restored(change, width))).norm() / least))
    for _, change in rounds[0].values():
        d_out, d_in = change.shape
        sketch += 8 * (width * d_out + (2 * width + 1) * d_in)
        factors += 4 * (d_out + d_in)
    return {
        "k": width,
        "l": 2 * width + 1,
        "error, median": statistics.median(errors),
        "error, largest": max(errors),
        "bytes, of rank 2": sketch / (2 * factors),
        "bytes, of rank 16": sketch / (16 * factors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="one round")
    options = parser.parse_args()
    rounds = real_rounds(1 if options.short else 6)
    shapes = sorted({tuple(change.shape) for _, change in rounds[0].values()})
    facts = {**machine(), "rounds": len(rounds), "layers": shapes, "short": options.short}
    title = "The mean product from sums of sketches (FlexLoRA)"
    report("sketches", title, [row(rounds, width) for width in WIDTHS], facts)


if __name__ == "__main__":
    main()

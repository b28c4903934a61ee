"""Cost of the server's aggregation, against copying the bytes and against a dense SVD.

Three tables. *Factors*: a round of the methods that average factors, against copying the replies
into existing buffers, and its peak memory. *Products*: a layer of the methods that average
products, against the SVD of the dense mean, and the difference of the results. *Peers*: a layer of
published aggregation code, imported from checkouts named on the command line.

    python benchmarks/aggregation.py [--short] [--parts factors products peers]
        [--flora PATH] [--florist PATH] [--flexlora PATH] [--nvflare PATH]
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import high_water_mib, machine, paired, ratio, report, set_high_water_back

from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.adapters.algebra import distance, norm
from prelort.config import MethodConfig
from prelort.methods import Aggregator, Client, Method, ServerState, Update, build

FACTOR_METHODS = ("prelort", "zero-padding", "replication", "fed-plora")
PRODUCT_METHODS = ("flexlora", "hlora", "raflora", "florist")
FLORIST_ENERGY = 0.95
CONSTANT = ScaleRule("constant", 1.0)
SEED = 7


@dataclass(frozen=True)
class Size:
    """Square layers, and clients with the ranks in equal numbers and random order."""

    layers: int
    side: int
    ranks: tuple[int, ...]
    clients: int

    def adapter(self, rank: int, value: float | None = None) -> LoraAdapter:
        """Normal numbers, or one value, in one buffer as decoded from a message."""
        numbers = torch.empty(2 * self.layers * self.side * rank)
        if value is None:
            numbers.normal_(generator=torch.Generator().manual_seed(rank))
        else:
            numbers.fill_(value)
        layers = {}
        for k, part in enumerate(numbers.chunk(self.layers)):
            a, b = part.chunk(2)
            layers[f"layer {k}"] = Factors(a.view(rank, self.side), b.view(self.side, rank))
        return LoraAdapter(layers, CONSTANT)

    def order(self) -> list[int]:
        """The rank of each client."""
        ranks = [self.ranks[k % len(self.ranks)] for k in range(self.clients)]
        random.Random(SEED).shuffle(ranks)
        return ranks


def update(adapter: LoraAdapter, number: int) -> Update:
    examples = 10 + number
    return Update(Client(f"client {number}", adapter.rank, examples), adapter, examples)


def method_of(name: str, size: Size) -> Method:
    return build(MethodConfig(name=name), SEED)


def aggregator(name: str, size: Size, state: ServerState) -> Aggregator:
    return method_of(name, size).aggregator(state)


# Factors


def factor_methods(size: Size, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a round of each method, alternating with a copy of the same replies."""
    torch.set_num_threads(threads)
    state = ServerState(size.adapter(max(size.ranks)), levels=size.ranks)
    replies = {rank: size.adapter(rank) for rank in size.ranks}
    updates = [update(replies[rank], k) for k, rank in enumerate(size.order())]
    buffers = {rank: size.adapter(rank, 0.0).tensors() for rank in size.ranks}

    def copying() -> float:
        started = time.perf_counter()
        for one in updates:
            into = buffers[one.adapter.rank]
            for name, tensor in one.adapter.tensors().items():
                into[name].copy_(tensor)
        return time.perf_counter() - started

    def method(name: str) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            round_ = aggregator(name, size, state)
            for one in updates:
                round_.add(one)
            round_.result()
            return time.perf_counter() - started

        return run

    sides = {"copying": copying, **{name: method(name) for name in FACTOR_METHODS}}
    taken = paired(sides, repeats)
    rows = []
    for name in sides:
        ratios = ratio(taken, name, "copying")
        rows.append(
            {
                "method": name,
                "threads": threads,
                "seconds a round": statistics.median(taken[name]),
                "x copying (median)": ratios["median"],
                "min": ratios["min"],
                "max": ratios["max"],
            }
        )
    return rows


def peak_mib(name: str, size: Size) -> float:
    """Peak memory that a round adds to the process (Linux; in a new process).

    That is the old state, the aggregator, one reply at a time and the new state.
    """
    torch.set_num_threads(1)
    one_round(name, Size(1, 64, size.ranks, 8))  # what the process loads at its first round
    set_high_water_back()
    before = high_water_mib()
    one_round(name, size)
    return high_water_mib() - before


def one_round(name: str, size: Size) -> None:
    """A round in which each reply exists only while it is added."""
    state = ServerState(size.adapter(max(size.ranks), 1.0), levels=size.ranks)
    round_ = aggregator(name, size, state)
    for number, rank in enumerate(size.order()):
        round_.add(update(size.adapter(rank, 2.0), number))
    round_.result()


def peaks(size: Size) -> dict[str, float]:
    """Method -> its peak in global adapters."""
    whole = 2 * size.layers * size.side * max(size.ranks) * 4 / 2**20
    spawn = multiprocessing.get_context("spawn")
    found = {}
    for name in FACTOR_METHODS:
        # Each in a process of its own: an allocator does not give back what it once had.
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            found[name] = pool.submit(peak_mib, name, size).result() / whole
    return found


def factors(size: Size, repeats: int, threads: Sequence[int]) -> list[dict[str, Any]]:
    memory = peaks(size)
    rows = [row for count in threads for row in factor_methods(size, count, repeats)]
    return [{**row, "peak (adapters)": memory.get(row["method"], "")} for row in rows]


# Products


def trained(size: Size) -> tuple[ServerState, list[Update]]:
    """A global adapter with decaying rank dimensions, and replies that changed it slightly."""
    generator = torch.Generator().manual_seed(SEED)
    rank = max(size.ranks)
    whole = size.adapter(rank)
    sizes = 0.98 ** torch.arange(rank) / size.side**0.5

    def moved(prefix: LoraAdapter) -> LoraAdapter:
        layers = {}
        for name, factors in prefix.layers.items():
            a, b = (
                tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
                for tensor in (factors.A, factors.B)
            )
            scale = sizes[: prefix.rank]
            layers[name] = Factors(a * scale[:, None], b * scale)
        return LoraAdapter(layers, prefix.scale)

    updates = [update(moved(whole.prefix(r)), k) for k, r in enumerate(size.order())]
    return ServerState(moved(whole), levels=size.ranks), updates


def ours(
    name: str, size: Size, state: ServerState, updates: Sequence[Update], repeats: int = 3
) -> tuple[float, LoraAdapter]:
    """Median seconds of a round, and the global adapter after it."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        round_ = aggregator(name, size, state)
        for one in updates:
            round_.add(one)
        after = round_.result()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), method_of(name, size).global_adapter(after)


def mean_product(updates: Sequence[Update], segments: Sequence[int]) -> torch.Tensor:
    """The dense mean of the products of one layer, in float32.

    Each segment (ending at these ranks) over its holders; one segment: over all clients.
    """
    total: torch.Tensor | float = 0.0
    for low, high in zip([0, *segments], segments, strict=False):
        holders = [u for u in updates if len(segments) == 1 or u.adapter.rank >= high]
        weight = sum(u.examples for u in holders)
        for one in holders:
            (factors,) = one.adapter.layers.values()
            scale = one.adapter.scale(factors.rank) * one.examples / weight
            total = total + scale * (factors.B[:, low:high] @ factors.A[low:high])
    assert isinstance(total, torch.Tensor)
    return total


def product_methods(size: Size) -> list[dict[str, Any]]:
    """Each method's layer through factors and through the SVD of the dense matrix."""
    torch.set_num_threads(1)
    state, updates = trained(size)
    rank = max(size.ranks)
    dense = {}
    for kind, segments in (("everyone", (rank,)), ("holders", size.ranks)):
        started = time.perf_counter()
        u, s, vh = torch.linalg.svd(mean_product(updates, segments), full_matrices=False)
        dense[kind] = (time.perf_counter() - started, u, s, vh)
    rows = []
    for name in PRODUCT_METHODS:
        seconds, adapter = ours(name, size, state, updates)
        slow, u, s, vh = dense["holders" if name == "raflora" else "everyone"]
        kept = rank
        if name == "florist":
            kept = int((s.square().cumsum(0) / s.square().sum() < FLORIST_ENERGY).sum()) + 1
        expected = LoraAdapter({"layer 0": Factors(vh[:kept], u[:, :kept] * s[:kept])}, CONSTANT)
        rows.append(
            {
                "method": name,
                "clients": size.clients,
                "rank dimensions": sum(one.adapter.rank for one in updates),
                "rank": adapter.rank,
                "factored s": seconds,
                "dense s": slow,
                "x as fast": slow / seconds,
                "difference": difference(adapter, expected),
            }
        )
    return rows


def difference(found: LoraAdapter, expected: LoraAdapter) -> float:
    """Difference of the products, relative to the norm of the expected one."""
    return distance(found, expected) / norm(expected)


# Peers: their code is imported where it lies and neither copied nor changed


class InMemory:
    """Replaces torch in a module that reads replies from files and writes its result to one."""

    def __init__(self, states: Sequence[dict[str, torch.Tensor]], client_of: Callable[[Path], str]):
        self.states = states
        self.client_of = client_of
        self.saved: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def load(self, path: str, **_: Any) -> dict[str, torch.Tensor]:
        """A client's reply."""
        return dict(self.states[int(self.client_of(Path(path)))])

    def save(self, value: Any, path: str) -> None:
        """Keep the result."""
        self.saved = value


def imported(path: Path, name: str) -> Any:
    """Load a module from its file, without its package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LAYER = "x"
A_KEY, B_KEY = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


def states_of(updates: Sequence[Update]) -> list[dict[str, torch.Tensor]]:
    """The only layer's factors of each reply under PEFT's names."""
    factors = [next(iter(one.adapter.layers.values())) for one in updates]
    return [{A_KEY: f.A, B_KEY: f.B} for f in factors]


def stacking(path: Path, updates: Sequence[Update], **options: Any) -> tuple[float, Factors]:
    """`FedAvg` of FLoRA's and of FLoRIST's repository (the latter's is a copy with more options).

    Its files are replaced by memory, its output is discarded.
    """
    module = imported(path / "fed_utils" / "model_aggregation.py", f"peer_{path.name}")
    module.torch = memory = InMemory(
        states_of(updates), lambda file: file.parent.name.rpartition("_")[2]
    )
    ids = list(range(len(updates)))
    with TemporaryDirectory() as out, redirect_stdout(io.StringIO()):
        started = time.perf_counter()
        module.FedAvg(
            model=None,
            selected_clients_set=ids,
            output_dir=f"{out}/",
            local_dataset_len_dict={k: updates[k].examples for k in ids},
            epoch=0,
            lora_r=None,
            heter=True,
            local_ranks=[one.adapter.rank for one in updates],
            zero_padding=False,
            full=False,
            **options,
        )
        seconds = time.perf_counter() - started
    return seconds, Factors(memory.saved[A_KEY], memory.saved[B_KEY])


def flora(path: Path, size: Size, updates: Sequence[Update]) -> tuple[float, Factors]:
    return stacking(path, updates, stacking=True)


def florist(path: Path, size: Size, updates: Sequence[Update]) -> tuple[float, Factors]:
    options = {"stacking": False, "florist": True, "flex": False, "ffa": False}
    return stacking(path, updates, threshold=FLORIST_ENERGY, **options)


def flexlora(path: Path, size: Size, updates: Sequence[Update]) -> tuple[float, Factors]:
    """`FlexLoRA` and `distribute_weight_fast`, for clients of the highest rank."""
    module = imported(path / "fed_utils" / "model_aggregation.py", "peer_flexlora")
    split = imported(path / "fed_utils" / "adaptive_peft.py", "peer_flexlora_split")
    # Its scale is 16 / rank of the client; here the scale is one for all.
    states = [
        {
            f"{LAYER}.lora_A.local.weight": state[A_KEY],
            f"{LAYER}.lora_B.local.weight": state[B_KEY] * (one.adapter.rank / 16),
        }
        for one, state in zip(updates, states_of(updates), strict=True)
    ]
    module.torch = InMemory(states, lambda file: file.parent.parent.name)
    ids, rank = list(range(len(updates))), max(size.ranks)
    with redirect_stderr(io.StringIO()):
        started = time.perf_counter()
        mean = module.FlexLoRA(ids, "", {k: updates[k].examples for k in ids}, 0)
        found = split.distribute_weight_fast(mean, {"alpha": 16, "Client": {LAYER: rank}})
        seconds = time.perf_counter() - started
    (a,) = [tensor for name, tensor in found.items() if "_A." in name]
    (b,) = [tensor for name, tensor in found.items() if "_B." in name]
    return seconds, Factors(a, b * (16 / rank))


def hlora(path: Path, size: Size, updates: Sequence[Update]) -> tuple[float, Factors]:
    """NVFlare's `HLoRAMaxRankAggregator`, of its MedGemma example."""
    sys.path[:0] = [str(path), str(path / "examples" / "advanced" / "medgemma")]
    from custom_aggregators import HLoRAMaxRankAggregator
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

    theirs = HLoRAMaxRankAggregator(global_lora_rank=max(size.ranks))
    started = time.perf_counter()
    for one, state in zip(updates, states_of(updates), strict=True):
        meta = {"num_examples": one.examples}
        theirs.accept_model(FLModel(params=state, params_type=ParamsType.FULL, meta=meta))
    found = theirs.aggregate_model().params
    seconds = time.perf_counter() - started
    return seconds, Factors(found[A_KEY], found[B_KEY])


PEERS: dict[str, tuple[str, Callable[[Path, Size, Sequence[Update]], tuple[float, Factors]]]] = {
    "flora": ("FederatedLLM (FLoRA)", flora),
    "florist": ("FLoRIST", florist),
    "flexlora": ("FederatedScope, branch FlexLoRA", flexlora),
    "nvflare": ("NVFlare (HLoRA)", hlora),
}
"""Option -> the repository, and a round of one layer through its code."""


def peers(size: Size, paths: dict[str, Path]) -> list[dict[str, Any]]:
    """A layer of each peer's aggregation, and of the same method here, on the same replies."""
    torch.set_num_threads(1)
    state, updates = trained(size)
    rows = []
    for option, path in paths.items():
        name = "hlora" if option == "nvflare" else option
        whose, run = PEERS[option]
        theirs, factors = run(path, size, updates)
        seconds, adapter = ours(name, size, state, updates)
        expected = LoraAdapter({"layer 0": factors}, CONSTANT)
        rows.append(
            {
                "peer": whose,
                "method": name,
                "clients": size.clients,
                "rank": f"{adapter.rank}, theirs {factors.rank}",
                "ours s": seconds,
                "theirs s": theirs,
                "x as fast": theirs / seconds,
                "difference": difference(adapter, expected),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="smaller layers: about a minute")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parts = ["factors", "products", "peers"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    for option, (whose, _) in PEERS.items():
        parser.add_argument(f"--{option}", type=Path, metavar="PATH", help=f"checkout of {whose}")
    arguments = parser.parse_args()
    paths = {name: path for name in PEERS if (path := getattr(arguments, name)) is not None}
    ranks = (8, 16, 32, 64)
    asked = {key: value for key, value in vars(arguments).items() if key not in PEERS}
    facts = {**machine(), **asked, "command": "python benchmarks/aggregation.py"}
    if "factors" in arguments.parts:
        size = Size(8, 2048, ranks, 40) if arguments.short else Size(64, 4096, ranks, 100)
        rows = factors(size, arguments.repeats, arguments.threads)
        title = f"A round of {size.clients} clients, against copying their replies"
        report("aggregation_factors", title, rows, facts)
    side, counts = (1024, [10]) if arguments.short else (4096, [10, 20])
    sizes = [Size(1, side, ranks, count) for count in counts]
    facts = {**facts, "threads": 1}
    if "products" in arguments.parts:
        rows = [row for size in sizes for row in product_methods(size)]
        title = f"A layer of {side} x {side} through its factors, against the dense SVD"
        report("aggregation_products", title, rows, facts)
    if paths and "peers" in arguments.parts:
        title = f"A layer of {side} x {side}, against published aggregation code"
        report("aggregation_peers", title, peers(sizes[-1], paths), facts)


if __name__ == "__main__":
    main()

"""Assigning ranks to clients."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NoReturn

from prelort.config import RanksConfig
from prelort.data.shares import apportion
from prelort.errors import ConfigError
from prelort.seeds import numpy_generator

TOLERANCE = Fraction(1, 10**6)
"""Allowed distance of the sum of a mix's shares from 1, e.g. for thirds as 0.3333333."""


def assign(config: RanksConfig, sizes: Sequence[int], seed: int) -> list[int]:
    """The rank of each client, in the clients' order; ``sizes`` are their numbers of rows.

    A list names one rank per client; a mix becomes a list by largest remainders, each of its ranks
    with at least one client if there are enough. ``in-order`` keeps that list, ``random`` permutes
    it by the seed, ``by-size`` gives its highest rank to the client with the most rows (of equal
    clients, to the first). Raises `ConfigError` if the mix cannot be read or does not fit.
    """
    ranks = _ranks(config.mix, len(sizes))
    if config.assign == "random":
        order = numpy_generator(seed, "ranks").permutation(len(ranks))
        return [ranks[i] for i in order]
    if config.assign == "by-size":
        largest_first = sorted(range(len(sizes)), key=lambda client: -sizes[client])
        dealt = dict(zip(largest_first, sorted(ranks, reverse=True), strict=True))
        return [dealt[client] for client in range(len(sizes))]
    return ranks


def levels(mix: str) -> tuple[int, ...]:
    """The ranks that a mix names, ascending. Raises `ConfigError` if it cannot be read."""
    entries = [entry.strip() for entry in mix.split(",")]
    # With as many clients as entries each rank gets one, so that the whole mix is checked.
    return tuple(sorted(set(_ranks(mix, len(entries)))))


def _ranks(mix: str, clients: int) -> list[int]:
    """One rank per client, in the order of the mix."""
    entries = [entry.strip() for entry in mix.split(",")]
    with_share = ["*" in entry for entry in entries]
    if not any(with_share):
        ranks = [_rank(mix, entry) for entry in entries]
        if len(ranks) != clients:
            every = f" ('{ranks[0]}*1' gives every client rank {ranks[0]})" * (len(ranks) == 1)
            _refuse(mix, f"the list has {len(ranks)} ranks for {clients} clients{every}")
        return ranks
    if not all(with_share):
        _refuse(mix, "write a list of ranks ('4, 8, 16') or a mix ('2*0.5, 8*0.5'), not both")
    shares: dict[int, Fraction] = {}
    for entry in entries:
        rank_text, _, share_text = entry.partition("*")
        rank = _rank(mix, rank_text.strip())
        shares[rank] = shares.get(rank, Fraction(0)) + _share(mix, share_text.strip())
    total = sum(shares.values(), Fraction(0))
    if abs(total - 1) > TOLERANCE:
        _refuse(mix, f"the shares sum to {float(total):g}, and must sum to 1")
    counts = apportion(clients, list(shares.values()), at_least_one=True)
    return [rank for rank, count in zip(shares, counts, strict=True) for _ in range(count)]


def _rank(mix: str, text: str) -> int:
    # isascii: int() would also take digits of other scripts.
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        _refuse(mix, f"{text!r} is not a rank, which is a whole number of at least 1")
    return int(text)


def _share(mix: str, text: str) -> Fraction:
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1 + TOLERANCE:
        _refuse(mix, f"{text!r} is not a share, which is above 0 and at most 1")
    return share


def _refuse(mix: str, reason: str) -> NoReturn:
    raise ConfigError(f"ranks.mix = {mix!r} is not allowed: {reason}")

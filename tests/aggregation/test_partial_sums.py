"""Partial means: an edge aggregator's sum of its clients' replies stands for these replies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from prelort.adapters import LoraAdapter, ScaleRule
from prelort.aggregation.products import ProductSum, SegmentSums, between, summed
from prelort.aggregation.rankwise_mean import Columns, RankwiseMean
from prelort.config import MethodConfig
from prelort.errors import AdapterError
from prelort.methods import Client, ServerState, Update, build
from random_adapters import dense, random_adapter, same_bits, seeds
from reference import partitioned_product, segment_wise, stepped_product, zero_padded
from rounds import assert_near

R = 9
SPREAD = {"rtol": 2e-6, "atol": 2e-6}
"""Of float32 means against float64 ones."""
quick = settings(deadline=None, max_examples=40)
clients = st.lists(st.tuples(st.integers(1, R), st.integers(0, 500)), max_size=5)
"""Rank and number of examples of each client of an edge; an edge may have none."""
edges = st.lists(clients, min_size=1, max_size=4)


def state(seed: int = 99, **options) -> LoraAdapter:
    return random_adapter(R, seed, **options)


def replies(pairs, seed) -> list[Update]:
    adapters = [random_adapter(rank, seed + k) for k, (rank, _) in enumerate(pairs)]
    return [
        Update(Client(f"{seed} {k}", a.rank, examples), a, examples)
        for k, (a, (_, examples)) in enumerate(zip(adapters, pairs, strict=True))
    ]


def partial(updates) -> RankwiseMean:
    found = RankwiseMean(state())
    for update in updates:
        found.add(update.adapter, float(update.examples))
    return found


def merged(*parts: RankwiseMean) -> RankwiseMean:
    """In a new accumulator: the parts are not changed."""
    found = RankwiseMean(state())
    for part in parts:
        found.merge(part)
    return found


def assert_same(first: RankwiseMean, second: RankwiseMean, **spread: float) -> None:
    one, two = first.to_tensors(), second.to_tensors()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], **spread, msg=name)


@quick
@given(edges=edges, seed=seeds)
def test_partial_means_merged_are_the_mean_of_all_replies(edges, seed):
    per_edge = [replies(pairs, seed + 100 * k) for k, pairs in enumerate(edges)]
    everyone = [update for updates in per_edge for update in updates if update.examples]
    for finish, reference in (
        (RankwiseMean.over_holders, segment_wise),
        (RankwiseMean.over_everyone, zero_padded),
    ):
        if not everyone:
            continue
        found = finish(merged(*map(partial, per_edge)), state()).tensors()
        for name, tensor in reference(state(), everyone, "examples").items():
            torch.testing.assert_close(found[name].double(), tensor, **SPREAD, msg=name)


@quick
@given(pairs=st.tuples(clients, clients, clients), seed=seeds)
def test_merging_is_associative_and_commutative_but_for_rounding(pairs, seed):
    a, b, c = (partial(replies(own, seed + 100 * k)) for k, own in enumerate(pairs))
    assert_same(merged(merged(a, b), c), merged(a, merged(b, c)), **SPREAD)
    assert_same(merged(a, b), merged(b, a), **SPREAD)


@quick
@given(pairs=clients, seed=seeds)
def test_an_empty_partial_mean_changes_no_bit(pairs, seed):
    own = partial(replies(pairs, seed))
    for found in (merged(own, RankwiseMean(state())), merged(RankwiseMean(state()), own)):
        assert_same(found, own, rtol=0, atol=0)


@quick
@given(weights=st.lists(st.integers(1, 1000), min_size=2, max_size=5), seed=seeds)
def test_equal_partial_means_are_one_bit_for_bit(weights, seed):
    adapter = random_adapter(R, seed)
    parts = []
    for weight in weights:
        parts.append(RankwiseMean(state()))
        parts[-1].add(adapter, weight)
    assert same_bits(merged(*parts).over_holders(state()), adapter)


def test_disjoint_slots_come_together():
    low, high = torch.arange(0, 4), torch.arange(4, R)
    drawn = random_adapter(R, 5)
    parts = []
    for dimensions in (low, high):
        part = RankwiseMean(state())
        layers = {name: f.take(dimensions) for name, f in drawn.layers.items()}
        adapter = LoraAdapter(layers, drawn.scale, drawn.modules_to_save)
        part.add(adapter, 3.0, dict.fromkeys(layers, dimensions))
        parts.append(part)
    assert same_bits(merged(*parts).over_holders(state()), drawn)


@quick
@given(pairs=clients, seed=seeds)
def test_a_partial_mean_travels(pairs, seed):
    own = partial(replies(pairs, seed))
    sent = load(save(own.to_tensors()))
    rank = max((rank for rank, examples in pairs if examples), default=0)
    assert all(sent[f"held:{name}"].shape == (rank,) for name in own.held)
    assert_same(merged(RankwiseMean.from_tensors(sent, ScaleRule())), own, rtol=0, atol=0)


def test_a_partial_mean_does_not_share_memory_with_what_it_was_read_from():
    tensors = partial(replies([(R, 3)], 0)).to_tensors()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    read = RankwiseMean.from_tensors(tensors, ScaleRule())
    read.add(random_adapter(R, 8), 5.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "change, says",
    [
        ({"total": None}, "tensor 'total' is missing"),
        ({"held:wide": None}, "tensor 'held:wide' is missing"),
        ({"held:wide": torch.ones(3)}, r"tensor 'held:wide' has shape \[3\], expected \[9\]"),
        ({"held:wide": -torch.ones(R)}, "tensor 'held:wide' has a weight that is below 0"),
        ({"total": torch.tensor(torch.inf)}, "tensor 'total' has a weight that is .* not finite"),
        ({"mean:wide.lora_B.weight": None}, r"tensor 'wide\.lora_B\.weight' is missing"),
        ({"other": torch.ones(1)}, "tensor 'other' is surplus"),
    ],
)
def test_a_partial_mean_that_is_not_whole_is_refused(change, says):
    tensors = partial(replies([(R, 3)], 0)).to_tensors() | change
    with pytest.raises(AdapterError, match=says):
        RankwiseMean.from_tensors({n: t for n, t in tensors.items() if t is not None}, ScaleRule())


def test_a_partial_mean_of_other_layers_or_of_too_many_slots_is_refused():
    whole = partial(replies([(R, 3)], 0))
    narrow = RankwiseMean(random_adapter(4))
    with pytest.raises(AdapterError, match="a partial mean of 9 slots does not fit into 4"):
        narrow.merge(whole)
    assert narrow.total == 0
    other = RankwiseMean(random_adapter(R, dimensions={"wide": (7, 4)}))
    with pytest.raises(AdapterError, match="layer 'tall'"):
        other.merge(whole)


def test_a_finished_mean_takes_nothing_more():
    """Its memory has been given away as the new adapter."""
    used = partial(replies([(R, 3)], 0))
    result = used.over_holders(state())
    before = {name: tensor.clone() for name, tensor in result.tensors().items()}
    for again in (
        lambda: used.add(random_adapter(R), 1.0),
        lambda: used.merge(partial(replies([(R, 3)], 1))),
        lambda: used.over_everyone(state()),
    ):
        with pytest.raises(RuntimeError, match="has been finished"):
            again()
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.tensors().items())


# Columns by width


@quick
@given(
    widths=st.lists(st.tuples(st.integers(1, R), st.integers(1, 50)), min_size=1, max_size=12),
    seed=seeds,
)
def test_columns_kept_by_width_are_the_columns_kept_together(widths, seed):
    generator = torch.Generator().manual_seed(seed)
    columns, held = Columns(5, R), torch.zeros(R, dtype=torch.float64)
    total = torch.zeros(5, R, dtype=torch.float64)
    for width, weight in widths:
        values = torch.randn(5, width, generator=generator)
        columns.add(values, float(weight))
        held[:width] += weight
        total[:, :width] += weight * values.double()
        # The bound on memory: narrow parts together no wider than the whole.
        assert sum(part for part in columns.parts if part < R) <= R
        assert all(part.mean.shape == (5, width) for width, part in columns.parts.items())
    whole = columns.whole()
    assert list(columns.parts) == [R]
    torch.testing.assert_close(whole.weights(), held)
    expected = total / held.clamp(min=1)
    torch.testing.assert_close(whole.mean.double(), expected, **SPREAD)


def test_columns_of_one_width_are_folded_in_as_a_whole():
    """With one weight for all of them, which is what makes it fast."""
    columns = Columns(5, R)
    for width in (2, 4, R, 4):
        columns.add(torch.ones(5, width), 2.0)
    assert {width: part.weight for width, part in columns.parts.items()} == {2: 2.0, 4: 4.0, R: 2.0}
    columns.add(torch.ones(5, 6), 1.0)  # 2 + 4 + 6 > 9: joins the full width
    assert set(columns.parts) == {2, 4, R}


# Products


def product_sum(updates) -> ProductSum:
    found = ProductSum()
    for update in updates:
        found.add(update.adapter, float(update.examples))
    return found


@quick
@given(edges=edges, seed=seeds)
def test_sums_of_products_merged_are_the_mean_of_all_products(edges, seed):
    per_edge = [replies(pairs, seed + 100 * k) for k, pairs in enumerate(edges)]
    everyone = [update for updates in per_edge for update in updates if update.examples]
    found = ProductSum()
    for updates in per_edge:
        sent = load(save(product_sum(updates).to_tensors()))
        found.merge(ProductSum.from_tensors(sent, ScaleRule()))
    weight = sum(update.examples for update in everyone)
    assert found.total == weight
    mean = found.mean()
    if mean is None:
        assert not everyone
        return
    products = [(u.examples / weight, dense(u.adapter)) for u in everyone]
    expected = {name: sum(w * p[name] for w, p in products) for name in mean.layers}
    assert_near(dense(mean), expected)
    head = sum(
        w * u.adapter.modules_to_save["score.weight"]
        for (w, _), u in zip(products, everyone, strict=True)
    )
    torch.testing.assert_close(mean.modules_to_save["score.weight"], head, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["raflora", "prelort-sorted"])
def test_segments_are_compressed_without_loss_when_they_outgrow_a_layer(name):
    """40 clients of ranks 2, 5 and 8 have many more slots than the layers have dimensions."""
    start = ServerState(random_adapter(8, 3))
    pairs = [((2, 5, 8)[k % 3], 1 + k) for k in range(40)]
    updates = replies(pairs, 50)
    method = build(MethodConfig(name=name), [2, 5, 8], 0)
    aggregator = method.aggregator(start)
    for update in updates:
        aggregator.add(update)
        for segment in aggregator.sums.segments:
            # Twice the smaller dimension of the larger layer, 4.
            assert sum(part.rank for part in segment.products.parts) <= 2 * 4
    found = dense(aggregator.result().adapter)
    # At a rank above the layers' dimensions nothing is cut: the whole sum can be compared.
    if name == "raflora":
        expected = partitioned_product(start.adapter, updates, [2, 5, 8], "examples")
    else:
        options = method.options
        expected = stepped_product(start.adapter, updates, [2, 5, 8], "examples", options.step)
    assert_near(found, expected)


def test_a_reply_between_two_levels_divides_a_segment():
    drawn = replies([(8, 2), (3, 5), (6, 1)], 4)
    before = random_adapter(8, 9)
    sums = SegmentSums([2], 8, before)
    for update in drawn:
        sums.add(update.adapter, float(update.examples))
    ends = [(segment.low, segment.high) for segment in sums.segments]
    assert ends == [(0, 2), (2, 3), (3, 6), (6, 8)]
    assert [segment.products.total for segment in sums.segments] == [8, 8, 3, 2]
    assert [segment.squares for segment in sums.segments] == [30, 30, 5, 4]
    for segment in sums.segments:
        old = dense(between(before, segment.low, segment.high))
        moved = sum(
            u.examples * float((matrix - old[name]).square().sum())
            for u in drawn
            if u.adapter.rank >= segment.high
            for name, matrix in dense(between(u.adapter, segment.low, segment.high)).items()
        )
        assert segment.moved == pytest.approx(moved, rel=1e-5)
    means = [segment.products.mean() for segment in sums.segments]
    for name, matrix in dense(summed(means)).items():
        expected = 0.0
        for low, high in ends:
            holders = [u for u in drawn if u.adapter.rank >= high]
            weight = sum(u.examples for u in holders)
            for u in holders:
                part = dense(between(u.adapter, low, high))[name]
                expected = expected + u.examples / weight * part
        torch.testing.assert_close(matrix, expected, rtol=1e-5, atol=1e-5)


def test_a_segment_that_is_summed_already_cannot_be_divided():
    sums = SegmentSums([2], 8)
    for update in replies([(8, 1)] * 4, 0):
        sums.add(update.adapter, 1.0)
    with pytest.raises(AdapterError, match="rank 5 is not allowed: it would divide the slots 3 to"):
        sums.add(random_adapter(5), 1.0)


def test_a_part_between_two_slots_keeps_its_product_under_any_scale_rule():
    whole = random_adapter([8, 4], scale=ScaleRule("rslora", 3.0))
    parts = [between(whole, 0, 3), between(whole, 3, 5), between(whole, 5, 8)]
    assert [set(part.layers) for part in parts] == [{"wide", "tall"}, {"wide", "tall"}, {"wide"}]
    assert [set(part.modules_to_save) for part in parts] == [{"score.weight"}, set(), set()]
    assert_near(dense(summed(parts)), dense(whole))

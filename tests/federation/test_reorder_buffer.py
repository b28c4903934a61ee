from hypothesis import given
from hypothesis import strategies as st

from prelort.federation.reorder_buffer import ReorderBuffer


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[int, list[int], set[int]]:
    count = draw(st.integers(0, 9))
    order = draw(st.permutations(range(count)))
    skipped = draw(st.sets(st.sampled_from(range(count)))) if count else set()
    return count, list(order), skipped


@given(arrivals())
def test_any_arrival_order_and_any_skips_give_the_order_of_the_keys(
    case: tuple[int, list[int], set[int]],
) -> None:
    count, order, skipped = case
    taken: list[str] = []
    in_order = ReorderBuffer([f"k{i}" for i in range(count)], taken.append)

    for position, i in enumerate(order):
        if i in skipped:
            in_order.skip(f"k{i}")
        else:
            in_order.put(f"k{i}", f"item {i}")
        arrived = set(order[: position + 1])
        first_missing = next((k for k in range(count) if k not in arrived), count)
        ready = [f"item {k}" for k in range(first_missing) if k not in skipped]
        assert taken == ready  # handed on as early as can be, and no earlier

    assert taken == [f"item {i}" for i in range(count) if i not in skipped]


def test_an_item_that_is_none_is_an_item() -> None:
    taken: list[object] = []
    in_order: ReorderBuffer[object] = ReorderBuffer(["a", "b"], taken.append)
    in_order.put("b", None)
    in_order.put("a", None)
    assert taken == [None, None]


def test_nothing_is_held_back_longer_than_needed() -> None:
    import gc
    import weakref

    class Item:
        pass

    in_order: ReorderBuffer[Item] = ReorderBuffer(["a", "b"], lambda item: None)
    item = Item()
    watch = weakref.ref(item)
    in_order.put("b", item)
    del item
    gc.collect()
    assert watch() is not None
    in_order.skip("a")
    gc.collect()
    assert watch() is None

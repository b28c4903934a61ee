import gc
import weakref

from hypothesis import given
from hypothesis import strategies as st

from prelort.federation.reorder_buffer import ReorderBuffer


@given(st.data(), st.integers(0, 9))
def test_any_arrival_order_and_any_skips_give_the_order_of_the_keys(
    data: st.DataObject, count: int
) -> None:
    """Each item, be it None, is handed on as early as can be, and no earlier."""
    order = data.draw(st.permutations(range(count)))
    skipped = {i for i in range(count) if data.draw(st.booleans())}
    items = [data.draw(st.none() | st.just(f"item {i}")) for i in range(count)]
    taken: list[str | None] = []
    buffer: ReorderBuffer[str | None] = ReorderBuffer(range(count), taken.append)
    for position, i in enumerate(order):
        if i in skipped:
            buffer.skip(i)
        else:
            buffer.put(i, items[i])
        arrived = set(order[: position + 1])
        first_missing = next((k for k in range(count) if k not in arrived), count)
        assert taken == [items[k] for k in range(first_missing) if k not in skipped]


def test_nothing_is_held_back_longer_than_needed() -> None:
    class Item:
        pass

    buffer: ReorderBuffer[Item] = ReorderBuffer(["a", "b"], lambda item: None)
    item = Item()
    watch = weakref.ref(item)
    buffer.put("b", item)
    del item
    gc.collect()
    assert watch() is not None
    buffer.skip("a")
    gc.collect()
    assert watch() is None

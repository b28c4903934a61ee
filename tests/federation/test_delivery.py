"""What travels of an adapter and what does not, the second adapter beside it, and their checks."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch

from prelort.adapters import Factors, LoraAdapter
from prelort.config import FederationConfig, TrainingConfig
from prelort.errors import UpdateRefused
from prelort.federation import wire
from prelort.federation.encoding import DTYPES
from prelort.federation.flower import RecordDict
from prelort.federation.replies import checked
from prelort.methods import Broadcast
from prelort.methods.objective import TailPenalty
from small_federation import (
    AGREEMENT,
    DIMENSIONS,
    LIMITS,
    SCALE,
    answer,
    blob_of,
    clients_of,
    header_of,
    make_adapter,
    make_reply_header,
    raw_content,
    same_bits,
)

CLIENT = clients_of([4])[0]
ADAPTER = make_adapter(4, seed=3)
KINDS = {"A": 2, "B": 2, "extra": 1}
"""How many tensors of each kind the adapter has."""


def request(**changes: Any) -> wire.TrainRequest:
    values = {
        **AGREEMENT.header(4).model_dump(),
        "dtype": "float32",
        "round": 2,
        "rounds": 7,
        "seed": 11,
        "training": TrainingConfig(),
        "objective": "example",
        "levels": (2, 4),
        "level_weights": (0.25, 0.75),
        "timeout": 60.0,
        **changes,
    }
    return wire.TrainRequest(**values)


def frozen(*ranks: int, seed: int = 5) -> LoraAdapter:
    """Factors of any rank, one for each layer; no extras."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: Factors(
            torch.randn(rank, d_in, generator=generator),
            torch.randn(d_out, rank, generator=generator),
        )
        for (name, (d_in, d_out)), rank in zip(DIMENSIONS.items(), ranks, strict=True)
    }
    return LoraAdapter(layers, SCALE)


def names_in(content: RecordDict) -> set[str]:
    return set(safetensors.torch.load(blob_of(content)))


def taken(adapter: LoraAdapter, kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in adapter.tensors().items() if wire.kind_of(n) in kinds}


# Headers


def test_every_field_of_a_request_comes_back() -> None:
    sent = request(
        seeded_factors="A and B",
        factor_seed=2**62,
        personal=True,
        scale_multiplier=8 / 3,
        tail=TailPenalty(1e-3, 0.99, 2),
        trains="B",
        with_validation=True,
    )
    got = wire.header(wire.pack(sent), wire.TrainRequest)
    assert got == sent
    assert got.to_objective().tail == TailPenalty(1e-3, 0.99, 2)


def test_by_default_everything_travels_and_both_factors_learn() -> None:
    plain = request()
    assert plain.missing() == ()
    assert (plain.trains, plain.scale_multiplier, plain.tail) == ("AB", 1.0, None)
    assert not plain.with_validation


def test_measurements_come_back_and_what_is_no_number_is_none() -> None:
    sent = wire.EvaluateReply(
        **AGREEMENT.header(4).model_dump(),
        client="site-0",
        round=3,
        examples=7,
        weight=70,
        metrics={"perplexity": math.inf, "accuracy": math.nan, "loss": 0.1},
    )
    got = wire.header(wire.pack(sent), wire.EvaluateReply)
    assert got.metrics == {"perplexity": None, "accuracy": None, "loss": 0.1}
    assert (got.client, got.round, got.examples) == ("site-0", 3, 7)


@pytest.mark.parametrize(
    "key, value",
    [
        ("seeded_factors", "B"),
        ("seeded_factors", None),
        ("scale_multiplier", 0.0),
        ("scale_multiplier", -1.0),
        ("scale_multiplier", math.inf),
        ("trains", "C"),
        ("trains", ""),
        ("personal", "perhaps"),
        ("tail", {"weight": 1.0}),
        ("factor_seed", 0.5),
    ],
)
def test_impossible_values_in_a_request_are_refused_by_key(key: str, value: object) -> None:
    text = json.dumps(json.loads(request().model_dump_json()) | {key: value})
    with pytest.raises(UpdateRefused, match=f"malformed header: {key}"):
        wire.header(raw_content(text, None), wire.TrainRequest)


@pytest.mark.parametrize("key, value", [("next_rank", 0), ("next_rank", -1), ("next_rank", "all")])
def test_impossible_offers_are_refused_by_key(key: str, value: object) -> None:
    text = json.dumps(json.loads(make_reply_header(CLIENT).model_dump_json()) | {key: value})
    with pytest.raises(UpdateRefused, match=f"malformed header: {key}"):
        wire.header(raw_content(text, None), wire.TrainReply)


# Which tensors travel


def test_the_kind_of_a_tensor_is_told_by_its_name() -> None:
    kinds = [wire.kind_of(name) for name in ADAPTER.tensors()]
    assert {kind: kinds.count(kind) for kind in kinds} == KINDS
    assert wire.kind_of("lora_A.weight.score") == "extra"


@pytest.mark.parametrize(
    "drawn, personal, kinds",
    [
        ("nothing", False, set()),
        ("A", False, {"A"}),
        ("A and B", False, {"A", "B"}),
        ("nothing", True, {"B", "extra"}),
        ("A", True, {"A", "B", "extra"}),
    ],
)
def test_what_is_drawn_or_kept_does_not_come(drawn: str, personal: bool, kinds: set[str]) -> None:
    assert set(request(seeded_factors=drawn, personal=personal).missing()) == kinds


@pytest.mark.parametrize(
    "trains, personal, kinds",
    [
        ("AB", False, set()),
        ("A", False, {"B"}),
        ("B", False, {"A"}),
        ("AB", True, {"B", "extra"}),
    ],
)
def test_what_was_not_trained_or_is_personal_does_not_go(
    trains: Any, personal: bool, kinds: set[str]
) -> None:
    assert set(wire.staying(trains, personal)) == kinds


@pytest.mark.parametrize("without", [("A",), ("A", "B"), ("B", "extra"), ("B", "A", "B")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_stays_behind_is_completed_bit_for_bit(without: tuple[str, ...], dtype: str) -> None:
    head = request(dtype=dtype)
    content = wire.pack(head, ADAPTER, without=without)
    known = taken(ADAPTER, without)

    received, second = wire.adapter(content, head, known)

    assert names_in(content) == set(ADAPTER.tensors()) - set(known)
    rounded = ADAPTER.to(DTYPES[dtype]).tensors()
    expected = LoraAdapter.from_tensors(rounded | known, SCALE)
    assert same_bits(received, expected)
    assert second is None


def test_what_stays_behind_is_not_counted_as_sent() -> None:
    whole = wire.size(wire.pack(request(), ADAPTER))
    less = wire.size(wire.pack(request(), ADAPTER, without=("A",)))
    numbers = sum(tensor.numel() for tensor in taken(ADAPTER, ("A",)).values())
    assert whole - less > 4 * numbers  # and their names


@pytest.mark.parametrize("kind", KINDS)
def test_what_should_have_stayed_is_refused_by_name(kind: str) -> None:
    """Whatever its value: it would override what the receiver knows."""
    known = taken(ADAPTER, (kind,))
    content = wire.pack(request(), ADAPTER)
    with pytest.raises(UpdateRefused, match="is surplus") as refused:
        wire.adapter(content, request(), known)
    assert any(repr(name) in str(refused.value) for name in known)


@pytest.mark.parametrize("kind", ["A", "B"])
def test_what_is_neither_sent_nor_known_is_missed_by_name(kind: str) -> None:
    content = wire.pack(request(), ADAPTER, without=(kind,))
    with pytest.raises(UpdateRefused, match=rf"lora_{kind}\.weight' is missing"):
        wire.adapter(content, request())


def test_an_extra_that_is_neither_sent_nor_known_is_missed_by_name() -> None:
    received, _ = wire.adapter(wire.pack(request(), ADAPTER, without=("extra",)), request())
    with pytest.raises(UpdateRefused, match=r"'head\.weight' is missing"):
        wire.check_adapter(received, AGREEMENT.schema, 4, math.inf)


# The second adapter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("ranks", [(1, 1), (9, 2), (40, 7)])
def test_a_frozen_adapter_of_any_ranks_arrives(dtype: str, ranks: tuple[int, int]) -> None:
    second = frozen(*ranks)
    head = request(dtype=dtype)
    received, found = wire.adapter(wire.pack(head, ADAPTER, second), head)

    assert same_bits(received, ADAPTER.to(DTYPES[dtype]))
    assert found is not None
    assert same_bits(found, second.to(DTYPES[dtype]))
    wire.check_frozen(found, AGREEMENT.schema)


def test_a_frozen_adapter_travels_whole_whatever_stays_behind_of_the_other() -> None:
    second, without = frozen(2, 2), ("A", "B", "extra")
    content = wire.pack(request(), ADAPTER, second, without=without)
    assert names_in(content) == {f"frozen:{name}" for name in second.tensors()}
    received, found = wire.adapter(content, request(), ADAPTER.tensors())
    assert same_bits(received, ADAPTER)
    assert found is not None
    assert same_bits(found, second)


def test_a_frozen_adapter_of_some_layers_only_arrives() -> None:
    second = frozen(2, 2)
    one = replace(second, layers={"model.k_proj": second.layers["model.k_proj"]})
    _, found = wire.adapter(wire.pack(request(), ADAPTER, one), request())
    assert found is not None
    assert same_bits(found, one)
    wire.check_frozen(found, AGREEMENT.schema)


def test_views_are_sent_without_the_rest() -> None:
    second = frozen(40, 40)
    few = wire.pack(request(), ADAPTER, second.prefix(2))
    _, found = wire.adapter(few, request())
    assert found is not None
    assert same_bits(found, second.prefix(2))
    numbers = second.num_parameters - second.prefix(2).num_parameters
    whole = wire.size(wire.pack(request(), ADAPTER, second))
    assert whole - wire.size(few) >= 4 * numbers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_learns_and_what_is_frozen_may_be_views_of_one_adapter(dtype: str) -> None:
    """As the method's own state is: safetensors alone refuses tensors that share memory."""
    second = LoraAdapter(ADAPTER.prefix(2).layers, SCALE)
    head = request(dtype=dtype)
    for one in (second, LoraAdapter(ADAPTER.layers, SCALE)):
        received, found = wire.adapter(wire.pack(head, ADAPTER, one), head)
        assert same_bits(received, ADAPTER.to(DTYPES[dtype]))
        assert found is not None
        assert same_bits(found, one.to(DTYPES[dtype]))


def test_a_frozen_factor_without_its_partner_is_refused_by_name() -> None:
    tensors = {f"frozen:{n}": t for n, t in frozen(2, 2).tensors().items()} | ADAPTER.tensors()
    del tensors["frozen:model.k_proj.lora_B.weight"]
    content = raw_content(None, safetensors.torch.save(tensors))
    with pytest.raises(UpdateRefused, match=r"model\.k_proj\.lora_B\.weight' is missing"):
        wire.adapter(content, request())


def test_a_frozen_tensor_of_a_type_that_was_not_stated_is_refused() -> None:
    tensors = {f"frozen:{n}": t.half() for n, t in frozen(2, 2).tensors().items()}
    content = raw_content(None, safetensors.torch.save(tensors | ADAPTER.tensors()))
    with pytest.raises(UpdateRefused, match=r"'frozen:\S+' is torch\.float16, stated was float32"):
        wire.adapter(content, request())


class TestCheckFrozen:
    def check(self, layers: dict[str, Factors], **modules_to_save: torch.Tensor) -> None:
        wire.check_frozen(LoraAdapter(layers, SCALE, modules_to_save), AGREEMENT.schema)

    def test_a_layer_that_the_model_lacks_is_refused(self) -> None:
        layers = dict(frozen(2, 2).layers)
        layers["model.o_proj"] = layers["model.q_proj"]
        with pytest.raises(UpdateRefused, match=r"frozen layer 'model\.o_proj' .*does not fit"):
            self.check(layers)

    @pytest.mark.parametrize("shape", [(7, 5), (6, 4), (5, 6)])
    def test_other_dimensions_are_refused(self, shape: tuple[int, int]) -> None:
        d_in, d_out = shape
        layers = dict(frozen(2, 2).layers)
        layers["model.q_proj"] = Factors(torch.ones(2, d_in), torch.ones(d_out, 2))
        with pytest.raises(UpdateRefused, match=rf"'model\.q_proj' of \[{d_in}, {d_out}\]"):
            self.check(layers)

    def test_a_frozen_head_is_refused(self) -> None:
        with pytest.raises(UpdateRefused, match="frozen tensor 'head' is surplus"):
            self.check(dict(frozen(2, 2).layers), head=torch.ones(2, 4))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("factor", ["A", "B"])
    def test_what_is_not_finite_is_refused_by_name(self, factor: str, value: float) -> None:
        second = frozen(2, 2)
        getattr(second.layers["model.k_proj"], factor)[-1, -1] = value
        name = rf"model\.k_proj\.lora_{factor}\.weight"
        with pytest.raises(UpdateRefused, match=f"frozen tensor '{name}' .*not finite"):
            self.check(dict(second.layers))


# Replies that hold a part of the adapter


SENT = make_adapter(4, seed=6)
REPLY = make_adapter(4, seed=7)


def take(content: RecordDict, sent: Broadcast, **how: Any) -> Any:
    return checked(answer(content), CLIENT, 0, AGREEMENT, LIMITS, sent, **how)


def reply_of(adapter: LoraAdapter, without: tuple[str, ...] = (), **changes: Any) -> RecordDict:
    return wire.pack(make_reply_header(CLIENT, **changes), adapter, without=without)


@pytest.mark.parametrize(
    "sent, without",
    [
        (Broadcast(SENT, trains="A"), ("B",)),
        (Broadcast(SENT, trains="B"), ("A",)),
        (Broadcast(SENT, trains="B", seeded_factors="A", factor_seed=3), ("A",)),
        (Broadcast(SENT, personal=True), ("B", "extra")),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_reply_leaves_out_is_as_the_server_has_it(
    sent: Broadcast, without: tuple[str, ...], dtype: Any
) -> None:
    """In the server's own precision, and not as it was rounded for the wire."""
    content, limits = reply_of(REPLY, without, dtype=dtype), FederationConfig(wire_dtype=dtype)
    update, _ = checked(answer(content), CLIENT, 0, AGREEMENT, limits, sent)
    trained = taken(REPLY.to(DTYPES[dtype]), tuple(KINDS.keys() - set(without)))
    if dtype != "float32":  # what came is the change
        trained = {name: SENT.tensors()[name] + t.float() for name, t in trained.items()}
    expected = trained | taken(SENT, without)
    assert same_bits(update.adapter, LoraAdapter.from_tensors(expected, SCALE))


@pytest.mark.parametrize("sent", [Broadcast(SENT, trains="A"), Broadcast(SENT, personal=True)])
def test_a_reply_with_what_it_did_not_train_is_refused(sent: Broadcast) -> None:
    with pytest.raises(UpdateRefused, match=r"'\S+' is surplus: it is not trained"):
        take(reply_of(REPLY), sent)


@pytest.mark.parametrize("without", [("A",), ("B",), ("extra",)])
def test_a_reply_without_what_it_trained_is_refused(without: tuple[str, ...]) -> None:
    with pytest.raises(UpdateRefused, match="is missing"):
        take(reply_of(REPLY, without), Broadcast(SENT))


def test_a_reply_with_a_frozen_adapter_is_refused() -> None:
    content = wire.pack(make_reply_header(CLIENT), REPLY, frozen(2, 2))
    for sent in (Broadcast(SENT), Broadcast(SENT, frozen=frozen(2, 2))):
        with pytest.raises(UpdateRefused, match="sends a frozen adapter, which nobody asked for"):
            take(content, sent)


def test_the_rank_of_a_reply_is_that_of_what_was_sent() -> None:
    """Not the client's: a method may send it an adapter of another rank."""
    sent = Broadcast(make_adapter(2, seed=6))
    update, _ = take(reply_of(make_adapter(2), rank=2), sent)
    assert update.adapter.rank == 2
    with pytest.raises(UpdateRefused, match="answers with rank 4, expected 2"):
        take(reply_of(REPLY), sent)


# Pruned replies and offers


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fewer_slots_are_taken_where_a_client_may_prune_and_only_there(rank: int) -> None:
    content = reply_of(make_adapter(rank), rank=rank)
    update, _ = take(content, Broadcast(SENT), may_prune=True)
    assert same_bits(update.adapter, make_adapter(rank))
    assert update.client.rank == 4
    with pytest.raises(UpdateRefused, match=f"answers with rank {rank}, expected 4"):
        take(content, Broadcast(SENT))


@pytest.mark.parametrize("rank", [5, 8, 100])
def test_more_slots_are_never_taken(rank: int) -> None:
    content = reply_of(make_adapter(rank), rank=rank)
    with pytest.raises(UpdateRefused, match=f"answers with rank {rank}, expected 4"):
        take(content, Broadcast(SENT), may_prune=True)


def test_a_pruned_reply_has_the_shapes_of_the_rank_that_it_states() -> None:
    with pytest.raises(UpdateRefused, match="has shape"):
        take(reply_of(make_adapter(3), rank=2), Broadcast(SENT), may_prune=True)


@pytest.mark.parametrize("offer", [None, 1, 4, 8])
def test_an_offer_up_to_the_global_rank_is_handed_on(offer: int | None) -> None:
    assert take(reply_of(REPLY, next_rank=offer), Broadcast(SENT))[1].next_rank == offer


@pytest.mark.parametrize("offer", [9, 10**6])
def test_an_offer_above_the_global_rank_is_refused(offer: int) -> None:
    with pytest.raises(UpdateRefused, match=f"offers rank {offer}, but the global adapter has 8"):
        take(reply_of(REPLY, next_rank=offer), Broadcast(SENT))


def test_a_validation_loss_that_is_no_number_is_none() -> None:
    """The client has learnt something all the same, so that its reply counts."""
    content = reply_of(REPLY, validation_loss=math.nan)
    assert take(content, Broadcast(SENT))[1].validation_loss is None
    assert json.loads(header_of(content))["validation_loss"] is None

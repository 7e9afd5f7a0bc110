"""What shards say to each other arrives as it was said, or is refused; plans are read as each shard must read them."""

from __future__ import annotations

import random
from contextlib import suppress

import msgpack
import pytest
import torch

from kvbank.kvstore.transport.rpc import MAX_MESSAGE_BYTES
from kvbank.workers import seams
from kvbank.workers.batch import PlanBuilder
from kvbank.workers.chain_frames import (
    ChainFormatError,
    Failed,
    Hello,
    HiddenRows,
    Lend,
    Result,
    Scrub,
    Unpark,
    pack,
    pack_event,
    pack_hidden,
    pack_moves,
    placed,
    unpack,
    unpack_event,
)
from kvbank.workers.sampler import SamplingParams

MOVE = seams.Move(7, 3, (b"k" * 32,), b"tttt", b"p" * 32)
MESSAGES = [
    Hello(b"c" * 16, 1, (("shards", "2"),), "127.0.0.1:1"),
    Scrub((1, 2, 3)),
    Unpark(7, None),
    Lend(3, pack_moves([MOVE]), "tenant", 1.5),
    Result(9, (4, -1), ((7, "silent"),), 12, 0.5, 3),
    Result(9, (4, 5), (), 0, 0.5, 3, ((1, -0.25, (5, 9), (-0.25, -2.0)),)),
    Failed("no"),
]
EVENTS = [seams.Moved(1, "a", ("b",)), seams.Stayed(2, "FULL"), seams.Lost(3, "gone"), seams.MustReturn(4, 2.0, "NEED"),
          seams.Returned(5, 6), seams.StayedAway(7)]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message) -> None:
    assert unpack(pack(message)) == message


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_arrives_with_its_attempt(event) -> None:
    sent = unpack(pack(Lend(1, (pack_event(5, event),), "", 0.0))).moves[0]       # any field will do to carry it
    assert unpack_event(sent) == (5, event)


@pytest.mark.parametrize("data", [
    b"", b"\xc1", msgpack.packb(7), msgpack.packb(()), msgpack.packb(("Nobody", 1)), msgpack.packb(("Scrub",)),
    msgpack.packb(("Scrub", (1,), 2)), msgpack.packb(("Message",)),
])
def test_what_no_shard_says_is_refused(data) -> None:
    with pytest.raises(ChainFormatError):
        unpack(data)


@pytest.mark.parametrize("values", [(), (1,), (1, "Adopted", 2), (1, "Moved"), ("x", "Lost", 1, "gone"), (1, "Lost", 2, 3, 4)])
def test_what_is_no_event_is_refused(values) -> None:
    with pytest.raises(ChainFormatError):
        unpack_event(values)


def test_random_bytes_are_refused_and_nothing_else_happens() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        data = bytearray(pack(rng.choice(MESSAGES)))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with suppress(ChainFormatError):
            unpack(bytes(data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (8, 4096), (700, 1100)])
def test_hidden_states_arrive_bit_for_bit_in_pieces_that_fit(dtype, rows, size) -> None:
    hidden = torch.randn(rows, size).to(dtype)
    pieces = list(pack_hidden(5, hidden))
    assert all(len(piece) < MAX_MESSAGE_BYTES for piece in pieces)
    collected = HiddenRows(5, rows, size, dtype)
    assert not collected.add(next(pack_hidden(4, hidden))), "rows of an earlier step are left out"
    assert [collected.add(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert torch.equal(collected.hidden.view(torch.uint8), hidden.view(torch.uint8))


def test_hidden_states_of_another_shape_are_refused() -> None:
    (piece,) = pack_hidden(5, torch.randn(4, 8))
    for rows, size in ((4, 9), (5, 8), (3, 8)):
        with pytest.raises(ChainFormatError):
            HiddenRows(5, rows, size, torch.float32).add(piece)
    with pytest.raises(ChainFormatError):
        HiddenRows(5, 4, 8, torch.float32).add(piece[:10])


def test_a_span_that_is_home_early_is_read_in_its_slot_and_others_under_this_shards_own_name() -> None:
    builder = PlanBuilder(1, 128, pad=False)
    builder.add([1], 600, [(2, 9), (4, 5)], remote=[(0, 71), (1, 72), (3, 73)], host=[], draw=SamplingParams())
    builder.add([1], 10, [(0, 6)], remote=[], host=[], draw=None)
    plan = builder.build()
    assert placed(plan, {}) is plan, "the leader's own plan is used as it is"
    there = placed(plan, {72: 8}, {71: 171, 73: 173})
    assert there.rows[0].local == ((1, 8), (2, 9), (4, 5)), "ascending, as attention wants it"
    assert there.rows[0].remote == ((0, 171), (3, 173))
    assert there.rows[1] == plan.rows[1] and plan.rows[0].remote == ((0, 71), (1, 72), (3, 73))

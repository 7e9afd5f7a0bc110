"""Ops on one member, over its real ledger, vault and driver: drain, recall, clear and pin; what a follower answers."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvbank.kvstore import loan_events as ev
from kvbank.kvstore import messages as m
from kvbank.kvstore.borrowing import Banker
from kvbank.kvstore.layout import BlockKey, Boot
from kvbank.kvstore.ledger import LoanLedger
from kvbank.kvstore.tiers.host_tier import HostTier
from kvbank.kvstore.transport import wire
from kvbank.kvstore.vault import Arena, LendPool, Vault
from kvbank.proto import ops_pb2 as pb
from kvbank.workers.ops_service import OpsService
from kvbank.workers.sequence import JobSpec

ME, BO = Boot(b"me".ljust(16)), Boot(b"bo".ljust(16))
COMPAT = m.Compat(slot_bytes=64, numerics="cpu", model_digest="llama")
SPAN = m.KeptSpan((BlockKey(b"k" * 32),), b"tokens", b"digest")


@pytest.fixture
def member() -> Iterator[SimpleNamespace]:
    """A member that lends, and `say(message)`: what a borrower hears when it says that."""
    vault = Vault(8, blocks_per_span=8, lend_cap=8)
    ledger = LoanLedger(ME, COMPAT, LendPool(vault, Arena(8, 64)), lend_cap=8)
    banker = Banker("me", ME, COMPAT, SimpleNamespace(close=lambda: None), vault.lock, lambda: 0.0, ledger=ledger)
    heard: list[Any] = []
    banker.serve_session(BO, SimpleNamespace(put=lambda data: heard.append(wire.unpack(data).message), close=lambda: None))

    def say(message: Any) -> Any:
        banker.tell_ledger(m.Envelope(BO, ME, message))
        return heard[-1]

    say(m.Hello(m.PROTOCOL_VERSION, "bo", BO, b"n" * 8, COMPAT))
    host = HostTier(1 << 20)
    store = SimpleNamespace(clear_host=host.clear)
    ops = OpsService(banker, vault, lambda: store, blocks_per_span=8)
    yield SimpleNamespace(vault=vault, ledger=ledger, banker=banker, heard=heard, say=say, ops=ops, host=host)
    banker._thread.start()                           # stop ends a driver that runs
    banker.stop()
    host.close()


def lend(member: SimpleNamespace, loan: int = 1) -> m.Ref:
    """Lend one slot and have it filled."""
    granted = member.say(m.Borrow(loan, "t", 1.0, 1, "job"))
    assert isinstance(granted, m.Grant)
    (ref,) = granted.refs
    assert member.ledger.begin_put(0.0, ref).kind == "GO"
    member.banker.tell_ledger(ev.PutEnded(ref, SPAN, SPAN.digest))
    return ref


def test_a_drained_member_calls_everything_back_and_lends_nothing_until_it_ends(member) -> None:
    ref = lend(member)
    reply = member.ops.act(pb.OpsRequest(draining=pb.Draining(on=True)))
    assert (reply.error, reply.blocks) == ("", 8) and member.ops.draining
    assert isinstance(member.heard[-1], m.Recall) and member.heard[-1].refs == (ref,) and member.heard[-1].why == m.DRAIN
    assert member.ledger.loans(0.0)[0].recalled == 1
    assert member.say(m.Borrow(2, "t", 1.0, 1, "job")).code == m.DRAINING
    asked = len(member.heard)
    member.ops.act(pb.OpsRequest(draining=pb.Draining(on=True)))
    assert len(member.heard) == asked, "asking twice says nothing twice"
    member.ops.act(pb.OpsRequest(draining=pb.Draining(on=False)))
    assert not member.ops.draining
    assert member.say(m.Borrow(3, "t", 1.0, 1, "job")).code != m.DRAINING


def test_a_recall_calls_all_loans_home_and_leaves_the_member_open(member) -> None:
    refs = {lend(member, 1), lend(member, 2)}
    assert member.ops.act(pb.OpsRequest(recall=pb.RecallLoans())).blocks == 16
    recalled = [message for message in member.heard if isinstance(message, m.Recall)]
    assert {ref for message in recalled for ref in message.refs} == refs and {message.why for message in recalled} == {m.HOME}
    assert not member.ops.draining and member.ledger.check() == []


def test_clear_drops_idle_spans_and_frames_that_nobody_pins(member) -> None:
    ref = lend(member)
    member.say(m.Settle((ref,), keep=True))          # the borrower's span stays here as idle cache
    assert member.vault.counts().idle == 1
    member.host.put({b"a": [b"frame"], b"b": [b"frame"]})
    member.host.put({b"c": [b"parked"]}, pin=True)
    held = member.host.hold(b"b")
    reply = member.ops.act(pb.OpsRequest(clear=pb.ClearCaches(device=True, host=True)))
    assert (reply.blocks, reply.frames) == (8, 1), "one span of eight blocks; c is pinned, b is being read"
    assert member.vault.counts().idle == 0 and member.vault.check() == []
    assert member.host.has([b"a", b"b", b"c"]) == {b"b", b"c"} and bytes(held.view) == b"frame"
    member.host.release(held)
    assert member.ops.act(pb.OpsRequest(clear=pb.ClearCaches(device=True))).frames == 0
    assert member.host.has([b"b"]) == {b"b"}
    assert member.ops.act(pb.OpsRequest(clear=pb.ClearCaches(host=True))).frames == 1
    member.host.unpin([b"c"])
    member.ops.act(pb.OpsRequest(clear=pb.ClearCaches(host=True)))
    assert member.host.status().bytes_used == 0 and member.host.status().frames == 0


def test_a_pin_says_what_it_covers_and_why_it_covers_nothing(member) -> None:
    keys = [bytes([number]) * 32 for number in range(8)]
    for key in keys:
        (slot,) = member.vault.take_for_loan(1)
        member.vault.give_back(slot, [BlockKey(key)])         # a span of one block, cached

    def act(term_s: int, *named: bytes) -> pb.OpsReply:
        return member.ops.act(pb.OpsRequest(pin=pb.Pin(ends=b"".join(named), term_s=term_s)))

    assert "nothing of this prompt" in act(60, b"x" * 32).error
    assert "at most 86400 s" in act(86_401, keys[0]).error and member.vault.num_pinned == 0
    reply = act(60, *keys[:5])
    assert (reply.error, reply.blocks, reply.left_out) == ("", 4 * 8, 8), "eight slots: four may be pinned"
    assert "half of this member's slots" in act(60, keys[6]).error
    assert member.ops.act(pb.OpsRequest(pin=pb.Pin(tail=keys[0], term_s=60))).blocks == 1
    (slot,) = member.vault.take_for_loan(1)                   # a loan makes room as a job does: the oldest unpinned one goes
    assert [key in member.vault.index for key in keys] == [True] * 4 + [False] + [True] * 3
    assert act(0, *keys[:2]).blocks == 16 and member.vault.num_pinned == 2
    assert act(0, *keys[:2]) == pb.OpsReply(), "safe to repeat"
    assert member.ops.act(pb.OpsRequest(clear=pb.ClearCaches(device=True))).blocks == 7 * 8
    assert member.vault.num_pinned == 0 and member.vault.check() == []


@pytest.mark.parametrize("request_", [pb.OpsRequest(), pb.OpsRequest(recall=pb.RecallLoans()),
                                      pb.OpsRequest(clear=pb.ClearCaches(device=True, host=True))])
def test_a_follower_and_an_unknown_action_are_refused_in_words(member, request_) -> None:
    follower = OpsService(member.banker, member.vault, lambda: None, blocks_per_span=8, leads=False)
    assert "leading shard" in follower.act(request_).error
    assert member.ops.act(pb.OpsRequest()).error != ""


def test_the_shelf_of_every_shard_is_cleared_and_what_was_on_it_is_computed_again(town, alone, run_jobs, prompt) -> None:
    bank = town(lenders=0, shards=2, device_blocks=80, host_bytes=64 << 20)
    jobs = [JobSpec(id=name, prompt=prompt(size, seed), max_tokens=6, ignore_eos=True)
            for name, size, seed in (("a", 900, 0), ("x", 1100, 1), ("b", 900, 0))]
    want = run_jobs(alone(), jobs[0])
    for job in jobs[:2]:
        run_jobs(bank.worker.engine, job)
    clear = pb.OpsRequest(clear=pb.ClearCaches(device=True, host=True))
    leader, follower = bank.worker, bank.followers[1]
    assert "leading shard" in follower.ops.act(clear).error
    frames = {shard: {tier.name: tier.frames for tier in shard.status().tiers}["host"] for shard in (leader, follower)}
    assert min(frames.values()) > 0
    assert leader.ops.act(clear).frames == frames[leader]
    assert follower.ops.act(pb.OpsRequest(clear=pb.ClearCaches(host=True))).frames == frames[follower]
    assert {tier.name: tier.frames for tier in follower.status().tiers}["host"] == 0
    got = run_jobs(bank.worker.engine, jobs[2])
    assert got.tokens["b"] == want.tokens["a"] and not got.tally["b"].reused
